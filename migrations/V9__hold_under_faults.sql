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

INSERT INTO outbox_migration (version) VALUES (9);
