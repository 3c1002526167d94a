"""Each recipe for a client of npm's that runs in Node, with that client.

To the end of a stream, through a cancel, through an error in the middle and a cut.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.live import LiveServer, unique_key
from tests.support.programs import lack, program

NODE = Path(__file__).parent / "node"
NAMES = ["ag_ui", "ai_sdk"]
HOWS = ("end", "cancel", "error", "cut")
pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def server():
    with LiveServer("gunicorn-gevent", "tests.apps.recipes_app:app") as server:
        yield server


@pytest.fixture(scope="module")
def asked(server):
    """What the clients have seen by their names and how the streams ended; a key."""
    node, key = program("node", "nodejs npm"), unique_key()
    if not (NODE / "node_modules" / "ai").is_dir():
        lack(f"no clients of Node: npm ci --prefix {NODE}")
    with subprocess.Popen(
        [node, str(NODE / "recipes.mjs"), server.url, key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            for name in NAMES:
                assert server.control.next(f"{key}-{name}-cancel") == "waits"
            assert child.stdout.readline() == "read\n"
            for name in NAMES:
                server.control.open(f"{key}-{name}-cut")
            output, errors = child.communicate("cancel\n", timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, errors
    runs = json.loads(output)
    return {(run["name"], run["how"]): run["seen"] for run in runs}, key


@pytest.mark.parametrize("name", NAMES)
def test_the_model_ends_once(server, asked, name):
    """However its stream ends; it still waits when the client cancels."""
    _, key = asked
    for how in HOWS:
        assert server.control.next(f"{key}-{name}-{how}") == "closed"
        assert server.control.pending(f"{key}-{name}-{how}") == []
    server.await_log("RuntimeError: MARK")


def test_ag_ui(asked):
    """`HttpAgent` keeps what has come; it takes an abort for an error, as it says."""
    seen = {how: asked[0]["ag_ui", how] for how in HOWS}
    for how in HOWS:
        events = ["RUN_STARTED", "TEXT_MESSAGE_START"]
        text = "abc" if how == "end" else "ab"
        events += ["TEXT_MESSAGE_CONTENT"] * len(text)
        events += {"end": ["TEXT_MESSAGE_END", "RUN_FINISHED"], "cut": []}.get(
            how, ["RUN_ERROR"]
        )
        assert seen[how].pop("events") == events, how
        assert seen[how].pop("text") == seen[how].pop("answer") == text
        assert not seen[how].pop("isRunning")
    assert seen == {
        "end": {},
        "cancel": {"error": "This operation was aborted"},
        "error": {"error": "The model has failed."},
        "cut": {"cut": "terminated"},
    }


def test_ai_sdk(asked):
    """`Chat` is ready after an end and after its `stop()`, and else has an error."""
    seen = {how: asked[0]["ai_sdk", how] for how in HOWS}
    assert [seen[how].pop("text") for how in HOWS] == ["abc", "ab", "ab", "ab"]
    ended = {"isAbort": False, "isDisconnect": False, "isError": False}
    assert seen["end"] == {**ended, "status": "ready"}
    assert seen["cancel"] == {**ended, "status": "ready", "isAbort": True}
    failed = {**ended, "status": "error", "isError": True}
    assert seen["error"] == {**failed, "error": "The model has failed."}
    assert seen["cut"] == {**failed, "error": "terminated"}


def test_the_lock_names_npm_itself():
    """And no other registry, which others could not reach."""
    packages = json.loads((NODE / "package-lock.json").read_text())["packages"]
    assert packages.pop("")
    for name, package in packages.items():
        assert package["resolved"].startswith("https://registry.npmjs.org/"), name
        assert package["integrity"], name
