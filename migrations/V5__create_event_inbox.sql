-- The inbox: which events a consumer has handled. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once after V4: by `commitstream migrate`, by Flyway, or by hand with psql. It adds a table and touches no
-- other, so relays and producers go on meanwhile.

-- A handler that writes to this database inserts the event's id in its own transaction: the effect and the memory of it commit
-- together or not at all, so the effect happens once though delivery may repeat.
CREATE TABLE event_inbox (
    -- Each consumer handles an event for itself.
    consumer   text        NOT NULL,
    event_id   uuid        NOT NULL,
    handled_at timestamptz NOT NULL DEFAULT clock_timestamp(),

    CONSTRAINT event_inbox_pkey PRIMARY KEY (consumer, event_id),
    CONSTRAINT event_inbox_consumer_has_1_to_255_bytes
        CHECK (octet_length(consumer) BETWEEN 1 AND 255)
)
-- Rows are inserted once and deleted later, as in event_outbox.
WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
      autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_analyze_scale_factor = 0.05,
      autovacuum_vacuum_cost_delay = 0);

-- Clean-up, oldest first.
CREATE INDEX idx_inbox_handled ON event_inbox (handled_at);

INSERT INTO outbox_migration (version) VALUES (5);
