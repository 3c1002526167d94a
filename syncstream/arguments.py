"""Commands' arguments, with error messages that show no URL.

A URL may contain a password, and argparse prints arguments that it does not know, to
terminals, into logs and cron's mails.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["Parser"]

_OPTION = re.compile(r"--[a-z][a-z-]*")
_URL = re.compile("[:/@]")  # every URL contains one of these


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors show neither URLs nor unknown arguments."""

    _words: Sequence[str] = ()

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        options, others = self.parse_known_args(args, namespace)
        if others:
            # Not the words: a password with a space may be two of them.
            names = [found[0] for word in others if (found := _OPTION.match(word))]
            text = f"unknown or too many arguments: {len(others)}"
            self.error(" ".join([text, *names]))
        return options

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self._words = [*(sys.argv[1:] if args is None else args)]
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        values = {v for word in self._words for v in (word, word.partition("=")[2])}
        for value in sorted(filter(_URL.search, values), key=len, reverse=True):
            message = message.replace(repr(value), "...").replace(value, "...")
        super().error(message)
