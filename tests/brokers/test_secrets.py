"""Passwords of URLs are shown nowhere: errors, tracebacks, logs, commands, reports."""

import sys
import traceback

import pytest

from syncstream import Hub
from syncstream.__main__ import main
from syncstream.brokers.postgresql import __main__, schema
from syncstream.brokers.postgresql import broker as postgresql
from syncstream.doctor import checks, observation
from syncstream.doctor.report import report
from syncstream.publish import publish_app
from syncstream.runtime.journal import journal

SECRET = "s3cr3t"

# Wrong in some way, or of a server that refuses: port 1.
URLS = {
    "slash": "redis://:s3cr3t/x@127.0.0.1:1",
    "hash": "redis://u:s3cr3t#x@127.0.0.1:1",
    "normalized": "redis://:\u2100s3cr3t@127.0.0.1:1",
    "percent": "redis://:s3cr3t%zz@127.0.0.1:1",
    "bracket": "redis://u:s3cr3t@[::1",
    "port": "redis://u:s3cr3t@127.0.0.1:port",
    "second": "redis://u:s3cr3t@127.0.0.1:1,127.0.0.1:port",
    "upper": "REDIS://:s3cr3t/x@127.0.0.1:1",
    "bytes": "redis://u:s3cr3t\udcff@127.0.0.1:1",
    "nul": "redis://u:s3cr3t\0@127.0.0.1:1",
    "valkey": "valkey://:s3cr3t/@127.0.0.1:1",
    "tls": "rediss://u:s3cr3t@127.0.0.1:1",
    "refused": "redis://u:s3cr3t@127.0.0.1:1/0",
    "space": " redis://:s3cr3t@127.0.0.1:1",
    "unix": "unix:///missing?password=s3cr3t&db=s3cr3t",
    "unix user": "unix://u:s3cr3t@/missing",
    "sentinel": "redis+sentinel://:s3cr3t@127.0.0.1:1/name",
    "sentinel's own": "redis+sentinel://127.0.0.1:1/name?sentinel_password=s3cr3t",
    "sentinel slash": "redis+sentinel://:s3cr3t/x@127.0.0.1:1/name",
    "driver": "postgresql+psycopg://app:s3cr3t@127.0.0.1:1/x",
    "pg percent": "postgresql://app:s3cr3t%zz@127.0.0.1:1/x",
    "pg bytes": "postgresql://app:s3cr3t\udcff@127.0.0.1:1/x",
    "pg nul": "postgresql://app:s3cr3t\0@127.0.0.1:1/x",
    "pg slash": "postgresql://app:s3cr3t/x@127.0.0.1:1/x",
    "pg at": "postgresql://app:x@s3cr3t@127.0.0.1:1/x",
    "pg two at": "postgresql://app:x@s3cr3t@h/x?hostaddr=127.0.0.1&port=1",
    "pg hosts": "postgresql://app:x@s3cr3t@127.0.0.1:1,127.0.0.1:1/x",
    "pg question": "postgresql://app:x?s3cr3t@127.0.0.1:1/x",
    "pg bracket": "postgresql://app:[s3cr3t@127.0.0.1:1/x",
    "at": "redis://app:x@s3cr3t@127.0.0.1:1/x",
    "question": "redis://app:x?s3cr3t@127.0.0.1:1/x",
    "pg option": "postgresql://127.0.0.1:1/x?passwd=s3cr3t",
    "pg refused": "postgresql://app:s3cr3t@127.0.0.1:1/x",
    "pg words": "postgresql:host=127.0.0.1 port=1 password=s3cr3t'",
    "local": "local:app:s3cr3t@h",
    "local query": "local:name?password=s3cr3t",
    "memory": "memory:?password=s3cr3t",
    "http": "https://u:s3cr3t@h:port",
    "http slash": "https://u:s3cr3t/x@h:port/",
    "query": "ftp://h/?token=s3cr3t",
    "no scheme": "u:s3cr3t@h",
}
each_url = pytest.mark.parametrize("url", URLS.values(), ids=URLS)


def failures(url):
    """Yield what a hub of a URL raises, and what it looks like."""
    try:
        hub = Hub(url)
    except ValueError as error:
        yield error
        return
    try:
        yield repr((hub, hub.broker))
        for use in (
            lambda: hub.publish("a", "x"),
            lambda: hub.head("a"),
            lambda: hub.kick(who="ann"),
        ):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                use()
            yield caught.value
    finally:
        hub.close()


@each_url
def test_hubs_show_no_secret(url, caplog):
    """Neither what they raise, with all that it is chained to, nor what they log.

    Nor their repr, by which some log an error: a codec's holds the whole text.
    """
    caplog.set_level("DEBUG")
    for number, failure in enumerate(failures(url)):
        told = failure
        if isinstance(failure, BaseException):
            told = "".join(traceback.format_exception(failure)) + repr(failure)
        assert SECRET not in told, number
        assert "<redis." not in told  # redis-py's; not all releases leave them out
    journal().flush()
    assert SECRET not in caplog.text


@each_url
def test_misplaced_urls_show_no_secret(url):
    """One given as another argument is an error like any other."""
    for make in (
        lambda: Hub(broker=url),
        lambda: publish_app(url, token="x"),
        lambda: postgresql.PostgreSQLBroker("postgresql:", listen_dsn=url),
        lambda: schema.install(url),
    ):
        try:
            made = repr(make())
        except Exception as error:
            made = "".join(traceback.format_exception(error)) + repr(error)
        assert SECRET not in made


@each_url
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["publish", "{}", "a", "x"], None),
        (["publish", "local:", "a", "x", "{}"], 2),
        (["publish", "local:", "a", "x", "--lines={}"], 2),
        (["publish", "{}"], 2),
        (["{}", "a", "x"], 2),
        (["doctor", "{}"], 2),
        (["doctor", "http://a/", "{}"], 2),
        (["doctor", "http://a/", "--header", "Cookie {}"], 2),
        (["doctor", "http://a/", "--header", "Cookie: a\r\n{}"], 2),
    ],
    ids=[
        "url",
        "many",
        "explicit",
        "few",
        "command",
        "doctor",
        "two",
        "header",
        "line",
    ],
)
def test_commands_show_no_secret(url, words, status, capsys):
    """Whatever is wrong with the words that they are given."""
    try:
        found = main([word.format(url) for word in words])
    except SystemExit as error:
        found = error.code
    assert found == status if status else found
    assert SECRET not in "".join(capsys.readouterr())


@each_url
@pytest.mark.parametrize(
    "words", [["{}"], ["{}", "{}"], ["--sql={}"]], ids=["one", "two", "explicit"]
)
def test_the_schema_command_shows_no_secret(url, words, capsys, monkeypatch):
    """It takes the same URL."""
    words = [word.format(url) for word in words]
    monkeypatch.setattr(sys, "argv", ["postgresql", *words])
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code in (1, 2)
    assert SECRET not in "".join(capsys.readouterr())


def test_reports_show_no_query():
    """Its values are often tokens; names say what was asked."""
    seen = observation.Observation(
        "http://a/b?token=s3cr3t&c=",
        redirects=((301, "http://c/?ticket=s3cr3t"),),
    )
    told = report(seen, checks.judge(seen))
    assert SECRET not in told
    assert "http://a/b?token=...&c=..." in told
    assert "http://c/?ticket=..." in told
