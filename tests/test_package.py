"""The package as a whole: layers, names, what importing it does."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import syncstream
from tests import ROOT

PACKAGE = ROOT / "syncstream"

# From the bottom to the top; a module may import what stands before its own layer,
# and its own folder.
LAYERS = (
    ("arguments", "errors", "terminal"),
    ("protocol",),
    ("runtime",),
    ("brokers",),
    ("channels",),
    ("servers",),
    ("streams",),
    ("fanout",),
    ("wsgi",),
    ("process", "publish", "client", "sources"),
    (
        *("flask", "django", "rest_framework", "migrations"),
        *("bottle", "pyramid", "falcon", "gunicorn"),
    ),
    ("__init__",),
    ("demo", "doctor", "listen", "testing"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path):
    """Return the name under which a file stands in LAYERS: its room's, or its own."""
    return unit(path.relative_to(PACKAGE).with_suffix("").parts)


def unit(names):
    own = ".".join(names)
    return own if own in LEVEL else names[0]


def imports_of(path):
    """Yield the units of the package that a file imports, wherever it does."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "syncstream":
                    yield unit(rest or ["__init__"])
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                first, *rest = (node.module or "").split(".")
                if first != "syncstream":
                    continue
            elif node.level < depth:
                continue  # within the folder
            else:
                rest = (node.module or "").split(".") if node.module else []
            if rest:
                yield unit(rest)
            else:
                names = (alias.name for alias in node.names)
                yield from (n if n in LEVEL else "__init__" for n in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    """No module imports from its own layer or from above it."""
    unit = unit_of(path)
    assert unit in LEVEL, f"{unit} has no layer: give it one in LAYERS"
    for imported in imports_of(path):
        assert LEVEL[imported] < LEVEL[unit] or imported == unit, (
            f"{unit} imports {imported}"
        )


def test_the_layer_test_sees_imports():
    """It is no test if it finds none."""
    found = {imported for path in MODULES for imported in imports_of(path)}
    assert {"errors", "protocol", "runtime", "streams", "servers"} <= found


def test_public_names_are_sorted_and_exist():
    """`__all__` is sorted, each name is there and has a docstring."""
    assert syncstream.__all__ == sorted(syncstream.__all__)
    for name in syncstream.__all__:
        assert getattr(syncstream, name).__doc__, name


def test_the_table_of_names_is_all():
    """The table of docs/names.md equals `__all__`."""
    table = (ROOT / "docs" / "names.md").read_text()
    names = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    assert sorted(names) == syncstream.__all__


def test_importing_is_free_of_side_effects():
    """No thread, no signal handler, no patch, no optional package."""
    code = """
import signal, sys, threading
import werkzeug.wrappers, werkzeug.test
before = set(sys.modules)
handlers = [signal.getsignal(n) for n in signal.valid_signals()]
import syncstream
assert threading.active_count() == 1
assert handlers == [signal.getsignal(n) for n in signal.valid_signals()]
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    # orjson is the `fast` extra: used wherever it is installed.
    assert done.stdout.strip() in ("['orjson', 'syncstream']", "['syncstream']")


def test_commands_install_this_project():
    """By its own name, or from the clone: ``syncstream`` on PyPI is somebody else's."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["name"] == "syncstream-wsgi"
    paths = [ROOT / name for name in ("README.md", "CHANGELOG.md", "setup.cfg")]
    for folder in (".ci", "benchmarks", "docs", "examples", "syncstream", "tests"):
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths = [path for path in paths if "node_modules" not in path.parts]
    texts = {p: p.read_text() for p in paths if p.suffix not in (".pyc", ".svg")}
    ours = re.compile(r"syncstream-wsgi\[|(?<=['\" ])\.\[")
    theirs = re.compile(
        # pip install, some options and other packages, and the bare name.
        r"(?:pip3?|uv|poetry|pipx)\s+(?:install|add)[^`\n]*?(?<![\w./-])syncstream"
        # An extra of it, wherever it stands, a requirement or a line of its own.
        r"(?![\w./-])|(?<![\w./-])syncstream\[(?!\.)"
    )
    wrong = {p: found for p, t in texts.items() if (found := theirs.findall(t))}
    wrong.pop(Path(__file__), None)
    assert not wrong
    assert sum(len(ours.findall(text)) for text in texts.values()) >= 8


def test_the_table_of_extras_is_all():
    """The table of docs/usage.md equals the extras that can be installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = (ROOT / "docs" / "usage.md").read_text()
    table = text.partition("| extra |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(cells))
    assert sorted(names) == sorted(config["options.extras_require"])


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("redis://127.0.0.1", "redis", "redis"),
        ("postgresql://127.0.0.1", "psycopg", "postgresql"),
    ],
)
def test_a_broker_without_its_package(url, package, extra):
    """The error says what to install, by this project's name."""
    code = f"""
import sys
sys.modules[{package!r}] = None
from syncstream import Hub
try:
    Hub({url!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == (
        f"{extra}: needs the package {package},"
        f" run pip install 'syncstream-wsgi[{extra}]'\n"
    ), done.stderr


def test_version():
    """The changelog speaks of this version."""
    assert f"## {syncstream.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the package, built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / "syncstream", ignore=ignored)
    plugin = "_syncstream_pytestplugin.py"
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", plugin):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    command = [sys.executable, "-W", "ignore", "-c", build]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_has_all_files(wheel):
    """Whatever stands in the package's folder is installed: SQL, Lua, pages, types."""
    folders = (path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts)
    files = {str(path.relative_to(ROOT)) for path in folders if path.is_file()}
    assert any(name.endswith(".lua") for name in files)
    with zipfile.ZipFile(wheel) as archive:
        assert {*files, "_syncstream_pytestplugin.py"} <= set(archive.namelist())
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert b"[pytest11]\nsyncstream = _sync" in archive.read(name)


@pytest.mark.parametrize(
    "program",
    [
        "from syncstream.brokers.postgresql import install_sql; print(install_sql())",
        "from syncstream.brokers.redis.scripts import *;"
        " print(*(script.text for script in (PUBLISH, READ, NEWEST, HEADS)))",
        "from syncstream import Hub; hub = Hub('local:' + sys.argv[1]);"
        " hub.publish('news', 1); hub.close()",
    ],
    ids=["postgresql", "redis", "local"],
)
def test_brokers_of_the_wheel_have_their_files(wheel, tmp_path, program):
    """SQL and Lua are found where the package is one file, too: a wheel, as it is."""
    said = []
    for place in (wheel, ROOT):
        text = f"import sys; sys.path.insert(0, {str(place)!r}); {program}"
        command = [sys.executable, "-c", text, str(wheel.with_name(f"log{len(said)}"))]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout)
    assert said[0] == said[1]
