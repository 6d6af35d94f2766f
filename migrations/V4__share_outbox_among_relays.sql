-- Several relays share the outbox. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once after V3: by `commitstream migrate`, by Flyway, or by hand with psql. Relays of earlier builds stop
-- working with it, so stop them first. Producers wait while it reads the table once for two partial indexes.

-- The transaction that wrote the event. Together with the snapshot of the look before it tells a relay exactly what has become
-- visible since, although seq is drawn before the commit. Existing rows get the transaction of this migration, without a rewrite.
ALTER TABLE event_outbox ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id();

CREATE INDEX idx_outbox_txid ON event_outbox (txid, seq)
    WHERE status IN ('PENDING', 'PROCESSING');

-- Where a failed event holds its aggregate back (setting afterFailure = hold).
CREATE INDEX idx_outbox_failed_aggregate ON event_outbox (aggregate_type, aggregate_id, seq)
    WHERE status = 'FAILED';

ALTER TABLE outbox_batch
    -- The order of claims, and so of the appends to one stream by one relay.
    ADD COLUMN batch_no   bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    -- Of the leases under which it was claimed.
    ADD COLUMN epoch      bigint NOT NULL DEFAULT 0,
    -- The partitions of its events, one bit each. A batch of an earlier build may have any.
    ADD COLUMN partitions bigint NOT NULL DEFAULT -1,
    -- Id of its last entry in the stream, where it is known: after a failover of Redis it tells a lost batch from a lost marker.
    ADD COLUMN last_entry text,
    -- Of partitions, those whose events were made PENDING again because Redis had lost the batch.
    ADD COLUMN lost       bigint NOT NULL DEFAULT 0;

-- The relays, alive and dead. A relay is alive while its database session is there and expires_at, by the database's clock, is
-- ahead. That is a hint: what is safe is decided by leases, the journal and the markers.
CREATE TABLE outbox_relay (
    relay_id          uuid        NOT NULL PRIMARY KEY,
    host              text        NOT NULL,
    pid               int         NOT NULL,
    version           text        NOT NULL,
    started_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at        timestamptz NOT NULL,
    session_pid       int         NOT NULL,
    session_start     timestamptz,
    -- It takes a share of the partitions. Not while it waits for Redis at its start.
    shares            boolean     NOT NULL,
    -- active, standby ..., and why, when it cannot work.
    state             text        NOT NULL,
    reason            text,
    published         bigint      NOT NULL DEFAULT 0,
    failed            bigint      NOT NULL DEFAULT 0,
    -- Made PENDING again after Redis had lost them.
    republished       bigint      NOT NULL DEFAULT 0,
    -- Over the last ten seconds.
    events_per_second real        NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- Life is the relay's now; a lease says who owns a partition, and since which takeover.
ALTER TABLE outbox_lease DROP COLUMN session_pid, DROP COLUMN expires_at;

INSERT INTO outbox_migration (version) VALUES (4);
