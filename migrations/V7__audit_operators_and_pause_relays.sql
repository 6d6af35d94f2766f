-- What operators do, and a switch that stops publishing. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once after V6: by `commitstream migrate`, by Flyway, or by hand with psql. It adds two tables and touches no
-- other, so producers go on meanwhile, and so do relays of earlier builds, which know no pause.

-- Who did what, when, to which events. Written in the transaction of the deed; one row for each transaction of a large one. What is done
-- to Redis is written down before.
CREATE TABLE outbox_audit (
    audit_id  bigint      NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    done_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    who       text        NOT NULL,
    action    text        NOT NULL,
    -- Which events were meant, in words.
    about     text        NOT NULL,
    events    bigint      NOT NULL DEFAULT 0,
    event_ids uuid[]      NOT NULL DEFAULT '{}'
);

-- While it has its row, relays settle what is on its way and claim nothing.
CREATE TABLE outbox_pause (
    is_paused boolean     NOT NULL PRIMARY KEY DEFAULT true CHECK (is_paused),
    since     timestamptz NOT NULL DEFAULT clock_timestamp(),
    who       text        NOT NULL
);

-- Whoever runs relays reads the pause with each heartbeat.
DO $$
DECLARE
    reader text;
BEGIN
    FOR reader IN SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END
                  FROM pg_class, aclexplode(relacl) WHERE oid = 'outbox_relay'::regclass AND privilege_type = 'SELECT' LOOP
        EXECUTE format('GRANT SELECT ON outbox_pause TO %s', reader);
    END LOOP;
END $$;

INSERT INTO outbox_migration (version) VALUES (7);
