"""``python -m syncstream.brokers.postgresql``: install the schema, or print it."""

from __future__ import annotations

from ...arguments import Parser
from ...errors import BrokerError
from .schema import install, install_sql


def main() -> None:
    """Install the schema, or print it."""
    parser = Parser(
        prog="python -m syncstream.brokers.postgresql",
        description="Install the schema for Hub('postgresql:…').",
    )
    parser.add_argument(
        "url",
        nargs="?",
        default="",
        help="the hub's URL; by default that of PGHOST and libpq's other variables",
    )
    parser.add_argument("--schema", default="syncstream", help="the schema's name")
    parser.add_argument("--sql", action="store_true", help="print the SQL, for psql")
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
