"""The README's table *servers × guarantees*, made from a run of the tests.

    python tests/guarantees.py REPORT.xml            compare, fail if they differ
    python tests/guarantees.py REPORT.xml --write    write it into the README

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

from live import TABLE

README = Path(__file__).parent.parent / "README.md"
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
    ("error seen as truncation, HTTP/1.1", "test_an_error_truncates", "1.1"),
    ("error seen as truncation, HTTP/1.0", "test_an_error_truncates", "1.0"),
)


def cells(report: Path) -> dict[tuple[str, str], str]:
    """Return what to write for each promise and server."""
    results: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in ET.parse(report).iter("testcase"):
        name, _, ids = case.attrib["name"].partition("[")
        ids = ids.removesuffix("]")
        server = next((s for s in TABLE if re.search(rf"\b{s}\b", ids)), None)
        if not server or not case.attrib["classname"].endswith(FILES):
            continue
        if any(case.find(tag) is not None for tag in ("failure", "error", "skipped")):
            recorded = "FAILED"
        else:
            recorded = next(
                (
                    p.attrib["value"]
                    for p in case.iter("property")
                    if p.attrib["name"] == "cell"
                ),
                "yes",
            )
        for promise, test, words in PROMISES:
            if test == name and words in ids:
                results[promise, server].add(recorded)
    return {key: ", ".join(sorted(found)) for key, found in results.items()}


def table(report: Path) -> str:
    found = cells(report)
    head = ["guarantee", *(NAMES.get(s, s) for s in TABLE)]
    rows = [head, ["---"] + [":---:"] * len(TABLE)]
    for promise, _, _ in PROMISES:
        rows.append([promise, *(found.get((promise, s), "?") for s in TABLE)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> str | None:
    report, *words = sys.argv[1:]
    if words and words != ["--write"]:
        print("guarantees: not compared, a part of the tests was run")
        return None
    made = table(Path(report))
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    written, _, after = rest.partition(END)
    if words:
        README.write_text(before + BEGIN + made + END + after)
        return None
    if made != written:
        return f"README's table of guarantees is not what the tests show:\n{made}"
    print("guarantees: README's table is what the tests show")
    return None


if __name__ == "__main__":
    sys.exit(main())
