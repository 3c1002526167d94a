"""The schema of `syncstream.brokers.postgresql`; where it is already, nothing."""

from typing import Any

from django.db import migrations


def install(apps: Any, editor: Any) -> None:
    if editor.connection.vendor == "postgresql":
        # Only here: psycopg may be missing elsewhere.
        from ..brokers.postgresql.schema import install_sql

        editor.execute(install_sql(), params=None)


def uninstall(apps: Any, editor: Any) -> None:
    if editor.connection.vendor == "postgresql":
        editor.execute("DROP SCHEMA IF EXISTS syncstream CASCADE", params=None)


class Migration(migrations.Migration):
    operations = (migrations.RunPython(install, uninstall),)
