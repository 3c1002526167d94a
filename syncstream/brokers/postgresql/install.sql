DO $install$ DECLARE
    c_lock_timeout text := current_setting('lock_timeout');
    c_is_new boolean := false;
BEGIN
IF to_regclass('$S.upkeep') IS NOT NULL THEN RETURN; END IF;
-- Who has given up waits no longer, and holds up none behind it.
PERFORM set_config('lock_timeout', '3s', true);
-- Those of revision 1 wait for this one. Where somebody else has it, let him: a name
-- that others create at this moment is waited for all the same.
PERFORM pg_try_advisory_xact_lock(1937337955, hashtext('$S'));
IF to_regnamespace('$S') IS NULL THEN
    BEGIN
        CREATE SCHEMA $S;
    EXCEPTION WHEN duplicate_schema OR unique_violation THEN NULL;
    END;
END IF;

IF to_regclass('$S.state') IS NULL THEN
    BEGIN
        -- epoch: the nonce before the first event of channels that have none. Who
        -- appends holds the row until his commit is visible: it takes UPDATE.
        CREATE TABLE $S.state (
            version integer PRIMARY KEY, epoch bigint NOT NULL,
            swept timestamptz NOT NULL);
        c_is_new := true;
    EXCEPTION WHEN duplicate_table OR unique_violation THEN NULL;
    END;
END IF;

IF c_is_new THEN
    INSERT INTO $S.state VALUES (
        $VERSION, ('x' || left(gen_random_uuid()::text, 8))::bit(32)::bigint,
        clock_timestamp());

    -- last and nonce: its newest event's; prev: the nonce of the one before.
    CREATE TABLE $S.channel (
        name text COLLATE "C" PRIMARY KEY, last bigint NOT NULL, prev bigint NOT NULL,
        nonce bigint NOT NULL, ts timestamptz NOT NULL
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.1);

    -- seq: the order of commits, over all channels. off: within the channel, no holes.
    CREATE TABLE $S.event (
        seq bigint PRIMARY KEY, channel text COLLATE "C" NOT NULL, off bigint NOT NULL,
        nonce bigint NOT NULL, prev bigint NOT NULL, ts timestamptz NOT NULL,
        data bytea NOT NULL, UNIQUE (channel, off)
    ) WITH (autovacuum_vacuum_scale_factor = 0.1);
    CREATE SEQUENCE $S.event_seq OWNED BY $S.event.seq;

    -- What is published within transactions that are open.
    CREATE TABLE $S.outbox (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        channel text COLLATE "C" NOT NULL, data bytea NOT NULL,
        capacity bigint NOT NULL DEFAULT 1000, max_age double precision DEFAULT 3600
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
ELSE
    -- Who may not go on after the lock must not hold up publishers by it.
    IF NOT pg_has_role((SELECT c.relowner FROM pg_catalog.pg_class c
        WHERE c.oid = to_regclass('$S.event')), 'USAGE')
    THEN
        RAISE insufficient_privilege USING MESSAGE = 'must be owner of $S.event';
    END IF;
    -- Whoever has appended is waited for, until his commit: he may hold another lock.
    LOCK TABLE $S.channel, $S.event IN SHARE ROW EXCLUSIVE MODE;
    -- Somebody else may have been here by then.
    IF to_regclass('$S.upkeep') IS NOT NULL THEN
        PERFORM set_config('lock_timeout', c_lock_timeout, true);
        RETURN;
    END IF;
    -- A publication of all tables forbids to update one that has no key. Readers that
    -- take long, as a dump does, are not waited for: others would wait behind this.
    BEGIN
        PERFORM set_config('lock_timeout', '200ms', true);
        ALTER TABLE $S.state ADD PRIMARY KEY (version);
    EXCEPTION WHEN lock_not_available THEN NULL;
    END;
    PERFORM set_config('lock_timeout', '3s', true);
    -- Nothing is forgotten while some may still append as revision 1 did.
    UPDATE $S.state SET swept = clock_timestamp();
END IF;

-- revision: what is here beyond `state.version`; releases that need less of it go on.
-- identity: of this schema. deleted: the highest seq that was its channel's newest
-- event when it was deleted; no later one shows that to who has not seen it.
CREATE TABLE $S.upkeep (
    revision integer PRIMARY KEY, identity uuid NOT NULL, deleted bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
INSERT INTO $S.upkeep VALUES ($REVISION, gen_random_uuid(), 0);
-- Rights that roles were given before suffice: they need USAGE of the schema.
GRANT SELECT ON $S.upkeep TO PUBLIC;

-- Which database of which server this is: a copy of it is another one, of the whole
-- server too. It asks for nothing that needs a right.
CREATE FUNCTION $S.identity() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    RETURN (SELECT concat_ws('/', u.identity, d.oid,
            (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint)
        FROM $S.upkeep u, pg_database d WHERE d.datname = current_database());
END $body$;
GRANT EXECUTE ON FUNCTION $S.identity() TO PUBLIC;

CREATE FUNCTION $S.note_deleted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c_seq bigint;
BEGIN
    SELECT max(d.seq) INTO c_seq FROM (
        SELECT g.channel, max(g.off) AS off, max(g.seq) AS seq
        FROM gone g GROUP BY g.channel) d
    WHERE NOT EXISTS (
        SELECT FROM $S.event e WHERE e.channel = d.channel AND e.off > d.off);
    UPDATE $S.upkeep SET deleted = c_seq WHERE deleted < c_seq;
    RETURN NULL;
END $body$;
REVOKE EXECUTE ON FUNCTION $S.note_deleted() FROM PUBLIC;
CREATE TRIGGER note_deleted AFTER DELETE ON $S.event REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION $S.note_deleted();

-- For who was in the middle of revision 1's `append` when this came: he has passed its
-- lock. Of this revision only a channel's first event comes here; and who deletes
-- channels by hand, who is to have this lock before those of their rows.
CREATE FUNCTION $S.take_turn() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    PERFORM FROM $S.state FOR UPDATE;
    RETURN NULL;
END $body$;
CREATE TRIGGER take_turn BEFORE INSERT OR DELETE ON $S.channel
    FOR EACH STATEMENT EXECUTE FUNCTION $S.take_turn();

-- Where channels are forgotten, who knows that they were empty may have missed events.
CREATE FUNCTION $S.renew_epoch() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF NOT EXISTS (SELECT FROM gone) THEN RETURN NULL; END IF;
    END IF;
    UPDATE $S.state SET epoch =
        ('x' || left(gen_random_uuid()::text, 8))::bit(32)::bigint;
    RETURN NULL;
END $body$;
REVOKE EXECUTE ON FUNCTION $S.renew_epoch() FROM PUBLIC;
CREATE TRIGGER channels_deleted AFTER DELETE ON $S.channel REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION $S.renew_epoch();
CREATE TRIGGER channels_truncated AFTER TRUNCATE ON $S.channel
    FOR EACH STATEMENT EXECUTE FUNCTION $S.renew_epoch();

CREATE OR REPLACE FUNCTION $S.append(
    a_channel text, a_data bytea, a_capacity bigint, a_max_age double precision
) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c_seq bigint;
    c_last bigint;
    c_prev bigint;
    -- Not random(): setseed() of the session would make its ids those of another.
    c_nonce bigint := ('x' || left(gen_random_uuid()::text, 8))::bit(32)::bigint;
    c_epoch bigint;
    c_ts timestamptz;
    c_names text[];
    c_lock_timeout text;
BEGIN
    -- Held until the commit is visible, so all that follows is in its order. No lock
    -- of a name that any role of the database may take.
    SELECT s.epoch INTO STRICT c_epoch FROM $S.state s FOR UPDATE;
    c_ts := clock_timestamp();
    -- There may be a row that was inserted by hand beyond the head: it is passed.
    UPDATE $S.channel SET last = greatest(last,
            (SELECT max(e.off) FROM $S.event e WHERE e.channel = a_channel)) + 1,
        prev = nonce, nonce = c_nonce, ts = greatest(ts, c_ts)
        WHERE name = a_channel RETURNING last, prev, ts INTO c_last, c_prev, c_ts;
    IF NOT FOUND THEN
        -- Its events may still be there, if somebody has deleted the channel alone.
        SELECT coalesce(max(e.off), 0) + 1 INTO c_last FROM $S.event e
            WHERE e.channel = a_channel;
        c_prev := c_epoch;
        c_ts := clock_timestamp();
        INSERT INTO $S.channel (name, last, prev, nonce, ts)
            VALUES (a_channel, c_last, c_prev, c_nonce, c_ts);
    END IF;
    -- seq is above all that was told: a copy of a sequence may be behind, or set back.
    -- Within this statement that costs a third of what it does before it (measured).
    INSERT INTO $S.event (seq, channel, off, nonce, prev, ts, data)
        SELECT greatest(nextval('$S.event_seq'),
                (SELECT max(e.seq) FROM $S.event e) + 1,
                (SELECT u.deleted FROM $S.upkeep u) + 1),
            a_channel, c_last, c_nonce, c_prev, c_ts, a_data
        RETURNING seq INTO c_seq;
    -- Readers leave out what is too much or too old; here it makes room, in batches.
    -- Who has deleted rows and not committed is not waited for, with all publishers,
    -- and might himself wait for the lock that is held here: the next one makes room.
    -- So does it after a transaction whose snapshot is older than a deletion.
    IF c_last % 32 = 0 OR c_seq % 32 = 0 THEN
        c_lock_timeout := current_setting('lock_timeout');
        BEGIN
            PERFORM set_config('lock_timeout', '10ms', true);
            IF c_last % 32 = 0 THEN
                DELETE FROM $S.event WHERE channel = a_channel AND off IN (
                    SELECT e.off FROM $S.event e
                    WHERE e.channel = a_channel AND e.off <= c_last - a_capacity
                    ORDER BY e.off LIMIT 1000);
            END IF;
            IF c_seq % 32 = 0 AND a_max_age IS NOT NULL THEN
                DELETE FROM $S.event WHERE seq IN (
                    SELECT e.seq FROM $S.event e ORDER BY e.seq LIMIT 64)
                    AND ts < clock_timestamp() - a_max_age * interval '1 second';
            END IF;
            -- Channels that are idle for long are forgotten.
            IF c_seq % 1024 = 0 AND a_max_age IS NOT NULL THEN
                UPDATE $S.state SET swept = clock_timestamp()
                    WHERE swept NOT BETWEEN clock_timestamp() - interval '1 hour'
                        AND clock_timestamp();
                IF FOUND THEN
                    SELECT array_agg(name) INTO c_names FROM (
                        SELECT c.name FROM $S.channel c WHERE c.ts < clock_timestamp()
                            - greatest(2 * a_max_age, 86400) * interval '1 second'
                        LIMIT 10000) idle;
                    IF c_names IS NOT NULL THEN
                        DELETE FROM $S.event WHERE channel = ANY (c_names);
                        DELETE FROM $S.channel WHERE name = ANY (c_names);
                    END IF;
                END IF;
            END IF;
            PERFORM set_config('lock_timeout', c_lock_timeout, true);
        EXCEPTION WHEN lock_not_available OR serialization_failure THEN NULL;
        END;
    END IF;
    -- Empty: those of a transaction become one, and 8000 bytes are the limit.
    PERFORM pg_notify('$S', '');
    RETURN to_hex(c_last) || '-' || lpad(to_hex(c_nonce), 8, '0');
END $body$;

CREATE OR REPLACE FUNCTION $S.publish(
    a_channels text[], a_data bytea[], a_capacity bigint, a_max_age double precision
) RETURNS SETOF text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT u.channel, u.data
        FROM unnest(a_channels, a_data) WITH ORDINALITY AS u (channel, data, place)
        ORDER BY u.place
    LOOP
        RETURN NEXT $S.append(c.channel, c.data, a_capacity, a_max_age);
    END LOOP;
END $body$;

-- Appends what a transaction has published, at its very end: after the other deferred
-- triggers of its commit, since a foreign key's may wait long for somebody's row, and
-- all publishers would wait behind it. So the first row that fires inserts another one,
-- whose own trigger comes after all that are due by then.
--
-- SET CONSTRAINTS ALL IMMEDIATE, which Django's TestCase says, too, fires this before
-- the commit. What is inserted fires at once then, which tells; one that is deferred
-- again waits for the commit.
--
-- The setting is the transaction's: the id of the last row, in a commit; "wait" for the
-- commit; "ask" and its answer "early" meanwhile.
CREATE OR REPLACE FUNCTION $S.commit_outbox() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
    c_state text := coalesce(current_setting('$S.outbox', true), '');
    c_id bigint;
    c record;
BEGIN
    IF c_state = NEW.id::text THEN
        FOR c IN WITH own AS (DELETE FROM $S.outbox RETURNING *)
            SELECT * FROM own WHERE capacity >= 0 ORDER BY id
        LOOP
            PERFORM $S.append(c.channel, c.data, c.capacity, c.max_age);
        END LOOP;
        PERFORM set_config('$S.outbox', '', true);
    ELSIF c_state = 'ask' THEN
        PERFORM set_config('$S.outbox', 'early', true);
    ELSIF c_state = '' OR c_state = 'wait' AND NEW.capacity < 0 THEN
        PERFORM set_config('$S.outbox', 'ask', true);
        INSERT INTO $S.outbox (channel, data, capacity) VALUES ('', '', -1)
            RETURNING id INTO c_id;
        IF current_setting('$S.outbox') = 'early' THEN
            SET CONSTRAINTS $S.commit_outbox DEFERRED;
            INSERT INTO $S.outbox (channel, data, capacity) VALUES ('', '', -1);
            PERFORM set_config('$S.outbox', 'wait', true);
        ELSE
            PERFORM set_config('$S.outbox', c_id::text, true);
        END IF;
    END IF;
    RETURN NULL;
END $body$;

-- Returns the head's off and nonce; then what follows an id, if its event is kept or
-- the one after it, else all that is kept. Stable: all of it is of one moment. Rows
-- that a policy hides would look as if they were deleted: that is an error.
CREATE OR REPLACE FUNCTION $S.read(
    a_channel text, a_off bigint, a_nonce bigint, a_limit integer, a_capacity bigint,
    a_max_age double precision
) RETURNS TABLE (r_off bigint, r_nonce bigint, r_prev bigint, r_data bytea)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET row_security = off
AS $body$
DECLARE
    c_since timestamptz := coalesce(
        clock_timestamp() - a_max_age * interval '1 second', '-infinity');
    c_after bigint;
BEGIN
    SELECT coalesce(c.last, 0), coalesce(c.nonce, s.epoch) INTO STRICT r_off, r_nonce
        FROM $S.state s LEFT JOIN $S.channel c ON c.name = a_channel;
    RETURN NEXT;
    IF a_off IS NULL OR (a_off = r_off AND a_nonce = r_nonce) THEN RETURN; END IF;
    c_after := greatest(r_off - a_capacity, 0);
    IF a_off >= c_after AND EXISTS (
        SELECT FROM $S.event e WHERE e.channel = a_channel
            AND (e.off = a_off AND e.nonce = a_nonce
                OR e.off = a_off + 1 AND e.prev = a_nonce AND e.ts > c_since))
    THEN
        c_after := a_off;
    END IF;
    RETURN QUERY SELECT p.off, p.nonce, p.prev, p.data FROM (
        SELECT e.off, e.nonce, e.prev, e.data, row_number() OVER w AS place,
            sum(octet_length(e.data)) OVER w AS size
        FROM (
            SELECT * FROM $S.event v
            WHERE v.channel = a_channel AND v.off > c_after AND v.ts > c_since
            ORDER BY v.off LIMIT a_limit) e
        WINDOW w AS (ORDER BY e.off)
    ) p WHERE p.place = 1 OR p.size <= 8388608 ORDER BY p.off;
END $body$;

-- Returns what stands for the file of the events and the server, another one after each
-- TRUNCATE, restore and failover, and what was deleted; then what follows a seq, of all
-- channels; data only of those that are wanted, and not too much of it.
CREATE OR REPLACE FUNCTION $S.tail(
    a_seq bigint, a_limit integer, a_names text[], a_prefixes text[]
) RETURNS TABLE (r_seq bigint, r_channel text, r_off bigint, r_nonce bigint,
    r_prev bigint, r_data bytea)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET row_security = off
AS $body$
BEGIN
    r_seq := hashtextextended(concat_ws('/', pg_relation_filenode('$S.event'),
        extract(epoch FROM pg_postmaster_start_time())), 0);
    SELECT u.deleted INTO STRICT r_off FROM $S.upkeep u;
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
            FROM $S.event v WHERE v.seq > a_seq ORDER BY v.seq LIMIT a_limit) e
        WINDOW w AS (ORDER BY e.seq)
    ) p ORDER BY p.seq;
END $body$;

IF c_is_new THEN
    CREATE CONSTRAINT TRIGGER commit_outbox AFTER INSERT ON $S.outbox
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
        EXECUTE FUNCTION $S.commit_outbox();
END IF;
PERFORM set_config('lock_timeout', c_lock_timeout, true);
END $install$
