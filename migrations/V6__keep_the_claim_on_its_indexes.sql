-- Indexes that cannot be mistaken for one another. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once after V5: by `commitstream migrate`, by Flyway, or by hand with psql. Relays of earlier builds go on, more
-- slowly, until they are replaced. Producers wait while it reads the table once for each index.

-- All of these had the condition of idx_outbox_pending_for_processing or of idx_outbox_failed. To a planner whose statistics are of a time
-- when everything was sent, such indexes look empty and alike, and it took any of them: at the next burst a claim read all that was
-- unsent, for every event. Now each statement of the relay has the condition of one index only.
DROP INDEX idx_outbox_waiting;
CREATE INDEX idx_outbox_waiting ON event_outbox (aggregate_type, aggregate_id, seq)
    WHERE next_retry_at IS NOT NULL;

DROP INDEX idx_outbox_txid;
CREATE INDEX idx_outbox_txid ON event_outbox (txid, seq)
    WHERE published_at IS NULL;

DROP INDEX idx_outbox_failed_aggregate;
CREATE INDEX idx_outbox_failed_aggregate ON event_outbox (aggregate_type, aggregate_id, seq)
    WHERE status || '' = 'FAILED';

INSERT INTO outbox_migration (version) VALUES (6);
