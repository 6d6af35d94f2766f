-- The transactional outbox of Commitstream. PostgreSQL 14 or newer.
--
-- Plain SQL, applied once: by `commitstream migrate`, by Flyway, or by hand with psql. Names are not qualified: the
-- tables land in the first schema of the search_path. V1 and V2 belong to the application.

-- UUIDv7 (RFC 9562): 48 bits of milliseconds, then random. For producers that insert with plain SQL.
CREATE FUNCTION outbox_uuid_v7() RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
AS $$
    SELECT encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3)
                    FROM 1 FOR 6),
            52, 1), 53, 1),
        'hex')::uuid
$$;

CREATE TABLE event_outbox (
    id             uuid        NOT NULL DEFAULT outbox_uuid_v7(),
    seq            bigint      NOT NULL GENERATED ALWAYS AS IDENTITY,
    event_type     text        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    payload        jsonb       NOT NULL,
    headers        jsonb       NOT NULL DEFAULT '{}',
    partition_no   smallint    NOT NULL GENERATED ALWAYS AS
                       ((hashtextextended(aggregate_type || ':' || aggregate_id, 0) & 63)::smallint) STORED,
    status         text        NOT NULL DEFAULT 'PENDING',
    retry_count    int         NOT NULL DEFAULT 0,
    next_retry_at  timestamptz,
    last_error     text,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    published_at   timestamptz,
    -- When the event happened, by the application's clock; NULL means created_at.
    occurred_at    timestamptz,
    -- What the relay will send, measured once, so that a claim is cut by bytes before it reads a payload.
    payload_bytes  int         NOT NULL GENERATED ALWAYS AS
                       (octet_length(payload::text) + octet_length(headers::text)) STORED,

    CONSTRAINT event_outbox_pkey PRIMARY KEY (id),
    CONSTRAINT event_outbox_status_is_known
        CHECK (status IN ('PENDING', 'PROCESSING', 'PUBLISHED', 'FAILED')),
    CONSTRAINT event_outbox_event_type_has_1_to_255_bytes
        CHECK (octet_length(event_type) BETWEEN 1 AND 255),
    CONSTRAINT event_outbox_aggregate_type_has_1_to_255_bytes
        CHECK (octet_length(aggregate_type) BETWEEN 1 AND 255),
    CONSTRAINT event_outbox_aggregate_id_has_1_to_255_bytes
        CHECK (octet_length(aggregate_id) BETWEEN 1 AND 255),
    -- A brace would change the Redis Cluster slot of the stream's key.
    CONSTRAINT event_outbox_aggregate_type_has_no_brace
        CHECK (strpos(aggregate_type, '{') = 0 AND strpos(aggregate_type, '}') = 0),
    -- The most that the setting maxPayloadBytes can be.
    CONSTRAINT event_outbox_payload_and_headers_have_at_most_64_mib
        CHECK (payload_bytes <= 67108864),
    CONSTRAINT event_outbox_headers_is_an_object
        CHECK (jsonb_typeof(headers) = 'object'),
    CONSTRAINT event_outbox_retry_count_is_not_negative
        CHECK (retry_count >= 0),
    -- RFC 3339 writes years 0001 to 9999; 'infinity' has no place in a stream entry.
    CONSTRAINT event_outbox_times_have_four_digit_years
        CHECK (created_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'
           AND (occurred_at IS NULL OR occurred_at BETWEEN '0001-01-02 00:00:00+00' AND '9999-12-30 00:00:00+00'))
)
-- Rows change once and are deleted later: vacuum early and without pauses, so that the partial indexes stay small.
WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
      autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_analyze_scale_factor = 0.05,
      autovacuum_vacuum_cost_delay = 0);

-- What the relay claims, in order. PROCESSING is never written by the relay (open batches say what is in
-- flight), but rows that an older processor left so must be sent all the same.
CREATE INDEX idx_outbox_pending_for_processing ON event_outbox (seq)
    WHERE status IN ('PENDING', 'PROCESSING');

-- Unsent events that were refused, and those that wait behind one. Normally empty.
CREATE INDEX idx_outbox_waiting ON event_outbox (aggregate_type, aggregate_id, seq)
    WHERE status IN ('PENDING', 'PROCESSING') AND next_retry_at IS NOT NULL;

CREATE INDEX idx_outbox_failed ON event_outbox (created_at)
    WHERE status = 'FAILED';

-- Clean-up, oldest first.
CREATE INDEX idx_outbox_published ON event_outbox (published_at)
    WHERE status = 'PUBLISHED';

-- The batch journal: a batch is written here before anything is sent, and settled in the transaction that marks its
-- events PUBLISHED. Whether it was appended is decided by its marker in Redis, beside the entries.
CREATE TABLE outbox_batch (
    batch_id   uuid        NOT NULL PRIMARY KEY,
    relay_id   uuid        NOT NULL,
    stream     text        NOT NULL,
    event_ids  uuid[]      NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    settled_at timestamptz,
    -- How many of event_ids, from the first, are in the stream; known once settled.
    appended   int
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- Ids do not compress.
ALTER TABLE outbox_batch ALTER COLUMN event_ids SET STORAGE EXTERNAL;

CREATE INDEX idx_outbox_batch_open ON outbox_batch (claimed_at) WHERE settled_at IS NULL;
CREATE INDEX idx_outbox_batch_settled ON outbox_batch (settled_at) WHERE settled_at IS NOT NULL;

-- Who may claim: one row per partition. The claim locks its rows FOR KEY SHARE, which lets heartbeats
-- pass; a takeover locks them FOR UPDATE.
CREATE TABLE outbox_lease (
    partition_no smallint    NOT NULL PRIMARY KEY CHECK (partition_no BETWEEN 0 AND 63),
    relay_id     uuid,
    epoch        bigint      NOT NULL DEFAULT 0,
    -- The owner's backend: when it is gone, so is the owner. A hint; expires_at is the rule.
    session_pid  int,
    expires_at   timestamptz
) WITH (fillfactor = 50);

INSERT INTO outbox_lease (partition_no) SELECT generate_series(0, 63);

-- The sleep lock. A relay that found nothing holds this advisory lock (or waits for it) while it sleeps; then the
-- try fails and the producer wakes it at commit. An awake relay costs producers no NOTIFY.
-- 1129139027 is 'CMST' in ASCII; the second key and the channel carry the table, so that schemas do not meet.
CREATE FUNCTION outbox_wake_relay() RETURNS trigger
    LANGUAGE plpgsql
AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(1129139027, TG_RELID::int) THEN
        PERFORM pg_notify('event_outbox_' || TG_RELID, '');
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER event_outbox_wake_relay
    AFTER INSERT ON event_outbox
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_wake_relay();

-- Which migrations this schema has, whoever applied them.
CREATE TABLE outbox_migration (
    version    int         NOT NULL PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

INSERT INTO outbox_migration (version) VALUES (3);
