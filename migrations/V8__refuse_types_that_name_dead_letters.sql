-- No new event has an aggregate type that ends in ':dead'. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once after V7: by `commitstream migrate`, by Flyway, or by hand with psql. It reads the unsent events once, for which
-- producers wait where it is one transaction. Relays of earlier builds go on, but send such events that are there already: stop them first.

-- Dead letters of `user` stand in the stream of the type `user:dead`, where such an event would pass for one. NOT VALID spares the table
-- from being read. Every update is checked, though, and those that are there must come to their end: they wait (next_retry_at) until the
-- relay makes them FAILED.
ALTER TABLE event_outbox ADD CONSTRAINT event_outbox_aggregate_type_does_not_end_in_dead
    CHECK (aggregate_type NOT LIKE '%:dead' OR next_retry_at IS NOT NULL OR status IN ('PUBLISHED', 'FAILED')) NOT VALID;

UPDATE event_outbox SET next_retry_at = clock_timestamp()
WHERE status IN ('PENDING', 'PROCESSING') AND aggregate_type LIKE '%:dead' AND next_retry_at IS NULL;

INSERT INTO outbox_migration (version) VALUES (8);
