-- What faults in the field have shown to be missing. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once after V8: by `commitstream migrate`, by Flyway, or by hand with psql. Producers go on meanwhile.

-- Two-phase commit (XA, JTA): PostgreSQL prepares no transaction that has notified. The trigger leaves the notification out where the
-- table says so (its argument, set by `commitstream migrate --two-phase`) or the transaction does (SET LOCAL commitstream.two_phase = on; also
-- for a role or a database). Then it takes no lock either, and the relay finds the events when it looks by itself (pollInterval).
CREATE OR REPLACE FUNCTION outbox_wake_relay() RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    IF TG_NARGS > 0 OR lower(current_setting('commitstream.two_phase', true)) IN ('on', 'true', 'yes', '1') THEN
        RETURN NULL;
    END IF;
    IF NOT pg_try_advisory_xact_lock_shared(1129139027, TG_RELID::int) THEN
        PERFORM pg_notify('event_outbox_' || TG_RELID, '');
    END IF;
    RETURN NULL;
END
$$;

-- The streams that relays have written to, by key: only these are trimmed, and looked at for entries that are gone.
CREATE TABLE outbox_stream (
    stream        text        NOT NULL PRIMARY KEY,
    -- How the last look found it: the id of the first entry, where there were others before it; that of the newest entry that was appended; how
    -- many entries Redis had counted.
    first_entry   text,
    last_entry    text,
    entries_added bigint,
    looked_at     timestamptz,
    -- Entries that were appended are gone: since when that is known, and how it showed.
    lost_at       timestamptz,
    lost          text
);

-- Those of the journal, which is read once.
INSERT INTO outbox_stream (stream) SELECT DISTINCT stream FROM outbox_batch
WHERE appended > 0 AND stream NOT LIKE '%:dead';

-- Whoever runs relays keeps it.
DO $$
DECLARE
    writer text;
BEGIN
    FOR writer IN SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END
                  FROM pg_class, aclexplode(relacl) WHERE oid = 'outbox_batch'::regclass AND privilege_type = 'INSERT' LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE ON outbox_stream TO %s', writer);
    END LOOP;
END $$;

INSERT INTO outbox_migration (version) VALUES (9);
