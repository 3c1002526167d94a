"""The schema of `syncstream.brokers.postgresql`, as this release has it.

What `0001_postgresql` has made by another release is made anew; its workers go on.
"""

from typing import Any

from django.db import migrations


def install(apps: Any, editor: Any) -> None:
    if editor.connection.vendor == "postgresql":
        # Only here: psycopg may be missing elsewhere.
        from ..brokers.postgresql.schema import install_sql

        editor.execute(install_sql(), params=None)


class Migration(migrations.Migration):
    dependencies = (("syncstream", "0001_postgresql"),)
    # Back: older workers can use it as it is.
    operations = (migrations.RunPython(install, migrations.RunPython.noop),)
