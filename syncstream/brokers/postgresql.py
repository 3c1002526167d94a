"""``postgresql:``, a database that you have: channels of all who connect to it.

Events are rows. They are numbered while a row is locked until the commit is visible
(ids drawn from a sequence become visible out of order, and readers that go by them
lose some: measured). Ids are ``<number>-<nonce>`` in hexadecimal digits; numbers are
of the channel and without holes, and a row names the nonce before its own: the chain.

What is published with a ``connection=`` goes into a table that is empty outside of
transactions; a deferred trigger appends it at the commit. Rolled back, it never was;
and an open transaction holds nothing that others wait for.

What was deleted before a process had read it, and is its channel's newest, leaves no
trace in the chain until there is a newer one: a trigger notes how far deletions went,
and who is behind that has all read anew.

A process has one connection that listens. ``NOTIFY`` says that there is something,
not what: the listener reads the table from where it was, and does so every two seconds
anyway, and after a reconnect. So nothing hangs on a notification.

All that may block runs in native threads; greenlets wait for them (`gevent`'s
thread pool). Only psycopg's ``pq``, libpq itself, is used: its own waits would hold up
a hub if psycopg was imported before gevent has patched.

``python -m syncstream.brokers.postgresql [--sql] [URL]`` installs the schema, or prints
it. What a role needs that only uses it is in docs/brokers.md.
"""

from __future__ import annotations

import _queue
import _thread
import logging
import os
import re
import select
import socket
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from inspect import iscoroutinefunction
from random import SystemRandom
from typing import Any, Literal, TypeVar

from .. import waiting
from ..arguments import Parser
from ..clock import time
from ..errors import BrokerError, Denied, PayloadTooLarge, Unavailable, Uncertain
from ..log import Entry, Page
from ..sockets import native
from ..waiting import LONGEST, say
from . import Sink, check_bounds, is_pattern, matches, shown

try:
    from psycopg import Error as DriverError
except ImportError as error:
    raise ImportError(
        "postgresql: needs the package psycopg:"
        " pip install 'syncstream-wsgi[postgresql]'"
    ) from error
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

__all__ = ["PostgreSQLBroker", "install", "install_sql"]

log = logging.getLogger(__name__)

T = TypeVar("T")

VERSION = 1  # of the schema: who needs another one cannot use it
REVISION = 2  # what else it has by now: who needs less of it can

READ_TIMEOUT = 5.0  # seconds, also to connect, and for the listener's answers
IDLE = 30.0  # seconds after which a connection that nobody has used is closed
HEARTBEAT = 2.0  # seconds between two looks of the listener, notified or not
BACKOFF = 0.05, 2.0  # seconds before it connects again: first, and at most
FRESH = 1.0  # seconds for which a connection that was used is not asked if it lives
TAIL = 500  # rows that the listener reads at once
_MAX_NAMES = 500  # that it asks for by name; beyond that it reads all
_MAX_BATCH = 64 << 20  # bytes published at once: they are sent as twice as many

_ID = re.compile(r"([0-9a-f]{1,15})-([0-9a-f]{8})")
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,49}")
_PORTS = re.compile(r"[0-9,]*")

# Neither the application's random numbers, which it may have seeded, nor those of the
# process that forked: workers of one seed would all look at the same moments.
_jitter = SystemRandom().uniform

# Of one statement, so that any driver runs it, in whatever transaction. Everything is
# named with its schema, and functions look nowhere else: search_path does not matter.
#
# It makes the schema, or makes it anew of revision 1, which had no table `upkeep`.
# Workers of both use it meanwhile: what these call keeps its name, arguments and
# columns, and nothing waits for a transaction that is open (`outbox`) or a dump.
_INSTALL = """\
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
END $install$"""


def install_sql(schema: str = "syncstream") -> str:
    """Return the one statement that installs the schema; where it is, it does nothing.

    Args:
        schema: Its name.

    Raises:
        ValueError: That is no plain lower-case name.
    """
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(
            "schema must be lower-case letters, digits and _, 50 at most, got"
            f" {schema!r}"
        )
    sql = _INSTALL.replace("$S", schema).replace("$VERSION", str(VERSION))
    return sql.replace("$REVISION", str(REVISION))


def install(dsn: str = "", *, schema: str = "syncstream") -> None:
    """Install the schema, or make it this release's, by a role that may.

    Where it is that already, nothing happens. Workers of the release before go on.

    Args:
        dsn: As for `PostgreSQLBroker`.
        schema: Its name.

    Raises:
        Unavailable: The server cannot be reached, or refuses.
    """
    sql = install_sql(schema)
    deadline = time.monotonic() + 4 * READ_TIMEOUT
    try:
        connection = _Connection.open(_dsn(dsn), deadline)
        try:
            connection.run(sql, deadline=deadline)
            _identity(connection, schema, deadline)
        finally:
            connection.close()
    except (_Lost, _Refused) as error:
        raise Unavailable(f"the schema {schema!r} is not installed: {error}") from error


class PostgreSQLBroker:
    """Events in a PostgreSQL database.

    Args:
        dsn: A ``postgresql://`` URL or ``key=value`` words, as libpq takes them;
            ``""`` for what its environment variables (``PGHOST`` …) say.
        capacity: So many events of each channel are kept. It and ``max_age`` should
            be the same wherever the same schema is used.
        max_age: Events are kept for so many seconds; ``None`` for no limit. Channels
            that are idle for two times that, and a day, are forgotten.
        listen_dsn: Where to listen, if ``dsn`` leads to a pooler that shares
            connections (PgBouncer with ``pool_mode = transaction``): the server itself.
        schema: Where its tables are.
        create: Install the schema when it is missing, or of an older release.
        publish_timeout: Seconds that `publish` takes at most.
        connections: So many at most publish and read, in each process, beside the one
            that listens.
    """

    scope: Literal["cluster"] = "cluster"

    def __init__(
        self,
        dsn: str = "",
        capacity: int = 1000,
        max_age: float | None = 3600.0,
        *,
        listen_dsn: str | None = None,
        schema: str = "syncstream",
        create: bool = True,
        publish_timeout: float = 2.0,
        connections: int = 4,
    ) -> None:
        install_sql(schema)  # checks its name
        check_bounds(capacity, max_age)
        if not publish_timeout > 0:
            raise ValueError(f"publish_timeout must be above 0, got {publish_timeout}")
        if not isinstance(connections, int) or connections < 1:
            raise ValueError(f"connections must be 1 or more, got {connections!r}")
        self._dsn = _dsn(dsn)
        self._listen_dsn = self._dsn if listen_dsn is None else _dsn(listen_dsn)
        self._capacity = capacity
        self._max_age = max_age
        self._schema = schema
        self._create = create
        self._publish_timeout = min(publish_timeout, LONGEST)
        self._connections = connections
        self._sink: Sink | None = None
        self._watched: set[str] = set()
        self._patterns: frozenset[str] = frozenset()
        self._owns: dict[int, _Own] = {}
        self._is_up = True  # as the sink was told, here or in the parent of a fork
        self._is_closing = False  # nobody begins to listen any more
        self._is_closed = False

    # What a process has: nothing that was open before a fork is touched after it.

    def _own(self) -> _Own:
        pid = os.getpid()
        own = self._owns.get(pid)
        if own is None:
            own = self._owns.setdefault(pid, _Own(self._connections))
            if self._watched or self._patterns:
                # Those of the process that forked: what came since was not told.
                self._listener(own, is_late=True)
        return own

    def _listener(self, own: _Own, is_late: bool = False) -> _Listener | None:
        """Return who listens in this process; ``None``: the broker is closed."""
        with own.lock:
            if own.listener is None and not self._is_closing:
                stop, stopper = os.pipe()
                own.stopper = _Stopper(stopper)
                own.listener = _Listener(self, stop, is_late)
            return own.listener

    def _call(self, own: _Own, function: Callable[[], T], deadline: float) -> T:
        """Call what may block: in this thread, or for a greenlet in another one."""
        if self._is_closed:
            raise Unavailable("the broker is closed")
        hub = waiting.hub()
        if hub is None:
            return function()
        threads, places = own.threads(hub)
        if not places.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Unavailable(self._busy)
        try:
            value, error = threads.apply(_outcome, (function,))
        finally:
            places.release()
        if error is not None:
            raise error
        result: T = value
        return result

    @property
    def _busy(self) -> str:
        return f"all {self._connections} connections were busy for all of its time"

    def _judge(self, own: _Own, *ways: str, reason: str = "") -> None:
        """Take note of what works, or by a reason does not; tell of a change.

        Args:
            ways: "listen", "connect" for calls, and by their names what the server has
                refused to them.
        """
        with own.judging:
            for way in ways:
                if reason:
                    own.failing.add(way)
                else:
                    own.failing.discard(way)
            is_up = not own.failing
            if is_up == self._is_up or self._sink is None:
                return
            self._is_up = is_up
            try:
                self._sink.state(is_up, reason or "it serves all that is asked")
            except Exception as error:  # ours goes on, whoever is told
                say(log, logging.ERROR, "the sink has failed", error=error)

    # To publish.

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """See `syncstream.brokers.Broker.publish`.

        Args:
            items: Channel and payload of each.
            connection: Django's, psycopg's or psycopg2's: they are stored when its
                transaction commits, and only then. Its driver's errors are raised as
                they are: they end that transaction. One that is not READ COMMITTED may
                fail at its commit, as it does for any row that others have changed:
                what others have published to the channel since it began.

        Raises:
            ValueError: The connection is to another database than the broker's, or no
                triggers fire in it.
            Denied: The role may not publish, or not to this channel.
        """
        size = sum(len(payload) for _, payload in items)
        if size > _MAX_BATCH:
            raise PayloadTooLarge(
                f"events must have {_MAX_BATCH} bytes together at most, got {size}"
            )
        if not items:
            return []
        own = self._own()
        deadline = time.monotonic() + self._publish_timeout
        if connection is not None:
            self._check_connection(connection)
            self._call(own, partial(self._check_installed, own, deadline), deadline)
            if not self._enlist(items, connection, own.identity):
                # Unless the broker's own is another one by now: a failover, a restore.
                was, own.is_installed = own.identity, False
                self._call(own, partial(self._check_installed, own, deadline), deadline)
                is_same = was == own.identity
                if is_same or not self._enlist(items, connection, own.identity):
                    raise ValueError(
                        "connection must be one to the hub's database, and not with"
                        " session_replication_role = replica: nothing was stored"
                    )
            return [None] * len(items)
        return self._call(own, partial(self._publish, own, items, deadline), deadline)

    def _publish(
        self, own: _Own, items: Sequence[tuple[str, bytes]], deadline: float
    ) -> list[str | None]:
        with self._lent(own, deadline) as connection:
            left = deadline - time.monotonic()
            if left < self._publish_timeout / 4:
                # Rather this than an answer that comes too late.
                raise Unavailable("the time was over before it could be sent")
            sql = self._publish_sql(items, left)
            results: Sequence[Any]
            try:
                results = connection.run(sql, deadline=deadline)
            except _Refused as error:
                if error.sqlstate in (_DENIED, *_UNNAMEABLE):
                    raise Denied(f"not published: {error}") from error
                way = "connect" if error.is_fatal else "publish"
                self._judge(own, way, reason=f"not published: {error}")
                # A server that stops may say so after the commit; others roll back.
                kind = Uncertain if error.is_fatal else Unavailable
                raise kind(f"not published: {error}") from error
            except _Lost as error:
                results = error.results
                if not any(r.command_status == b"COMMIT" for r in results):
                    self._judge(own, "connect", reason=f"no answer: {error}")
                    raise Uncertain(f"no answer: {error}") from error
            self._judge(own, "connect", "publish")
        (found,) = (r for r in results if r.status == pq.ExecStatus.TUPLES_OK)
        return [found.get_value(row, 0).decode() for row in range(found.ntuples)]

    def _publish_sql(self, items: Sequence[tuple[str, bytes]], seconds: float) -> str:
        # One message for all of it: who stalls or dies in the middle of sending holds
        # no lock. Hexadecimal digits need no quoting, whatever the server's settings.
        channels = ",".join(
            f"convert_from(decode('{name.encode().hex()}','hex'),'UTF8')"
            for name, _ in items
        )
        data = ",".join(f"decode('{payload.hex()}','hex')" for _, payload in items)
        # Its own limit is the shorter one: it answers "not done" rather than nothing.
        limit = max(1, int(seconds * 700))
        return (
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
            f"SET LOCAL statement_timeout = {limit};"
            f"SELECT {self._schema}.publish(ARRAY[{channels}],ARRAY[{data}],"
            f"{self._capacity},{_sql(self._max_age)});COMMIT"
        )

    def _check_connection(self, connection: Any) -> None:
        if not callable(getattr(connection, "cursor", None)):
            raise TypeError(
                "connection must be Django's, psycopg's or psycopg2's, got"
                f" {type(connection)!r}"
            )
        vendor = getattr(connection, "vendor", "postgresql")  # Django's have one
        if vendor != "postgresql":
            raise ValueError(f"connection must be to a PostgreSQL, got {vendor!r}")

    def _enlist(
        self, items: Sequence[tuple[str, bytes]], connection: Any, identity: str
    ) -> bool:
        """Store events in a transaction; ``False``: it is another database's."""
        cursor = connection.cursor()
        if iscoroutinefunction(cursor.execute):  # it would do nothing, unawaited
            raise TypeError(f"connection must not be async, got {type(connection)!r}")
        try:
            # One statement: all or nothing of it, outside of a transaction too, and
            # nothing in another database. Hexadecimal digits suit any driver.
            cursor.execute(
                f"INSERT INTO {self._schema}.outbox (channel, data, capacity, max_age)"
                " SELECT new.channel, decode(new.data, 'hex'), %s::bigint,"
                " %s::double precision FROM unnest(%s::text[], %s::text[])"
                " WITH ORDINALITY AS new (channel, data, place)"
                f" WHERE {self._schema}.identity() = %s"
                # Or nothing would take it out of there.
                " AND current_setting('session_replication_role') <> 'replica'"
                " ORDER BY place RETURNING 1",
                [
                    *(self._capacity, self._max_age),
                    _array([channel for channel, _ in items]),
                    _array([payload.hex() for _, payload in items]),
                    identity,
                ],
            )
            # A pipeline of psycopg knows no count yet.
            return bool(cursor.fetchall())
        except Exception as error:
            if _sqlstate(error) in _MISSING:
                raise Unavailable(
                    f"the database of this connection has no schema {self._schema!r}:"
                    f" is it the one of the hub? {_HOW_TO}"
                ) from error
            raise
        finally:
            cursor.close()

    # To read.

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """See `syncstream.brokers.Broker.read`; of long entries it returns fewer."""
        own = self._own()
        deadline = time.monotonic() + READ_TIMEOUT
        read = partial(self._read, own, channel, after, limit, deadline)
        return self._call(own, read, deadline)

    def _read(
        self, own: _Own, channel: str, after: str | None, limit: int, deadline: float
    ) -> Page:
        found = None if after is None else _ID.fullmatch(after)
        off, nonce = (int(found[1], 16), int(found[2], 16)) if found else (-1, 0)
        place = None if after is None else off
        words = (channel, place, nonce, limit, self._capacity, self._max_age)
        sql = f"SELECT * FROM {self._schema}.read($1, $2, $3, $4, $5, $6)"
        result = self._ask(own, sql, words, deadline)
        now = time.monotonic()
        entries = []
        head = _id(*(_number(result, 0, column) for column in (0, 1)))
        for row in range(1, result.ntuples):
            number, nonce, prev = (_number(result, row, column) for column in range(3))
            payload = result.get_value(row, 3) or b""
            ids = _id(number, nonce), _id(number - 1, prev)
            entries.append(Entry(*ids, payload, now))
        first = entries[0].prev if entries else head
        return Page(entries, after is None or after == first, head)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before the newest events of a channel, and its head's.

        Args:
            channel: Its name.
            count: Of so many of them, or all that are kept. None of them is read.

        Raises:
            Unavailable: As from `read`.
        """
        own = self._own()
        deadline = time.monotonic() + READ_TIMEOUT
        newest = partial(self._newest, own, channel, count, deadline)
        return self._call(own, newest, deadline)

    def _newest(
        self, own: _Own, channel: str, count: int, deadline: float
    ) -> tuple[str, str]:
        sql = (
            # The function gives the head alone; it refuses where rows may be hidden.
            "SELECT h.r_off, h.r_nonce, e.off - 1, e.prev"
            f" FROM {self._schema}.read($1, -1, 0, 0, $3::bigint, $4) h"
            f" LEFT JOIN LATERAL (SELECT v.off, v.prev FROM {self._schema}.event v"
            " WHERE v.channel = $1 AND v.off > h.r_off - $3::bigint"
            " AND v.ts > coalesce(clock_timestamp()"
            " - $4::double precision * interval '1 second', '-infinity')"
            " ORDER BY v.off DESC LIMIT $2::bigint) e ON true ORDER BY e.off LIMIT 1"
        )
        words = (channel, count, self._capacity, self._max_age)
        result = self._ask(own, sql, words, deadline)
        head = _id(*(_number(result, 0, column) for column in (0, 1)))
        if result.get_value(0, 2) is None:
            return head, head
        return _id(*(_number(result, 0, column) for column in (2, 3))), head

    def _ask(
        self, own: _Own, sql: str, words: Sequence[object], deadline: float
    ) -> Any:
        """Return the answer to a statement that changes nothing."""
        for attempt in (1, 2):
            try:
                with self._lent(own, deadline) as connection:
                    (result,) = connection.run(sql, words, deadline=deadline)
                break
            except (_Refused, _Lost) as error:
                if isinstance(error, _Refused) and error.sqlstate in _UNNAMEABLE:
                    raise Denied(f"not read: {error}") from error
                # A connection that broke: nothing is lost by another try.
                if attempt == 2 or time.monotonic() >= deadline:
                    is_refused = isinstance(error, _Refused) and not error.is_fatal
                    way = "read" if is_refused else "connect"
                    self._judge(own, way, reason=f"not read: {error}")
                    raise Unavailable(f"not read: {error}") from error
        self._judge(own, "connect", "read")
        return result

    # To tell.

    def attach(self, sink: Sink) -> None:
        self._sink = sink

    def watch(self, channel: str) -> None:
        """See `syncstream.brokers.Broker.watch`.

        While the server cannot be reached it returns, too: when it is back, all is
        read that may have come.
        """
        own = self._own()
        with own.lock:
            if is_pattern(channel):
                self._patterns = self._patterns | {channel}
            else:
                self._watched.add(channel)
        listener = self._listener(own)
        # Without one the broker is closed: the read that follows says so.
        if listener is not None and not listener.is_decided:
            deadline = time.monotonic() + READ_TIMEOUT
            self._call(own, listener.await_decided, deadline)

    def unwatch(self, channel: str) -> None:
        with self._own().lock:
            self._patterns = self._patterns - {channel}
            self._watched.discard(channel)

    def close(self, timeout: float = 5.0) -> None:
        self._is_closing = True
        own = self._owns.get(os.getpid())
        if own is None or self._is_closed:
            self._is_closed = True
            return
        with own.lock:
            listener, own.listener = own.listener, None
            stopper, own.stopper = own.stopper, None
        if listener is not None and stopper is not None:
            stopper.stop()
            with suppress(Unavailable):  # all are busy: it ends by itself
                deadline = time.monotonic() + timeout
                self._call(own, partial(listener.await_end, timeout), deadline)
        self._is_closed = True
        own.close()

    # Connections that publish and read.

    @contextmanager
    def _lent(self, own: _Own, deadline: float) -> Iterator[_Connection]:
        """Lend a connection; it is kept if nothing went wrong with it."""
        try:
            own.permits.get(True, max(0.0, deadline - time.monotonic()))
        except _queue.Empty:
            raise Unavailable(self._busy) from None
        try:
            connection = self._ready(own, deadline)
            is_sound = False
            try:
                yield connection
                is_sound = True
            finally:
                if is_sound and connection.is_idle() and not self._is_closed:
                    own.keep(connection)
                else:
                    connection.close()
                    own.is_installed = False  # or is it gone?
        finally:
            own.permits.put(None)

    def _ready(self, own: _Own, deadline: float) -> _Connection:
        try:
            connection = _living(own, deadline)
            if connection is None:
                connection = _Connection.open(self._dsn, deadline)
            if not own.is_installed:
                try:
                    own.identity = self._ensure(connection, deadline)
                except BaseException:
                    connection.close()
                    raise
                own.is_installed = True
        except (_Lost, _Refused) as error:
            reason = f"the server cannot be used: {error}"
            self._judge(own, "connect", reason=reason)
            raise Unavailable(reason) from error
        except BrokerError as error:
            self._judge(own, "connect", reason=str(error))
            raise
        return connection

    def _check_installed(self, own: _Own, deadline: float) -> None:
        if not own.is_installed:
            with self._lent(own, deadline):
                pass

    def _ensure(self, connection: _Connection, deadline: float) -> str:
        """Install the schema if it is missing or old; check it; return its identity."""
        try:
            return _identity(connection, self._schema, deadline)
        except _Refused as error:
            if error.sqlstate not in _MISSING:
                raise
            missing = error
        sql = f"SELECT to_regclass('{self._schema}.state') IS NOT NULL"
        (result,) = connection.run(sql, (), deadline=deadline)
        is_old = result.get_value(0, 0) == b"\1"
        what = (
            f"the schema {self._schema!r} in the database is of an older release"
            if is_old
            else f"there is no schema {self._schema!r} in the database"
        )
        if not self._create:
            raise Unavailable(f"{what}. {_HOW_TO}") from missing
        try:
            connection.run(install_sql(self._schema), deadline=deadline)
        except _Refused as error:
            if error.sqlstate != _DENIED:
                raise
            may = "renew" if is_old else "create"
            raise Unavailable(
                f"{what}, and this role may not {may} it: {error}. {_HOW_TO}"
            ) from error
        return _identity(connection, self._schema, deadline)


_MISSING = ("42P01", "3F000", "42883")  # no such table, schema, function
_DENIED = "42501"  # a right is missing, or a policy forbids it
_UNNAMEABLE = "22P05", "22021"  # the database's encoding has no such characters
_HOW_TO = (
    'Let a role that may install it: "python -m syncstream.brokers.postgresql URL", or'
    ' in Django "syncstream" in INSTALLED_APPS and "manage.py migrate"'
)


def _identity(connection: _Connection, schema: str, deadline: float) -> str:
    """Check that a schema can be used; return which one it is, of all databases."""
    sql = (
        f"SELECT s.version, u.revision, {schema}.identity()"
        f" FROM {schema}.state s, {schema}.upkeep u"
    )
    (result,) = connection.run(sql, (), deadline=deadline)
    version, revision = (
        _number(result, 0, column) if result.ntuples else None for column in (0, 1)
    )
    if version != VERSION or revision is None or revision < REVISION:
        raise Unavailable(
            f"the schema {schema!r} has version {version}, and this syncstream needs"
            f" {VERSION}: other processes may run another release of it"
        )
    identity: bytes = result.get_value(0, 2)
    return identity.decode()


class _Own:
    """What one process has of a broker."""

    def __init__(self, connections: int) -> None:
        self.lock = native(_thread, "allocate_lock")()
        self.listener: _Listener | None = None
        self.stopper: _Stopper | None = None
        # What does not work; see `PostgreSQLBroker._judge`.
        self.failing: set[str] = set()
        self.judging = native(_thread, "RLock")()
        self.idle: list[_Connection] = []  # the one last that was used last
        # The C one: gevent patches the name in `queue`, not this.
        self.permits: _queue.SimpleQueue[None] = _queue.SimpleQueue()
        for _ in range(connections):
            self.permits.put(None)
        self.is_installed = False
        self.identity = ""
        self._connections = connections
        self._threads: dict[Any, tuple[Any, Any]] = {}

    def threads(self, hub: Any) -> tuple[Any, Any]:
        """Return the threads that work for the greenlets of a hub, and their places.

        Who waits for a place has a time limit; who waits within the pool has none.
        """
        found = self._threads.get(hub)
        if found is None:
            from gevent.lock import Semaphore
            from gevent.threadpool import ThreadPool

            # One more than work at once: someone waits for the listener.
            count = self._connections + 1
            found = ThreadPool(count, hub), Semaphore(count)
            found = self._threads.setdefault(hub, found)
        return found

    def keep(self, connection: _Connection) -> None:
        """Keep a connection for whoever comes next."""
        connection.used = time.monotonic()
        with self.lock:
            self.idle.append(connection)
        self.release()

    def take(self) -> _Connection | None:
        with self.lock:
            return self.idle.pop() if self.idle else None

    def release(self, seconds: float = IDLE) -> None:
        """Close the connections that nobody has used for so long."""
        since = time.monotonic() - seconds
        while True:
            with self.lock:
                if not self.idle or self.idle[0].used > since:
                    return
                connection = self.idle.pop(0)
            connection.close()

    def close(self) -> None:
        self.release(0)
        self._end_threads(waiting.hub())

    def __del__(self) -> None:
        # Of a broker that nobody has closed: gevent keeps its threads for ever.
        if not sys.is_finalizing():
            self._end_threads(None)

    def _end_threads(self, here: Any) -> None:
        while self._threads:
            hub, (threads, _) = self._threads.popitem()
            if hub is here:
                threads.kill()
            elif hub.loop is not None:  # another thread's, when it next turns
                hub.loop.run_callback_threadsafe(threads.kill)


class _Stopper:
    """The end of a pipe that ends a listener, when it is closed, or forgotten."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def stop(self) -> None:
        """Have it end, without waiting for that."""
        # A process that was forked has the pipe open, too: closing would not do.
        with suppress(BrokenPipeError):  # it has ended by itself
            os.write(self._fd, b"x")

    def __del__(self) -> None:
        os.close(self._fd)


def _living(own: _Own, deadline: float) -> _Connection | None:
    """Return a connection that was kept and still lives."""
    while (connection := own.take()) is not None:
        if connection.is_readable():  # nobody asked it: it has ended
            connection.close()
            continue
        now = time.monotonic()
        if now - connection.used < FRESH:
            return connection
        # It may have died without a word; while nothing is sent that is no harm.
        try:
            connection.run("", deadline=now + (deadline - now) / 2)
        except (_Lost, _Refused):
            connection.close()
            own.release(0)  # as old as this one
            break
        return connection
    return None


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    # gevent prints the traceback of what a thread raises.
    try:
        return function(), None
    except BaseException as error:
        return None, error


class _Listener:
    """The thread of a process that hears what is new, and its connection.

    Attributes:
        is_decided: It listens, or its first attempt to has failed.
    """

    def __init__(self, broker: PostgreSQLBroker, stop: int, is_late: bool) -> None:
        # Who drops a broker without a close ends this, too: it is not kept.
        self._reference = weakref.ref(broker)
        self._dsn = broker._listen_dsn
        self._schema = broker._schema
        # Somebody counts on being told what has come before it listens.
        self._is_late = is_late
        self._place: tuple[int, int] | None = None  # seq and nonce of what was told
        self._seen = 0  # up to this seq all was told, or that it was deleted
        self._file = 0  # in which that is
        self._has_warned = False
        self.is_decided = False
        self._decided = native(_thread, "allocate_lock")()
        self._decided.acquire()
        self._ended = native(_thread, "allocate_lock")()
        self._ended.acquire()
        self._stop = stop
        native(_thread, "start_new_thread")(self._run, ())

    @property
    def _broker(self) -> PostgreSQLBroker:
        broker = self._reference()
        if broker is None:
            raise _Stopped
        return broker

    def await_decided(self) -> None:
        if self._decided.acquire(True, READ_TIMEOUT):
            self._decided.release()
        else:
            self._is_late = True

    def await_end(self, timeout: float) -> None:
        self._ended.acquire(True, timeout)

    def _run(self) -> None:
        try:
            failures = 0
            while True:
                began = time.monotonic()
                try:
                    self._listen()
                except (_Lost, _Refused, BrokerError) as error:
                    self._fail(str(error))
                except _Stopped:
                    raise
                except Exception as error:  # or it would be the end of all news
                    self._fail(repr(error))
                    text = "the listener has failed, and begins anew"
                    say(log, logging.ERROR, text, error=error)
                if time.monotonic() - began > 10 * BACKOFF[1]:
                    failures = 0
                self._decide()
                first, most = BACKOFF
                pause = min(most, first * 2 ** min(failures, 10))
                failures += 1
                _poll(self._stop, 0, _jitter(pause / 2, pause), self._stop)
        except _Stopped:
            pass
        finally:
            os.close(self._stop)
            self._decide()
            self._ended.release()

    def _decide(self) -> None:
        if not self.is_decided:
            self.is_decided = True
            self._decided.release()

    def _fail(self, reason: str) -> None:
        self._is_late = self._is_late or self._place is None
        broker = self._broker
        broker._judge(broker._own(), "listen", reason=reason)

    def _listen(self) -> None:
        deadline = time.monotonic() + READ_TIMEOUT
        connection = _Connection.open(self._dsn, deadline, stop=self._stop)
        try:
            self._broker._ensure(connection, deadline)
            connection.run(f"LISTEN {self._schema}", deadline=deadline)
            self._find_place(connection)
            self._tail(connection)
            self._decide()
            self._follow(connection)
        finally:
            connection.close()

    def _find_place(self, connection: _Connection) -> None:
        """Go on where we were; if that is not known any more, have all read anew."""
        sql = (
            f"SELECT u.deleted, e.seq, e.nonce, EXISTS (SELECT FROM {self._schema}"
            ".event p WHERE p.seq = $1 AND p.nonce = $2)"
            f" FROM {self._schema}.upkeep u LEFT JOIN (SELECT v.seq, v.nonce"
            f" FROM {self._schema}.event v ORDER BY v.seq DESC LIMIT 1) e ON true"
        )
        words = (None, None) if self._place is None else self._place
        deadline = time.monotonic() + READ_TIMEOUT
        (result,) = connection.run(sql, words, deadline=deadline)
        if self._place is not None and result.get_value(0, 3) == b"\1":
            self._seen = self._place[0]
            return
        was_late, self._is_late = self._is_late or self._place is not None, False
        newest = 0, 0
        if result.get_value(0, 1) is not None:
            newest = _number(result, 0, 1), _number(result, 0, 2)
        self._place = newest
        self._seen = max(newest[0], _number(result, 0, 0))
        sink = self._broker._sink
        if was_late and sink is not None:
            sink.resync(None)

    def _follow(self, connection: _Connection) -> None:
        unheard = 0  # times in a row
        while True:
            # Before it looks: what comes from now on is another notification.
            is_heard = connection.hear()
            while True:
                found = self._tail(connection)
                if not connection.hear():  # while it looked
                    break
                is_heard = True
            if is_heard:
                unheard = 0
            elif found:
                unheard += 1
            if unheard == 3 and not self._has_warned:
                self._has_warned = True
                say(
                    log,
                    logging.WARNING,
                    "events come without notifications: listen_dsn must lead to the"
                    " server itself, not to a pooler that shares connections",
                )
            self._broker._own().release()
            # All of one moment would look at one moment, ever after.
            pause = _jitter(0.8, 1.2) * HEARTBEAT
            connection.wait(select.POLLIN, time.monotonic() + pause, is_needed=False)

    def _tail(self, connection: _Connection) -> bool:
        """Tell all that is new; return whether there was something."""
        broker = self._broker
        sql = f"SELECT * FROM {self._schema}.tail($1, $2, $3, $4)"
        found = is_behind = False
        while True:
            assert self._place is not None
            words = (self._place[0], TAIL, *self._names(connection.is_utf8))
            deadline = time.monotonic() + READ_TIMEOUT
            (result,) = connection.run(sql, words, deadline=deadline)
            now = time.monotonic()
            file = _number(result, 0, 0)
            if file != self._file:
                # A seq of before means nothing in another one.
                if self._file:
                    self._find_place(connection)
                self._file = file
                continue
            # What was deleted meanwhile, and no newer event of its channel shows:
            # this process was frozen, or looks too seldom for its max_age.
            deleted = _number(result, 0, 2)
            is_behind = is_behind or deleted > self._seen
            for row in range(1, result.ntuples):
                channel = result.get_value(row, 1).decode(errors="replace")
                number, nonce, prev = (
                    _number(result, row, column) for column in (2, 3, 4)
                )
                if self._is_wanted(channel):
                    payload = result.get_value(row, 5)
                    if payload is None:
                        # Too much for one answer, or watched since it was asked for.
                        break
                    ids = _id(number, nonce), _id(number - 1, prev)
                    if broker._sink is not None:
                        broker._sink.deliver(channel, Entry(*ids, payload, now))
                self._place = _number(result, row, 0), nonce
                found = True
            else:
                if result.ntuples <= TAIL:
                    self._seen = max(self._place[0], deleted)
                    if is_behind and broker._sink is not None:
                        broker._sink.resync(None)
                    self._serves(broker, found)
                    return found

    def _serves(self, broker: PostgreSQLBroker, found: bool) -> None:
        ways = {"listen"}
        if self._dsn == broker._dsn:
            ways |= {"connect", "read"}
        if found:  # somebody could publish
            ways.add("publish")
        own = broker._own()
        if not broker._is_up or not ways.isdisjoint(own.failing):
            broker._judge(own, *ways)

    def _is_wanted(self, channel: str) -> bool:
        broker = self._broker
        return channel in broker._watched or any(
            matches(pattern, channel) for pattern in broker._patterns
        )

    def _names(self, is_utf8: bool) -> tuple[str, str]:
        """Return, as SQL arrays, the names and the prefixes of what is wanted."""
        broker = self._broker
        with broker._own().lock:
            patterns = broker._patterns
            names = list(broker._watched)
        # One name that another encoding has not, and the server would tell nothing.
        is_sendable = is_utf8 or all(name.isascii() for name in (*names, *patterns))
        if len(names) > _MAX_NAMES or not is_sendable:
            return "{}", '{""}'
        prefixes = [pattern[:-2] if len(pattern) > 1 else "" for pattern in patterns]
        return _array(names), _array(prefixes)


class _Stopped(Exception):
    """The listener is to end."""


class _Refused(Exception):
    """The server has answered by an error.

    Attributes:
        sqlstate: Its code.
        is_fatal: The server has ended the connection, too.
    """

    def __init__(self, message: str, sqlstate: str, is_fatal: bool) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.is_fatal = is_fatal


class _Lost(Exception):
    """The connection is broken, or there was no answer in time.

    Attributes:
        results: What had come by then.
    """

    def __init__(self, message: str, results: Sequence[Any] = ()) -> None:
        super().__init__(" ".join(message.split()))  # libpq's have several lines
        self.results = results


class _Connection:
    """A connection, of one native thread at a time; its waits have an end.

    Attributes:
        used: When it was used last, seconds of `time.monotonic`.
    """

    def __init__(self, pgconn: Any, stop: int) -> None:
        self._pgconn = pgconn
        self._stop = stop
        self.used = time.monotonic()

    @classmethod
    def open(cls, dsn: str, deadline: float, *, stop: int = -1) -> _Connection:
        """Connect.

        Args:
            dsn: As from `_dsn`.
            deadline: Seconds of `time.monotonic`.
            stop: A descriptor: when it can be read, all waits end by `_Stopped`.

        Raises:
            _Lost: That cannot be done.
        """
        reasons = []
        addresses = _addresses(dsn)
        for place, words in enumerate(addresses):
            left = deadline - time.monotonic()
            limit = time.monotonic() + left / (len(addresses) - place)
            try:
                return cls._open(make_conninfo(dsn, **words), limit, stop)
            except (_Lost, DriverError) as error:
                reasons.append(str(error))
        raise _Lost("; ".join(dict.fromkeys(reasons)) or "no address")

    @classmethod
    def _open(cls, dsn: str, deadline: float, stop: int) -> _Connection:
        pgconn = pq.PGconn.connect_start(dsn.encode())
        connection = cls(pgconn, stop)
        events = {
            pq.PollingStatus.READING: select.POLLIN,
            pq.PollingStatus.WRITING: select.POLLOUT,
        }
        try:
            while True:
                status = pq.PollingStatus(pgconn.connect_poll())
                if status == pq.PollingStatus.OK:
                    break
                if status not in events:
                    raise _Lost(_message(pgconn))
                connection.wait(events[status], deadline)
            pgconn.nonblocking = 1
            if connection._encoding == b"SQL_ASCII":  # it has names of any bytes
                connection.run("SET client_encoding = SQL_ASCII", deadline=deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def _encoding(self) -> bytes:
        found: bytes = self._pgconn.parameter_status(b"server_encoding") or b""
        return found

    @property
    def is_utf8(self) -> bool:
        """Its database has any name."""
        return self._encoding in (b"UTF8", b"SQL_ASCII")

    def run(
        self, sql: str, words: Sequence[object] | None = None, *, deadline: float
    ) -> list[Any]:
        """Have the server do something; return its answers.

        Args:
            sql: Statements; with words one, and the answer's values are binary.
            words: For ``$1`` and so on.

        Raises:
            _Refused: The server has answered by an error.
            _Lost: The connection broke, or the time is over; it is of no more use.
        """
        pgconn = self._pgconn
        results: list[Any] = []
        try:
            if words is None:
                pgconn.send_query(sql.encode())
            else:
                texts = [None if word is None else str(word).encode() for word in words]
                pgconn.send_query_params(sql.encode(), texts, result_format=1)
            while pgconn.flush():
                if self.wait(select.POLLIN | select.POLLOUT, deadline) & select.POLLIN:
                    pgconn.consume_input()
            while True:
                while pgconn.is_busy():
                    self.wait(select.POLLIN, deadline)
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is None:
                    break
                results.append(result)
        except DriverError as error:
            raise _Lost(str(error), results) from error
        except _Lost as error:
            error.results = results
            raise
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                self._refuse(result, results)
        return results

    def _refuse(self, result: Any, results: list[Any]) -> None:
        field = pq.DiagnosticField
        state = result.error_field(field.SQLSTATE)
        if not state:  # libpq's own: the connection has ended
            raise _Lost(result.error_message.decode(errors="replace"), results)
        message = result.error_field(field.MESSAGE_PRIMARY) or b""
        severity = result.error_field(field.SEVERITY_NONLOCALIZED)
        text = f"{message.decode(errors='replace')} ({state.decode()})"
        if state.decode() == _DENIED:
            text += "; docs/brokers.md has the rights that a role needs"
        raise _Refused(
            text,
            state.decode(),
            severity in (b"FATAL", b"PANIC"),
        )

    def hear(self) -> bool:
        """Take the notifications that are there; tell whether there were some."""
        try:
            self._pgconn.consume_input()
            found = False
            while self._pgconn.notifies() is not None:
                found = True
            return found
        except DriverError as error:
            raise _Lost(str(error)) from error

    def wait(self, events: int, deadline: float, *, is_needed: bool = True) -> int:
        """Wait until the socket can be read or written; return which.

        Args:
            is_needed: Raise when the time is over; else 0 is returned.
        """
        left = deadline - time.monotonic()
        found = _poll(self._pgconn.socket, events, left, self._stop)
        if not found and is_needed:
            raise _Lost("no answer in time")
        return found

    def is_readable(self) -> bool:
        try:
            return bool(_poll(self._pgconn.socket, select.POLLIN, 0))
        except DriverError:
            return True

    def is_idle(self) -> bool:
        """Tell whether it is outside of a transaction, and sound."""
        status: bool = self._pgconn.transaction_status == pq.TransactionStatus.IDLE
        return status

    def close(self) -> None:
        self._pgconn.finish()


def _poll(fd: int, events: int, seconds: float, stop: int = -1) -> int:
    """Wait natively, whatever gevent has patched; return what can be done now.

    Raises:
        _Stopped: The other one can be read.
    """
    poll = native(select, "poll")()
    poll.register(fd, events)
    if stop >= 0:
        poll.register(stop, select.POLLIN)
    found = dict(poll.poll(max(0.0, seconds) * 1000))
    if stop in found:
        raise _Stopped
    # POLLHUP and POLLERR: who reads learns what it is.
    return select.POLLIN | events if found.get(fd, 0) & ~events else found.get(fd, 0)


def _dsn(url: str) -> str:
    """Return a connection string for libpq, with what we add."""
    scheme, _, rest = url.partition(":")
    if scheme in ("postgresql", "postgres") and not rest.strip("/"):
        url = ""  # as libpq's environment says
    is_sound = True
    try:
        words = conninfo_to_dict(url)
    except (DriverError, UnicodeError):  # the latter's repr has all of it
        is_sound = False
    # A password with "@" or "/" in it is taken for a part of the host or the port, and
    # libpq quotes those, and what it cannot read: it is not shown, nor what it says.
    if (
        not is_sound
        or "@" in str(words.get("host", ""))
        or not _PORTS.fullmatch(str(words.get("port", "")))
    ):
        raise ValueError(
            "url must be as libpq takes it, postgresql://USER:PASSWORD@HOST/DATABASE or"
            " key=value words, with %40 for @ and %2F for / in a password, and libpq's"
            " options alone (PostgreSQLBroker has arguments for its own), got"
            f" {shown(url)}"
        )
    ours = {
        "application_name": os.environ.get("PGAPPNAME", "syncstream"),
        # A peer that is gone without a word.
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
    }
    if pq.version() >= 120000:  # libpq's
        ours["tcp_user_timeout"] = "20000"  # milliseconds for what was sent
    return make_conninfo("", **{**ours, **words, "client_encoding": "UTF8"})


def _addresses(dsn: str) -> list[dict[str, str]]:
    """Return what to add to a connection string, for each address to be tried.

    libpq would look names up while it holds the interpreter's lock, and stay at the
    first address that does not answer.
    """
    words: dict[str, Any] = conninfo_to_dict(dsn)
    hosts = str(words.get("host") or os.environ.get("PGHOST") or "")
    if not hosts or words.get("hostaddr") or os.environ.get("PGHOSTADDR"):
        return [{}]
    names = hosts.split(",")
    ports = str(words.get("port") or os.environ.get("PGPORT") or "5432").split(",")
    ports = ports * len(names) if len(ports) == 1 else ports
    found: list[dict[str, str]] = []
    reason: Exception | None = None
    for host, port in zip(names, ports, strict=False):
        if not host or host.startswith(("/", "@")):
            found.append({"host": host, "port": port})
            continue
        try:
            infos = native(socket, "getaddrinfo")(host, None, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # the latter: it can be no host's
            reason = error
            continue
        for address in dict.fromkeys(info[4][0] for info in infos):
            found.append({"host": host, "hostaddr": address, "port": port})
    if not found:
        raise _Lost(f"{hosts!r} cannot be found: {reason}") from reason
    return found


def _message(pgconn: Any) -> str:
    message: bytes = pgconn.error_message
    return message.decode(errors="replace") or "no reason is known"


def _sqlstate(error: BaseException | None) -> str | None:
    """Return the code of a driver's error, or of the one that Django has wrapped."""
    while error is not None:
        for name in ("sqlstate", "pgcode"):  # psycopg's, psycopg2's
            code = getattr(error, name, None)
            if isinstance(code, str):
                return code
        error = error.__cause__
    return None


def _id(number: int, nonce: int) -> str:
    return f"{number:x}-{nonce:08x}"


def _number(result: Any, row: int, column: int) -> int:
    """Return a binary integer of a result."""
    return int.from_bytes(result.get_value(row, column), "big", signed=True)


def _array(texts: Sequence[str]) -> str:
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return "{" + ",".join(f'"{text}"' for text in quoted) + "}"


def _sql(number: float | None) -> str:
    return "NULL" if number is None else repr(float(number))


def main() -> None:
    """Install the schema, or print it."""
    parser = Parser(
        prog="python -m syncstream.brokers.postgresql",
        description="Install the schema for Hub('postgresql:…').",
    )
    parser.add_argument(
        "url", nargs="?", default="", help="as of the hub; else PGHOST and so on say it"
    )
    parser.add_argument("--schema", default="syncstream", help="its name")
    parser.add_argument("--sql", action="store_true", help="print it, for psql")
    words = parser.parse_args()
    if words.sql:
        print(f"{install_sql(words.schema)};")
        return
    try:
        install(words.url, schema=words.schema)
    except (BrokerError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
