"""A client or group of a loop that only records, for what it does at which moment."""

import math
from types import SimpleNamespace

from syncstream.fanout.client import Client, Terms
from syncstream.streams.ends import REASONS


class Recorder:
    """Records the calls of all its methods: ``calls`` has a name and arguments each.

    Args:
        results: What methods return, by name; an exception is raised.
    """

    def __init__(self, **results):
        self.calls = []
        self.results = results

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*args, **options):
            self.calls.append((name, *args, *options.values()))
            result = self.results.get(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return method

    def take(self):
        """Return the calls so far, and forget them."""
        calls, self.calls = self.calls, []
        return calls


class Loop(Recorder):
    """See `fanout.contract.Loop`; what it is to call, `run` calls."""

    def __init__(self):
        super().__init__()
        self.ends, self.meeting = Recorder(), Recorder()
        self.sender, self.wheel = Recorder(send_to_all=[]), Recorder()

    def guard(self, owner, function):
        function()

    def run(self):
        """Make the calls that it was told to make; return their owners."""
        owners = []
        for name, *rest in self.take():
            if name in ("call", "again"):
                function, owner = rest
            else:
                assert name == "do", name
                _, function, owner = rest
            owners.append(owner)
            function()
        return owners


def lanes():
    names = ("asks", "ends", "logs", "reads", "users")
    made = {name: Recorder() for name in names}
    said = []

    def say(level, text, *args, error=None):
        said.append(text % args)

    return SimpleNamespace(**made, say=say, said=said)


def terms(**options):
    given = {
        "lanes": lanes(),
        "process": Recorder(),
        "served": SimpleNamespace(parked=set()),
        "keepalive": None,
        "send_timeout": None,
        "retry": 0,
        "comes_back": True,
        "reasons": REASONS,
    }
    return Terms(**(given | options))


def client(loop, subscription, *, deadline=math.inf, began=0.0, **options):
    """Return a client without a connection; ``options`` are `Terms`'s and its own."""
    own = ("callbacks", "place", "events", "bytes", "is_chunked")
    made = Client(
        loop,
        -1,
        subscription,
        terms(**{name: it for name, it in options.items() if name not in own}),
        label="GET '/a'",
        began=began,
        deadline=deadline,
        **{name: it for name, it in options.items() if name in own},
    )
    made.terms.served.parked.add(made)
    return made


def subscription(**options):
    given = {"reason": None, "ask_again_at": math.inf, "announcement": None}
    found = Recorder()
    found.__dict__.update(given | options)
    return found
