"""Rooms of the package whose calls can be made to raise, one at a time."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path
from typing import Any


class Faults:
    """The calls of some modules' functions, in copies of these.

    Args:
        modules: Each before those that import it.

    Attributes:
        modules: The copies, by their names without the package's; nobody else has them.
        sites: What is called where, by number: "module:line: source".
        is_hit: The call that was to raise has done so.
        seen: The places of calls that were made.
    """

    def __init__(self, *modules: types.ModuleType) -> None:
        self.sites: list[str] = []
        self.is_hit = False
        self.seen: set[int] = set()
        self._armed: int | None = None
        self._error: type[BaseException] = MemoryError
        self.modules: dict[str, Any] = {}
        try:
            for module in modules:
                name = module.__name__.rpartition(".")[2]
                self.modules[name] = self._copy(module, name)
        finally:
            for module in modules:
                sys.modules[module.__name__] = module

    def _copy(self, module: types.ModuleType, name: str) -> types.ModuleType:
        """Return a copy; it is what others import by its name from now on."""
        path = Path(str(module.__file__))
        source = path.read_text()
        tree = ast.parse(source)
        wrapper = _Wrapper(source, name, self.sites)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = [wrapper.visit(statement) for statement in node.body]
        ast.fix_missing_locations(tree)
        copy: Any = types.ModuleType(module.__name__)
        copy.__package__ = module.__package__
        copy.__file__ = module.__file__
        copy._call = self._call
        # Also for dataclasses, which look their module up while it is made.
        sys.modules[module.__name__] = copy
        exec(compile(tree, str(path), "exec"), copy.__dict__)
        return copy

    def arm(self, site: int, error: type[BaseException]) -> None:
        """Let the next call at this place raise."""
        self._armed, self._error, self.is_hit = site, error, False

    def disarm(self) -> None:
        self._armed = None

    def _call(self, site: int, function: Any, *args: Any, **options: Any) -> Any:
        if site == self._armed:
            self._armed, self.is_hit = None, True
            raise self._error(f"made up for {self.sites[site]}")
        self.seen.add(site)
        return function(*args, **options)


class _Wrapper(ast.NodeTransformer):
    def __init__(self, source: str, name: str, sites: list[str]) -> None:
        self._source = source
        self._name = name
        self._sites = sites
        self._done: set[int] = set()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if id(node) in self._done:  # of a function in a function
            return node
        text = ast.get_source_segment(self._source, node) or ""
        place = f"{self._name}:{node.lineno}"
        self._sites.append(f"{place}: {' '.join(text.split())[:60]}")
        number = ast.Constant(len(self._sites) - 1)
        self.generic_visit(node)
        wrapped = ast.Call(
            func=ast.Name("_call", ast.Load()),
            args=[number, node.func, *node.args],
            keywords=node.keywords,
        )
        self._done.add(id(wrapped))
        return ast.copy_location(wrapped, node)
