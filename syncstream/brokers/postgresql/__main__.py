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
