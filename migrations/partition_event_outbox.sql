-- An option, not a migration: partitions event_outbox by day, so that old rows go by DROP TABLE instead of DELETE and leave nothing
-- to vacuum. PostgreSQL 14 or newer, after any of the migrations.
--
-- Applied by `commitstream migrate --partitioned`, or by hand with `psql --single-transaction`; again it changes nothing. The table
-- becomes the first partition as it is, so only rows with ids of later days are copied. Producers wait meanwhile, for as long as it
-- takes to read the table once; relays go on by themselves.
--
--   event_outbox_p<yyyymmdd>  UUIDv7 ids of one day (UTC); the first one has all before that day, too. Clean-up makes them some days
--                             ahead, and drops those whose day is longer ago than the retention.
--   event_outbox_rest         All other ids: of other kinds than UUIDv7, and what outlived its partition. Cleaned up row by row.
--
-- Columns, constraints, indexes, triggers, owner and grants are those that the table has.

DO $$
DECLARE
    outbox      regclass := to_regclass(format('%I.event_outbox', current_schema()));
    today       date     := (statement_timestamp() AT TIME ZONE 'UTC')::date;
    first       text     := 'event_outbox_p' || to_char(today, 'YYYYMMDD');
    -- The lowest UUIDv7 of tomorrow.
    tomorrow    uuid     := (lpad(to_hex((extract(epoch FROM today + 1) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid;
    parameters  text;
    columns     text;
    sequence    text;
    position    record;
    dependants  text;
    definitions text[];
    statement   text;
BEGIN
    IF outbox IS NULL THEN
        RAISE EXCEPTION 'schema % has no event_outbox', current_schema() USING ERRCODE = 'undefined_table';
    END IF;
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', outbox);
    -- Somebody may have partitioned it while this waited.
    outbox := to_regclass(format('%I.event_outbox', current_schema()));
    IF (SELECT relkind = 'p' FROM pg_class WHERE oid = outbox) THEN
        RETURN;
    END IF;

    -- These are bound to the table that becomes a partition, and would not see what comes into the others.
    SELECT string_agg(DISTINCT pg_describe_object(d.classid, d.objid, 0), ', ') INTO dependants
    FROM pg_depend d JOIN pg_class t ON t.oid = outbox
    WHERE (d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid
           OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (SELECT unnest(ARRAY[oid, typarray]) FROM pg_type WHERE oid = t.reltype))
      AND (d.classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_proc'::regclass, 'pg_publication_rel'::regclass)
           OR d.classid = 'pg_constraint'::regclass AND EXISTS (SELECT FROM pg_constraint WHERE oid = d.objid AND contype = 'f')
           OR d.classid = 'pg_class'::regclass AND EXISTS (SELECT FROM pg_inherits WHERE inhrelid = d.objid AND inhparent = t.oid));
    IF dependants IS NOT NULL THEN
        RAISE EXCEPTION 'event_outbox cannot be partitioned while something else depends on it: %', dependants
            USING HINT = 'Drop that, partition event_outbox, and create it again.';
    END IF;

    SELECT array_agg(d.definition ORDER BY d.step, d.n) INTO definitions FROM (
        SELECT 1 AS step, oid AS n,
               format('ALTER TABLE event_outbox ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)) AS definition
        FROM pg_constraint WHERE conrelid = outbox AND contype IN ('p', 'u', 'x')
        UNION ALL
        SELECT 2, indexrelid, pg_get_indexdef(indexrelid) FROM pg_index
        WHERE indrelid = outbox AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND conrelid = outbox)
        UNION ALL
        SELECT 3, oid, pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = outbox AND NOT tgisinternal
        UNION ALL
        SELECT 4, 0, format('ALTER TABLE %I OWNER TO %s', name, relowner::regrole)
        FROM pg_class, unnest(ARRAY['event_outbox', 'event_outbox_rest']) AS name WHERE oid = outbox
        UNION ALL
        SELECT 5, 0, format('GRANT %s%s ON event_outbox TO %s%s', privilege_type, part,
                            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                            CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END)
        FROM (SELECT NULL AS part, relacl FROM pg_class WHERE oid = outbox
              UNION ALL SELECT format(' (%I)', attname), attacl FROM pg_attribute WHERE attrelid = outbox) AS a, aclexplode(relacl)
    ) AS d;
    SELECT ' WITH (' || array_to_string(reloptions, ', ') || ')' INTO parameters FROM pg_class WHERE oid = outbox;
    SELECT string_agg(quote_ident(attname), ', ') INTO columns
    FROM pg_attribute WHERE attrelid = outbox AND attnum > 0 AND NOT attisdropped AND attgenerated = '';

    -- The names are for the partitioned table.
    FOR statement IN
        SELECT format('ALTER INDEX %s RENAME TO %s_index%s', indexrelid::regclass, first, row_number() OVER (ORDER BY indexrelid))
        FROM pg_index WHERE indrelid = outbox
        UNION ALL
        SELECT format('DROP TRIGGER %I ON event_outbox', tgname) FROM pg_trigger WHERE tgrelid = outbox AND NOT tgisinternal
    LOOP
        EXECUTE statement;
    END LOOP;
    EXECUTE format('ALTER TABLE event_outbox RENAME TO %s', first);
    EXECUTE format('CREATE TABLE event_outbox (LIKE %s INCLUDING ALL EXCLUDING INDEXES) PARTITION BY RANGE (id)', first);

    -- What is not validated there must not count as validated here: neither the rows were read, nor could it be attached.
    FOR statement IN
        SELECT format('ALTER TABLE event_outbox DROP CONSTRAINT %I, ADD CONSTRAINT %1$I %s', conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE conrelid = outbox AND contype = 'c' AND NOT convalidated
    LOOP
        EXECUTE statement;
    END LOOP;

    -- seq goes on where it was.
    sequence := pg_get_serial_sequence(first, 'seq');
    EXECUTE format('SELECT last_value, is_called FROM %s', sequence) INTO position;
    EXECUTE format('ALTER TABLE %s ALTER COLUMN seq DROP IDENTITY', first);
    EXECUTE format('ALTER SEQUENCE %s RENAME TO event_outbox_seq_seq', pg_get_serial_sequence('event_outbox', 'seq'));
    PERFORM setval(pg_get_serial_sequence('event_outbox', 'seq'), position.last_value, position.is_called);

    EXECUTE 'CREATE TABLE event_outbox_rest PARTITION OF event_outbox DEFAULT' || COALESCE(parameters, '');
    EXECUTE format('INSERT INTO event_outbox_rest (%s) OVERRIDING SYSTEM VALUE SELECT %1$s FROM %s WHERE id >= %L', columns, first, tomorrow);
    EXECUTE format('DELETE FROM %s WHERE id >= %L', first, tomorrow);
    EXECUTE format('ALTER TABLE event_outbox ATTACH PARTITION %s FOR VALUES FROM (MINVALUE) TO (%L)', first, tomorrow);
    FOREACH statement IN ARRAY definitions LOOP
        EXECUTE statement;
    END LOOP;

    -- Relays listen on the old table's channel: they connect anew.
    PERFORM pg_notify('event_outbox_' || outbox::oid, 'replaced');
END
$$;
