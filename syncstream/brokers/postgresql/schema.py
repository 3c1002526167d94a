"""The schema: its SQL, its versions and its installation."""

from __future__ import annotations

import re
from importlib.resources import files

from ...errors import Unavailable
from ...runtime.clock import time
from .connection import (
    DENIED,
    READ_TIMEOUT,
    Connection,
    Lost,
    Refused,
    number_of,
    parse_url,
)

__all__ = ["HOW_TO", "MISSING", "Schema", "install", "install_sql"]

VERSION = 1  # of the schema: who needs another one cannot use it
REVISION = 2  # what else it has by now: who needs less of it can
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,49}")

# Of one statement, so that any driver runs it, in whatever transaction. Everything is
# named with its schema, and functions look nowhere else: search_path does not matter.
#
# It makes the schema, or makes it anew of revision 1, which had no table `upkeep`.
# Workers of both use it meanwhile: what these call keeps its name, arguments and
# columns, and nothing waits for a transaction that is open (`outbox`) or a dump.
_INSTALL = files(__package__).joinpath("install.sql").read_text("utf-8").rstrip()


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
        connection = Connection.open(parse_url(dsn), deadline)
        try:
            connection.run(sql, deadline=deadline)
            check_schema(connection, schema, deadline)
        finally:
            connection.close()
    except (Lost, Refused) as error:
        raise Unavailable(f"the schema {schema!r} is not installed: {error}") from error


class Schema:
    """The schema that a broker uses.

    Args:
        name: Its name.
        create: Install it when it is missing, or of an older release.

    Raises:
        ValueError: The name is no plain lower-case one.
    """

    def __init__(self, name: str, create: bool) -> None:
        self._sql = install_sql(name)
        self.name = name
        self._create = create

    def ensure(self, connection: Connection, deadline: float) -> str:
        """Install the schema if it is missing or old; check it; return its identity."""
        try:
            return check_schema(connection, self.name, deadline)
        except Refused as error:
            if error.sqlstate not in MISSING:
                raise
            missing = error
        sql = f"SELECT to_regclass('{self.name}.state') IS NOT NULL"
        (result,) = connection.run(sql, (), deadline=deadline)
        is_old = result.get_value(0, 0) == b"\1"
        what = (
            f"the schema {self.name!r} in the database is of an older release"
            if is_old
            else f"there is no schema {self.name!r} in the database"
        )
        if not self._create:
            raise Unavailable(f"{what}. {HOW_TO}") from missing
        try:
            connection.run(self._sql, deadline=deadline)
        except Refused as error:
            if error.sqlstate != DENIED:
                raise
            may = "renew" if is_old else "create"
            raise Unavailable(
                f"{what}, and this role may not {may} it: {error}. {HOW_TO}"
            ) from error
        return check_schema(connection, self.name, deadline)


def check_schema(connection: Connection, schema: str, deadline: float) -> str:
    """Check that a schema can be used; return which one it is, of all databases."""
    sql = (
        f"SELECT s.version, u.revision, {schema}.identity()"
        f" FROM {schema}.state s, {schema}.upkeep u"
    )
    (result,) = connection.run(sql, (), deadline=deadline)
    version, revision = (
        number_of(result, 0, column) if result.ntuples else None for column in (0, 1)
    )
    if version != VERSION or revision is None or revision < REVISION:
        raise Unavailable(
            f"the schema {schema!r} has version {version}, and this syncstream needs"
            f" {VERSION}: other processes may run another release of it"
        )
    identity: bytes = result.get_value(0, 2)
    return identity.decode()


MISSING = ("42P01", "3F000", "42883")  # no such table, schema, function
HOW_TO = (
    'Let a role that may install it: "python -m syncstream.brokers.postgresql URL", or'
    ' in Django "syncstream" in INSTALLED_APPS and "manage.py migrate"'
)
