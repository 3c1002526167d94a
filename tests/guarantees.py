"""The tables *servers × guarantees* and *deployments × guarantees*, made from a run.

    python -m tests.guarantees REPORT.xml            compare, fail if they differ
    python -m tests.guarantees REPORT.xml --write    write them where they belong

The first one is that of docs/servers.md, the second that of docs/deployments.md.

A cell says "yes" where every case of the promise has passed, or what the test has
recorded to be different there. Any other word is taken for pytest's, who ran a part
of the tests only: then there is nothing to compare.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from tests import ROOT
from tests.support.live import TABLE

BEGIN, END = "<!-- guarantees -->\n", "<!-- end of guarantees -->"
NAMES = {
    "gunicorn-sync": "gunicorn sync",
    "gunicorn-gthread": "gunicorn gthread",
    "gunicorn-gevent": "gunicorn gevent",
    "pywsgi": "gevent.pywsgi",
    "werkzeug": "Werkzeug",
    "uwsgi": "uWSGI",
    "runserver": "Django runserver",
}
FILES = ("test_live", "test_life", "test_handover")
# The promise, the test, and the words that its ids must hold.
PROMISES = (
    ("opening, then each event at once", "test_events_leave_one_at_a_time", ""),
    ("NDJSON and raw chunks at once", "test_chunks_leave_one_at_a_time", ""),
    ("hand-written generators, too", "test_handwritten_generators_get_the_same", ""),
    ("late start_response, too", "test_lazy_applications_get_the_same", ""),
    ("end marked, HTTP/1.1", "test_a_finished_stream_is_whole", "1.1"),
    ("end marked, HTTP/1.0", "test_a_finished_stream_is_whole", "1.0"),
    (
        "HEAD, 204: source never starts",
        "test_without_a_body_the_source_never_starts",
        "",
    ),
    (
        "finished is finished: 204",
        "test_a_client_that_comes_back_after_the_end_gets_204",
        "",
    ),
    (
        "client leaves: closed at the next yield",
        "test_a_client_that_leaves_closes_the_generator",
        "",
    ),
    (
        "client leaves: waits end at once",
        "test_a_client_that_leaves_ends_a_wait",
        "",
    ),
    (
        "client leaves: `time.sleep` ends",
        "test_a_client_that_leaves_ends_a_plain_sleep",
        "",
    ),
    ("keepalive while the generator blocks", "test_silence_is_broken", "app"),
    ("frozen client dropped", "test_a_client_that_does_not_read_is_dropped", ""),
    (
        "client gone without a word dropped",
        "test_a_client_that_vanishes_is_dropped",
        "",
    ),
    ("`max_duration`", "test_a_stream_ends_after_its_time", ""),
    ("server stops: ended in order", "test_streams_end_when_the_server_stops", ""),
    ("subscribers hold no thread", "test_every_byte", ""),
    ("a subscriber that leaves is known at once", "test_who_leaves_is_known", ""),
    ("server stops: subscribers told in order", "test_farewell", ""),
    (
        "error before the first byte: 500",
        "test_an_error_before_the_first_chunk_is_a_500",
        "",
    ),
    ("error seen as truncation, HTTP/1.1", "test_an_error_truncates", "1.1"),
    ("error seen as truncation, HTTP/1.0", "test_an_error_truncates", "1.0"),
)


# A deployment's title, and its names in tests/live/test_deployments.py.
DEPLOYMENTS = {
    "gunicorn sync": ["gunicorn-sync"],
    "gunicorn gthread": ["gunicorn-gthread"],
    "gunicorn gevent": ["gunicorn-gevent"],
    "gunicorn `--preload`": ["preload"],
    "gunicorn `--max-requests`": [
        *("max-requests-sync", "max-requests-gthread", "max-requests-gevent"),
    ],
    "gunicorn `--reload`": ["reload"],
    "a container: PID 1, killed after 10 s": ["container"],
    "nginx, over TCP": ["nginx-tcp"],
    "nginx, over a Unix socket": ["nginx-unix"],
    "New Relic": ["new-relic-gthread", "new-relic-gevent"],
    "Sentry": ["sentry"],
    "OpenTelemetry": ["opentelemetry"],
    "Django": ["django"],
    "Django, a fresh worker": ["django-fresh"],
    "Celery's prefork publishes": ["celery"],
}
# A column's title, and what of tests/live/test_deployments.py shows it.
COLUMNS = {
    "each piece at once, whole": ["pieces", "slow"],
    "a leave ends it": ["leave", "first_stream", "first_subscriber", "first_head"],
    "keepalive": ["keepalive"],
    "nothing left behind": ["left"],
    "worker replaced": ["replaced", "recycled", "reloaded", "first_burst"],
    "SIGTERM": ["stopped"],
}
# A test with a name of its own: its deployment, and what it shows of that.
ALONE = {"test_celerys_processes_publish": ("celery", ("pieces", "left", "stopped"))}


def outcome(case: ET.Element) -> str:
    """Return what a test has to say in a cell."""
    if any(case.find(tag) is not None for tag in ("failure", "error", "skipped")):
        return "FAILED"
    found = (p.attrib for p in case.iter("property") if p.attrib["name"] == "cell")
    return next((property["value"] for property in found), "yes")


def cells(report: Path) -> dict[tuple[str, str], str]:
    """Return what to write for each promise and server."""
    results: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in ET.parse(report).iter("testcase"):
        name, _, ids = case.attrib["name"].partition("[")
        ids = ids.removesuffix("]")
        server = next((s for s in TABLE if re.search(rf"\b{s}\b", ids)), None)
        if not server or not case.attrib["classname"].endswith(FILES):
            continue
        for promise, test, words in PROMISES:
            if test == name and words in ids:
                results[promise, server].add(outcome(case))
    return {key: ", ".join(sorted(found)) for key, found in results.items()}


def drawn(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] + [":---:"] * (len(head) - 1), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def servers(report: Path) -> str:
    """Return the table of servers."""
    found = cells(report)
    body = [
        [promise, *(found.get((promise, server), "?") for server in TABLE)]
        for promise, _, _ in PROMISES
    ]
    return drawn(["guarantee", *(NAMES.get(s, s) for s in TABLE)], body)


def deployments(report: Path) -> str:
    """Return the table of deployments; a cell is empty where nothing is promised."""
    found: dict[tuple[str, str], str] = {}
    for case in ET.parse(report).iter("testcase"):
        if case.attrib["classname"].endswith("test_deployments"):
            name, _, ids = case.attrib["name"].partition("[")
            row, _, promise = ids.removesuffix("]").rpartition("-")
            row, promises = ALONE.get(name, (row, (promise,)))
            found.update({(row, promise): outcome(case) for promise in promises})
    body = []
    for title, names in DEPLOYMENTS.items():
        row = [title]
        for promises in COLUMNS.values():
            keys = [(name, promise) for name in names for promise in promises]
            row.append(", ".join(sorted({found[k] for k in keys if k in found})))
        body.append(row)
    return drawn(["deployment", *COLUMNS], body)


TABLES = {"docs/servers.md": servers, "docs/deployments.md": deployments}


def main() -> str | None:
    report, *words = sys.argv[1:]
    if words and words != ["--write"]:
        print("guarantees: not compared, a part of the tests was run")
        return None
    for name, table in TABLES.items():
        file, made = ROOT / name, table(Path(report))
        before, _, rest = file.read_text().partition(BEGIN)
        written, _, after = rest.partition(END)
        if words:
            file.write_text(before + BEGIN + made + END + after)
        elif made != written:
            return f"{name}'s table of guarantees is not what the tests show:\n{made}"
        else:
            print(f"guarantees: {name}'s table is what the tests show")
    return None


if __name__ == "__main__":
    sys.exit(main())
