DO $install$ BEGIN
PERFORM pg_advisory_xact_lock(1937337955, hashtext('syncstream'));
IF to_regclass('syncstream.state') IS NOT NULL THEN RETURN; END IF;
IF to_regnamespace('syncstream') IS NULL THEN CREATE SCHEMA syncstream; END IF;

-- epoch: the nonce before the first event of channels that have none.
CREATE TABLE syncstream.state (
    version integer NOT NULL, epoch bigint NOT NULL, swept timestamptz NOT NULL);
INSERT INTO syncstream.state
    VALUES (1, floor(random() * 4294967296), clock_timestamp());

-- last and nonce: its newest event's; prev: the nonce of the one before.
CREATE TABLE syncstream.channel (
    name text COLLATE "C" PRIMARY KEY, last bigint NOT NULL, prev bigint NOT NULL,
    nonce bigint NOT NULL, ts timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.1);

-- seq: the order of commits, over all channels. off: within the channel, no holes.
CREATE TABLE syncstream.event (
    seq bigint PRIMARY KEY, channel text COLLATE "C" NOT NULL, off bigint NOT NULL,
    nonce bigint NOT NULL, prev bigint NOT NULL, ts timestamptz NOT NULL,
    data bytea NOT NULL, UNIQUE (channel, off)
) WITH (autovacuum_vacuum_scale_factor = 0.1);
CREATE SEQUENCE syncstream.event_seq OWNED BY syncstream.event.seq;

-- What is published within transactions that are open.
CREATE TABLE syncstream.outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    channel text COLLATE "C" NOT NULL, data bytea NOT NULL,
    capacity bigint NOT NULL DEFAULT 1000, max_age double precision DEFAULT 3600
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE FUNCTION syncstream.append(
    a_channel text, a_data bytea, a_capacity bigint, a_max_age double precision
) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c_seq bigint;
    c_last bigint;
    c_prev bigint;
    c_nonce bigint := floor(random() * 4294967296);
    c_ts timestamptz;
    c_names text[];
BEGIN
    -- Held until the commit is visible, so all that follows is in its order.
    PERFORM pg_advisory_xact_lock(1937337955, 'syncstream.event'::regclass::oid::integer);
    INSERT INTO syncstream.channel AS c (name, last, prev, nonce, ts)
        SELECT a_channel, 1, s.epoch, c_nonce, clock_timestamp() FROM syncstream.state s
        ON CONFLICT (name) DO UPDATE SET last = c.last + 1, prev = c.nonce,
            nonce = excluded.nonce, ts = greatest(c.ts, excluded.ts)
        RETURNING c.last, c.prev, c.ts INTO STRICT c_last, c_prev, c_ts;
    c_seq := nextval('syncstream.event_seq');
    INSERT INTO syncstream.event (seq, channel, off, nonce, prev, ts, data)
        VALUES (c_seq, a_channel, c_last, c_nonce, c_prev, c_ts, a_data);
    -- Readers leave out what is too much or too old; here it makes room, in batches.
    IF c_last % 32 = 0 THEN
        DELETE FROM syncstream.event WHERE channel = a_channel AND off IN (
            SELECT e.off FROM syncstream.event e
            WHERE e.channel = a_channel AND e.off <= c_last - a_capacity
            ORDER BY e.off LIMIT 1000);
    END IF;
    IF c_seq % 32 = 0 AND a_max_age IS NOT NULL THEN
        DELETE FROM syncstream.event WHERE seq IN (
            SELECT e.seq FROM syncstream.event e ORDER BY e.seq LIMIT 64)
            AND ts < clock_timestamp() - a_max_age * interval '1 second';
    END IF;
    -- Channels that are idle for long are forgotten. Then the epoch is another one:
    -- who has the old one may have missed what they had.
    IF c_seq % 1024 = 0 AND a_max_age IS NOT NULL THEN
        UPDATE syncstream.state SET swept = clock_timestamp()
            WHERE swept < clock_timestamp() - interval '1 hour';
        IF FOUND THEN
            SELECT array_agg(name) INTO c_names FROM (
                SELECT c.name FROM syncstream.channel c WHERE c.ts < clock_timestamp()
                    - greatest(2 * a_max_age, 86400) * interval '1 second'
                LIMIT 10000) idle;
            IF c_names IS NOT NULL THEN
                DELETE FROM syncstream.event WHERE channel = ANY (c_names);
                DELETE FROM syncstream.channel WHERE name = ANY (c_names);
                UPDATE syncstream.state SET epoch = floor(random() * 4294967296);
            END IF;
        END IF;
    END IF;
    -- Empty: those of a transaction become one, and 8000 bytes are the limit.
    PERFORM pg_notify('syncstream', '');
    RETURN to_hex(c_last) || '-' || lpad(to_hex(c_nonce), 8, '0');
END $body$;

CREATE FUNCTION syncstream.publish(
    a_channels text[], a_data bytea[], a_capacity bigint, a_max_age double precision
) RETURNS SETOF text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT u.channel, u.data
        FROM unnest(a_channels, a_data) WITH ORDINALITY AS u (channel, data, place)
        ORDER BY u.place
    LOOP
        RETURN NEXT syncstream.append(c.channel, c.data, a_capacity, a_max_age);
    END LOOP;
END $body$;

CREATE FUNCTION syncstream.commit_outbox() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    PERFORM syncstream.append(NEW.channel, NEW.data, NEW.capacity, NEW.max_age);
    DELETE FROM syncstream.outbox WHERE id = NEW.id;
    RETURN NULL;
END $body$;
CREATE CONSTRAINT TRIGGER commit_outbox AFTER INSERT ON syncstream.outbox
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION syncstream.commit_outbox();

-- Returns the head's off and nonce; then what follows an id, if it is known, else all
-- that is kept. Stable: all of it is of one moment.
CREATE FUNCTION syncstream.read(
    a_channel text, a_off bigint, a_nonce bigint, a_limit integer, a_capacity bigint,
    a_max_age double precision
) RETURNS TABLE (r_off bigint, r_nonce bigint, r_prev bigint, r_data bytea)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c_since timestamptz := coalesce(
        clock_timestamp() - a_max_age * interval '1 second', '-infinity');
    c_after bigint;
BEGIN
    SELECT coalesce(c.last, 0), coalesce(c.nonce, s.epoch) INTO STRICT r_off, r_nonce
        FROM syncstream.state s LEFT JOIN syncstream.channel c ON c.name = a_channel;
    RETURN NEXT;
    IF a_off IS NULL OR (a_off = r_off AND a_nonce = r_nonce) THEN RETURN; END IF;
    c_after := greatest(r_off - a_capacity, 0);
    IF a_off >= c_after AND EXISTS (
        SELECT FROM syncstream.event e WHERE e.channel = a_channel AND e.off = a_off + 1
            AND e.prev = a_nonce AND e.ts > c_since)
    THEN
        c_after := a_off;
    END IF;
    RETURN QUERY SELECT p.off, p.nonce, p.prev, p.data FROM (
        SELECT e.off, e.nonce, e.prev, e.data, row_number() OVER w AS place,
            sum(octet_length(e.data)) OVER w AS size
        FROM (
            SELECT * FROM syncstream.event v
            WHERE v.channel = a_channel AND v.off > c_after AND v.ts > c_since
            ORDER BY v.off LIMIT a_limit) e
        WINDOW w AS (ORDER BY e.off)
    ) p WHERE p.place = 1 OR p.size <= 8388608 ORDER BY p.off;
END $body$;

-- Returns the file of the events, another one after each TRUNCATE and restore; then
-- what follows a seq, of all channels; data only of those that are wanted, and not too
-- much of it.
CREATE FUNCTION syncstream.tail(
    a_seq bigint, a_limit integer, a_names text[], a_prefixes text[]
) RETURNS TABLE (r_seq bigint, r_channel text, r_off bigint, r_nonce bigint,
    r_prev bigint, r_data bytea)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    r_seq := pg_relation_filenode('syncstream.event');
    RETURN NEXT;
    RETURN QUERY SELECT p.seq, p.channel, p.off, p.nonce, p.prev,
        CASE WHEN p.is_wanted AND (p.size <= 8388608 OR p.place = 1) THEN p.data END
    FROM (
        SELECT e.*, row_number() OVER w AS place,
            sum(CASE WHEN e.is_wanted THEN octet_length(e.data) END) OVER w AS size
        FROM (
            SELECT v.*, v.channel = ANY (a_names) OR EXISTS (
                SELECT FROM unnest(a_prefixes) prefix
                WHERE starts_with(v.channel, prefix)) AS is_wanted
            FROM syncstream.event v WHERE v.seq > a_seq ORDER BY v.seq LIMIT a_limit) e
        WINDOW w AS (ORDER BY e.seq)
    ) p ORDER BY p.seq;
END $body$;
END $install$;
