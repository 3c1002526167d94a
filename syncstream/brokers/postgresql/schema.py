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

VERSION = 1  # the schema's version: a release that needs another one cannot use it
REVISION = 2  # its additions: releases that need fewer can use it
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,49}")

# One statement, so that any driver can run it in any transaction. All names have their
# schema, and functions search no other: search_path does not matter.
#
# It makes the schema, or upgrades revision 1, which had no table `upkeep`. Workers of
# both revisions use the schema meanwhile: functions that they call keep their names,
# arguments and columns, and nothing waits for an open transaction (`outbox`) or a dump.
_INSTALL = files(__package__).joinpath("install.sql").read_text("utf-8").rstrip()


def install_sql(schema: str = "syncstream") -> str:
    """Return the statement that installs or upgrades the schema.

    It does nothing if the schema is installed already.

    Args:
        schema: The schema's name.

    Raises:
        ValueError: The name has other characters than lower-case letters, digits and _.
    """
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(
            "schema must have lower-case letters, digits and _ only, 50 at most, got"
            f" {schema!r}"
        )
    sql = _INSTALL.replace("$S", schema).replace("$VERSION", str(VERSION))
    return sql.replace("$REVISION", str(REVISION))


def install(dsn: str = "", *, schema: str = "syncstream") -> None:
    """Install the schema, or upgrade it to this release; the role needs the rights.

    It does nothing if the schema is of this release. Workers of the preceding release
    continue meanwhile.

    Args:
        dsn: As for `PostgreSQLBroker`.
        schema: The schema's name.

    Raises:
        ValueError: An argument is wrong.
        Unavailable: The server cannot be reached, or denies it.
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
        name: The schema's name.
        create: Install it if it is missing, or of an older release.

    Raises:
        ValueError: The name has other characters than lower-case letters, digits and _.
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
            else f"the database has no schema {self.name!r}"
        )
        if not self._create:
            raise Unavailable(f"{what}. {HOW_TO}") from missing
        try:
            connection.run(self._sql, deadline=deadline)
        except Refused as error:
            if error.sqlstate != DENIED:
                raise
            may = "upgrade" if is_old else "create"
            raise Unavailable(
                f"{what}, and this role may not {may} it: {error}. {HOW_TO}"
            ) from error
        return check_schema(connection, self.name, deadline)


def check_schema(connection: Connection, schema: str, deadline: float) -> str:
    """Check that a schema can be used; return its identity, unique among databases."""
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
            f"the schema {schema!r} has version {version}, but this syncstream needs"
            f" {VERSION}: other processes may run another release"
        )
    identity: bytes = result.get_value(0, 2)
    return identity.decode()


MISSING = ("42P01", "3F000", "42883")  # no such table, schema, function
HOW_TO = (
    'Install it as a role that may: "python -m syncstream.brokers.postgresql URL", or'
    ' in Django "syncstream" in INSTALLED_APPS and "manage.py migrate"'
)
