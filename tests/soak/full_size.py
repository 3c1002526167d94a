"""Do many channels and many subscribers fit into one process?

    python -m tests.soak.full_size [--share 1]

In the repository's folder; ``tox -e soak`` runs it. Each line is a process of its own:
100,000 channels with an event each; 10,000 subscribers of 10,000 channels, each in a
greenlet that waits, and each of which must get its own channel's events and no others,
in order; and both at once. ``--share 0.1`` is what the tests run.
"""

import argparse
import os
import platform
import subprocess
import sys
import time

from syncstream import Hub

CHANNELS, SUBSCRIBERS, GOAL = 100_000, 10_000, 300e6
ROUNDS = 3
TEXT = "x" * 100


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def channels(share):
    """Publish an event to each channel; return the bytes that it takes."""
    hub = Hub()
    before = rss()
    for number in range(int(CHANNELS * share)):
        hub.publish(f"user:{number}", TEXT)
    assert len(hub.broker.channels) == int(CHANNELS * share)
    return rss() - before


def subscribers(share):
    """Let subscribers wait; publish to all of them; return the bytes that it takes."""
    import gevent

    hub, count = Hub(), int(SUBSCRIBERS * share)
    got = [0] * count

    def read(number):
        subscription = hub.subscribe(f"user:{number}")
        for wanted in range(ROUNDS):
            assert next(subscription).data == f"{number} {wanted} {TEXT}"
            got[number] += 1
        assert subscription.read(0) == []
        subscription.close()

    before = rss()
    greenlets = [gevent.spawn(read, number) for number in range(count)]
    while hub.stats()["subscribers"] < count:
        gevent.sleep(0.01)
    for wanted in range(ROUNDS):
        for number in range(count):
            hub.publish(f"user:{number}", f"{number} {wanted} {TEXT}")
        taken = rss() - before
        gevent.sleep(0)
    gevent.joinall(greenlets, timeout=60, raise_error=True)
    assert got == [ROUNDS] * count
    assert hub.stats()["subscribers"] == 0
    return taken


def both(share):
    """Return the bytes that subscribers and ten times as many channels take."""
    hub = Hub()
    before = rss()
    all_of_them = [
        hub.subscribe(f"user:{number}") for number in range(int(SUBSCRIBERS * share))
    ]
    for subscription in all_of_them:
        subscription.read(0)
    for number in range(int(CHANNELS * share)):
        hub.publish(f"user:{number}", f"{number} {TEXT}")
    for number, subscription in enumerate(all_of_them):
        (event,) = subscription.read(0)
        assert event.data == f"{number} {TEXT}"
    return rss() - before


PARTS = {
    "channels": f"{CHANNELS:,} channels with an event each",
    "subscribers": f"{SUBSCRIBERS:,} subscribers of as many channels, in greenlets",
    "both": f"{SUBSCRIBERS:,} subscribers, {CHANNELS:,} channels with an event each",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of these numbers")
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    options = parser.parse_args()
    if options.part:
        print(globals()[options.part](options.share))
        return 0
    print(f"Python {platform.python_version()}, share {options.share:g}\n")
    print("| | memory, MB | s | |\n|---|---:|---:|---|", flush=True)
    is_met = True
    for part, words in PARTS.items():
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.soak.full_size", "--part", part]
        done = subprocess.run(
            [*command, "--share", str(options.share)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=False,
        )
        taken = float(done.stdout or "inf")
        is_small = done.returncode == 0 and taken < GOAL * options.share
        is_met = is_met and is_small
        print(
            f"| {words} | {taken / 1e6:.1f} | {time.monotonic() - began:.1f}"
            f" | {'PASS' if is_small else 'FAIL'} |",
            flush=True,
        )
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
