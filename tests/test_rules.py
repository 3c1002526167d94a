"""The package's rules: what a file may know of others, and how large things are."""

import ast
from collections import defaultdict
from functools import cache

from tests import ROOT

PACKAGE = ROOT / "syncstream"
FILES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Other people's names that begin with an underscore, and why they are read.
PUBLIC = {
    **dict.fromkeys(("_fields", "_replace"), "named tuples' documented names"),
    **dict.fromkeys(
        ("_getframe", "_current_frames", "_current_exceptions"), "documented of `sys`"
    ),
    "_get_current_object": "documented of Werkzeug's LocalProxy",
    "_mapping": "documented of SQLAlchemy's rows",
}
OTHERS = {
    "__main__.py": {"_SubParsersAction": "argparse has no other name for the type"},
    "brokers/redis/server.py": {"_sock": "redis-py's socket: to set its time-outs"},
    "protocol/json.py": {"_meta": "Django's mark of a model"},
    "runtime/event_loop.py": {"_register_atexit": "concurrent.futures' exit has none"},
    "runtime/waiting.py": {
        "_cond": "an Event's condition: CPython tells no listener otherwise",
        "_waiters": "a Condition's waiters, among which ours is",
        "_is_owned": "as Condition.wait() asks it",
        "_release_save": "as Condition.wait() lets go of its lock",
        "_acquire_restore": "as Condition.wait() takes it again",
        "_qsize": "a queue's size, whose lock is held",
    },
    "servers/cheroot.py": {
        **dict.fromkeys(("_raw", "_sock"), "the socket below its reader"),
    },
    "servers/pywsgi.py": {"_sock": "the socket below its reader"},
    "servers/wsgiref.py": {
        "_read": "what Django's LimitedStream reads of",
        "_sock": "the socket below its reader",
    },
    "streams/links.py": {
        "_mounts": "httpx's transports",
        "_connections": "multiprocessing's and Django's, to name them",
        "_alias": "a Django connection's",
        "_ConnectionBase": "multiprocessing has no public name for a pipe's end",
    },
}


# Files above 600 lines, and why they are better whole.
LONG: dict[str, str] = {}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def classes_of(file):
    return [node for node in ast.walk(FILES[file]) if isinstance(node, ast.ClassDef)]


def methods_of(kind):
    """Return the names of a class's methods; a property's setter is no second one."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in kind.body if isinstance(node, kinds)}


def is_self(value):
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def attributes_of(kind):
    """Yield the names that a class gives itself: methods, slots, fields, `self._x`."""
    yield from methods_of(kind)
    for node in kind.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            yield from names
            if "__slots__" in names:
                words = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant))
                yield from (word for word in words if isinstance(word, str))
    for node in ast.walk(kind):
        is_attribute = isinstance(node, ast.Attribute) and is_self(node.value)
        if is_attribute and isinstance(node.ctx, ast.Store):
            yield node.attr


OWNERS = defaultdict(set)
for _file in FILES:
    for _kind in classes_of(_file):
        for _name in attributes_of(_kind):
            OWNERS[_name].add(_file)


def uses_of(file):
    """Yield private names, and of what they are asked, wherever a file does so."""
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.value, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.args[1].value, node.args[0], node.lineno


@cache
def annotated(file):
    """Return the uses of parameters that are annotated as of a class of this file."""
    names = {kind.name for kind in classes_of(file)}
    found = set()
    for function in ast.walk(FILES[file]):
        if isinstance(function, ast.FunctionDef):
            parameters = [*function.args.args, *function.args.kwonlyargs]
            ours = {p.arg for p in parameters if named(p.annotation) in names}
            uses = (n for n in ast.walk(function) if isinstance(n, ast.Name))
            found |= {use for use in uses if use.id in ours}
    return found


def named(annotation):
    return annotation.id if isinstance(annotation, ast.Name) else None


def is_own(value, file):
    """Whether it is `self`, `cls`, ``super()``, or by its name of a class of this file.

    That is the class itself, or a parameter that is annotated so.
    """
    if isinstance(value, ast.Call):
        value = value.func
    names = {"self", "cls", "super", *(kind.name for kind in classes_of(file))}
    return isinstance(value, ast.Name) and (
        value.id in names or value in annotated(file)
    )


@cache
def reads_of_others(file):
    """Return the private names that a file has no right to, and their lines.

    An owner cannot always be seen. A name that this file's classes have is taken for
    theirs only if no other file's class has it, too: then nothing else can be meant.
    """
    return [
        (name, line)
        for name, value, line in uses_of(file)
        if is_private(name)
        and (value is None or (not is_own(value, file) and OWNERS[name] != {file}))
    ]


def test_private_attributes_stay_in_their_file():
    """What begins with an underscore is read by its own class, or in its own file."""
    found = [
        (file, line, name)
        for file in FILES
        for name, line in reads_of_others(file)
        if name not in PUBLIC and name not in OTHERS.get(file, ())
    ]
    assert found == [], "make it public, or have its owner do it"


def test_every_exception_is_needed():
    """One that no file needs any more goes."""
    found = {(file, name) for file in FILES for name, _ in reads_of_others(file)}
    listed = {(file, name) for file, names in OTHERS.items() for name in names}
    assert listed - found == set()
    assert {*PUBLIC} - {name for _, name in found} == set()


def test_a_class_has_one_job():
    """One of more than 25 methods tells in its docstring, by "Many methods: …", why."""
    found = [
        (file, kind.name, len(methods_of(kind)))
        for file in FILES
        for kind in classes_of(file)
        if len(methods_of(kind)) > 25
        and "Many methods: " not in (ast.get_docstring(kind) or "")
    ]
    assert found == []


def test_a_file_has_a_seam():
    """None has more than 600 lines, but those of which it is told why."""
    lengths = {file: len((PACKAGE / file).read_text().splitlines()) for file in FILES}
    long = {file for file, length in lengths.items() if length > 600}
    assert long == {*LONG}
