"""Command handlers and jobs of other distributions: sound ones are found, and each broken one has one line."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest import mock

from click.testing import CliRunner
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

from s2s import plugins
from s2s.cli.plugins import plugins as console_command
from s2s.handlers import commands, discovery, import_timer, orders
from s2s.handlers.discovery import Found, discover
from s2s.handlers.orders import command_name
from s2s.protocol.settings import SETTINGS
from s2s.store import migrations
from tests.support.installed import FOUND
from tests.support.peer import PUSH, command
from tests.support.roles import RoleTestCase
from tests.support.waiting import poll

_EXAMPLE = Path(__file__).parents[2] / "examples" / "harbour"
_PREAMBLE = """
from s2s.handlers.commands import BUILTIN, BatchCommandHandler, CommandHandler, ICommandHandler
from s2s.handlers.jobs import Job
from s2s import Migrations, OrderHandler, Report, Setting
from dataclasses import dataclass

class Ring(CommandHandler):
    cmd_type = "bell.ring"
    schema = {"type": "object"}
    def run(self, txn, command): pass

class Toll(Job):
    job_type = "bell.toll"
    schedule = "daily@12:00Z"
    def run(self, txn, run): pass

class Mend(OrderHandler):
    rpc = "bell.mend.v1"
    schema = {"description": "Mends the bell.", "type": "object"}
    def run(self, txn, order): pass

@dataclass
class Count:
    n: int
"""
_EVERY = (
    _PREAMBLE
    + """
mend = Mend()
tone = Setting("bell.tone", 440, "the frequency", 1, 9999)
bells = Report("bell", "Count the bells", Count, "select count(*) from bells.bells")
migrations = Migrations("bells", "bell_tables")
"""
)
_SOUND = _PREAMBLE + "ring, toll = Ring(), Toll()\n"

#: Modules with one broken plug-in each, and the expected text of its line.
_BROKEN = {
    "not_there": ("import no_such_module_at_all", "ModuleNotFoundError: No module named"),
    "raises": ("1 / 0", "ZeroDivisionError: division by zero: mend it"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3: mend it"),
    "bare": ("class Odd(BaseException): pass\nraise Odd('two\\nlines')", "Odd: two lines: mend it"),
    "unreadable": ("def (", "SyntaxError: invalid syntax (unreadable.py, line"),
    "mute": (
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute",
        "Mute: it does not say why",
    ),
    "terminal": ("raise RuntimeError('\\x1b[2J\\x07\\u202e')", "RuntimeError: ?[2J??: mend it"),
    "endless": ("raise RuntimeError('x' * 10_000)", "mend it, or uninstall its package"),
    "no_name": ("class Ring(Ring):\n    cmd_type = None\nring = Ring()", "no_name.ring is left out: TypeError"),
    "bad_name": ("class Ring(Ring):\n    cmd_type = 'Bell Ring'\nring = Ring()", "write it as [a-z][a-z0-9_.]{0,63}"),
    "ours": ("class Ring(Ring):\n    cmd_type = 'notice.publish'\nring = Ring()", "give it a name of its own"),
    "twice": ("ring, again = Ring(), Ring()", "twice.again is left out: the command type s2s.plugins.twice.Ring"),
    "no_schema": ("class Wring(CommandHandler):\n    cmd_type = 'w'\n    run = Ring.run\nwring = Wring()", "schema"),
    "scalar": ("class Ring(Ring):\n    schema = {'type': 'string'}\nring = Ring()", "not one of an object"),
    "no_mapping": ("class Ring(Ring):\n    schema = True\nring = Ring()", "not one of an object"),
    "bad_schema": (
        "class Ring(Ring):\n    schema = {'type': 'object', 'properties': 5}\nring = Ring()",
        "SchemaError: 5 is not of type 'object': mend it",
    ),
    "remote": (
        "class Ring(Ring):\n    schema = {'type': 'object', '$ref': 'http://127.0.0.1:1/x'}\nring = Ring()",
        "http://127.0.0.1:1/x",
    ),
    "backtracking": (
        "class Ring(Ring):\n    schema = {'type': 'object', 'properties': {'a': {'pattern': '(?=a)'}}}\nring = Ring()",
        "backtracking.ring is left out: the pattern at /properties/a/pattern",
    ),
    "dear": (
        "texts = [{'pattern': '[ab]*a[ab]{100}[cd]{%d}' % n} for n in range(1, 11)]\n"
        "class Ring(Ring):\n    schema = {'type': 'object', 'properties': {'a': {'anyOf': texts}}}\nring = Ring()",
        "because of its part #/properties/a/anyOf/0: bound its arrays with maxItems",
    ),
    "attribute": (
        "class Ring(Ring):\n    @property\n    def cmd_type(self): raise LookupError('gone')\nring = Ring()",
        "attribute.ring is left out: LookupError: gone",
    ),
    "arguments": (
        "class Ring(Ring):\n    def run(self): pass\nring = Ring()",
        "doesn't allow enough arguments",
    ),
    "no_plugin": (
        "from zope.interface import implementer\n@implementer(ICommandHandler)\nclass Bare:\n    pass\nbare = Bare()",
        "twisted.plugin.IPlugin",
    ),
    "bad_job": ("class Toll(Toll):\n    job_type = '9'\ntoll = Toll()", "write it as [a-z][a-z0-9_.]{0,63}"),
    "job_twice": ("toll, again = Toll(), Toll()", "give it a name of its own"),
    "hourly": ("class Toll(Toll):\n    schedule = 'hourly'\ntoll = Toll()", "or daily@HH:MMZ in UTC"),
    "order_of_ours": ("class Mend(Mend):\n    rpc = 'admin.config.set.v1'\nmend = Mend()", "give it a name of its own"),
    "order_s2s": ("class Mend(Mend):\n    rpc = 's2s.bell.mend'\nmend = Mend()", "its rpc begins with s2s."),
    "order_access": ("class Mend(Mend):\n    access = 'root'\nmend = Mend()", "observer, operator, admin"),
    "order_schema": ("class Mend(Mend):\n    schema = {'type': 'object'}\nmend = Mend()", 'and a "description"'),
    "order_id": (
        "class Mend(Mend):\n    schema = {**Mend.schema, 'properties': {'order_id': {}}}\nmend = Mend()",
        "its schema has a member order_id",
    ),
    "order_job": ("class Mend(Mend):\n    runs_job = 'job'\nmend = Mend()", "name a required member of its schema"),
    "order_async": ("class Mend(Mend):\n    async def run(self, txn, order): pass\nmend = Mend()", "write a plain def"),
    "setting_of_ours": ("tone = Setting('link.window', 5, '')", "give it a name of its own"),
    "setting_default": ("tone = Setting('bell.tone', 5, '', 6, 9)", "its default is not from 6 to 9"),
    "setting_type": ("tone = Setting('bell.tone', 1.5, '')", "write a string, an integer or a boolean"),
    "report_path": ("bells = Report('bell', 'Count', Count, 'select 1', at='/bell')", "write /v1/ and words"),
    "report_row": ("bells = Report('bell', 'Count', int, 'select 1')", "its row is no dataclass"),
    "a_class": ("ring = Ring", "it is the class Ring and no instance of it: write Ring()"),
    "order_command": ("class Mend(Mend):\n    command = 'list'\nmend = Mend()", "which is one of s2s order"),
    "order_same_command": (
        "class Again(Mend):\n    rpc = 'bell.mend.v2'\nmend, again = Mend(), Again()",
        "has the command 'bell-mend' of bell.mend.v1",
    ),
    "order_option": (
        "class Mend(Mend):\n    schema = {**Mend.schema, 'properties': {'wait': {}}}\nmend = Mend()",
        "its optional param 'wait' is an option of s2s order",
    ),
    "setting_bounds": ("tone = Setting('bell.tone', True, '', 0)", "it is a boolean and has bounds"),
    "setting_length": ("tone = Setting('bell.tone', 'abc', '', 0, 2)", "the length of its default is not from 0 to 2"),
    "migrations_schema": ("migrations = Migrations('public', 's2s')", "other than s2s, public and those of PostgreSQL"),
    "migrations_none": ("migrations = Migrations('bells', 's2s')", "there is no file NNNN_NAME.sql in"),
    "migrations_name": ("migrations = Migrations('bells', 's2s.protocol.catalogue', 'nowhere')", "add one"),
    "ghost": (
        "class Ghost:\n    def __getattribute__(self, name): raise RuntimeError('no ' + name)\nghost = Ghost()",
        "ghost.ghost is left out: RuntimeError: no",
    ),
}


class DiscoveryTestCase(SynchronousTestCase):
    """A test with a directory of plug-ins, and without any others but the built-in ones."""

    def setUp(self) -> None:
        """Make the directory."""
        self.directory = Path(self.mktemp(), "s2s", "plugins").absolute()
        self.directory.mkdir(parents=True)
        self.patch(plugins, "__path__", [*plugins.__path__[:1], str(self.directory)])
        self.patch(sys, "dont_write_bytecode", True)
        known = set(sys.modules)
        self.addCleanup(lambda: [sys.modules.pop(name) for name in set(sys.modules) - known if "s2s.plugins." in name])

    def write(self, name: str, text: str) -> None:
        """Write a module."""
        (self.directory / f"{name}.py").write_text(dedent(text))
        importlib.invalidate_caches()

    def found(self, found: Found) -> tuple[list[str], list[str]]:
        """Return the names that were found besides the built-in ones."""
        ours = (*commands.BUILTIN, *FOUND.jobs.values())
        return (
            [name for name, kind in found.commands.items() if kind not in ours],
            [name for name, kind in found.jobs.items() if kind not in ours],
        )


class ImportTests(DiscoveryTestCase):
    """Plug-ins that do not load in time: :mod:`s2s.handlers.import_timer`."""

    def setUp(self) -> None:
        """Shorten the time limits, and collect the lines."""
        super().setUp()
        self.patch(import_timer, "TELL_S", 0.05)
        self.patch(import_timer, "IMPORT_S", 0.2)
        self.told = os.fdopen(os.memfd_create("stderr"), "w+")
        self.addCleanup(self.told.close)
        self.patch(sys, "__stderr__", self.told)

    def test_it_waits(self) -> None:
        """A hanging import is reported while it lasts, and left out after the time limit; other plug-ins are loaded."""
        self.write("a_waits", "import time\ntime.sleep(600)")
        self.write("bell", _SOUND)
        found = discover()
        self.assertEqual(self.found(found), (["bell.ring"], ["bell.toll"]))
        self.told.seek(0)
        self.assertIn("plug-in s2s.plugins.a_waits has been loading for", self.told.read())
        [complaint] = found.complaints
        self.assertIn("a_waits is left out: its import, or a property of its plug-ins, did not return", complaint)
        self.assertIn("within 0.2 s", complaint)

    def test_it_computes_and_catches(self) -> None:
        """An import that computes, and catches the first interruptions, is interrupted again."""
        loop = "for _ in 'abc':\n    try:\n        while True: pass\n    except BaseException: pass\nraise SystemExit"
        self.write("loops", loop)
        [complaint] = discover().complaints
        self.assertIn("loops is left out", complaint)

    def test_it_waits_later(self) -> None:
        """A plug-in is also left out if a member, a property or the text of an exception does not return."""
        self.write("z_bell", _SOUND)
        hang = "import time; time.sleep(600)"
        for name, text in (
            ("schema", f"class R(Ring):\n    @property\n    def schema(self): {hang}\nring, again = R(), R()"),
            ("schedule", f"class T(Toll):\n    @property\n    def schedule(self): {hang}\ntoll = T()"),
            ("provides", f"class P:\n    @property\n    def __provides__(self): {hang}\np = P()"),
            ("said", f"class Said(Exception):\n    def __str__(self): {hang}\nraise Said"),
        ):
            with self.subTest(name=name):
                self.write(name, f"{_PREAMBLE}\n{text}\n")
                found = discover()
                self.assertEqual(self.found(found), (["bell.ring"], ["bell.toll"]))
                [complaint] = found.complaints
                self.assertIn(f"plug-in s2s.plugins.{name} is left out: its import, or a property", complaint)
                (self.directory / f"{name}.py").unlink()

    def test_nothing_lasts(self) -> None:
        """After an import no timer is left, and the signal has its previous handler."""
        before = signal.getsignal(signal.SIGALRM)
        discover()
        self.assertEqual(signal.getitimer(signal.ITIMER_REAL), (0.0, 0.0))
        self.assertEqual(signal.getsignal(signal.SIGALRM), before)

    def test_it_cannot_be_interrupted(self) -> None:
        """An import that no signal interrupts ends the process, with its stack on stderr."""
        self.write(
            "blocks", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\nsignal.pause()"
        )
        program = (
            "from s2s import plugins; from s2s.handlers import discovery, import_timer; import_timer.EXIT_S = 0.5;"
            f"plugins.__path__.append({str(self.directory)!r}); discovery.discover()"
        )
        ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
        self.assertEqual(ended.returncode, 1)
        self.assertIn("blocks.py", ended.stderr)


class DiscoveryTests(DiscoveryTestCase):
    """:func:`discover`."""

    def test_nothing(self) -> None:
        """Without plug-ins only the built-in types are found, and those of the bundled world unless it is left out."""
        found = discover(world=False)
        self.assertEqual(list(found.commands.values()), list(commands.BUILTIN))
        self.assertEqual(list(found.orders.values()), list(orders.BUILTIN))
        self.assertEqual(list(found.settings.values()), list(SETTINGS))
        self.assertEqual((found.jobs, found.reports, found.migrations, found.complaints), ({}, {}, {}, []))
        found = discover()
        self.assertEqual(set(found.jobs), {"decay", "port_refresh"})
        self.assertEqual(
            found.orders.keys() - {each.rpc for each in orders.BUILTIN},
            {"world.set_sector_status.v1", "admin.player.update_all_ships.v1"},
        )
        self.assertEqual((set(found.reports), set(found.migrations)), ({"world"}, {"s2s_world"}))
        self.assertEqual((found.complaints, found.replaced), ([], frozenset()))

    def test_sound(self) -> None:
        """Instances are found, the built-in ones first, then by module name; classes and other objects are ignored."""
        self.write("zebra", _PREAMBLE + "class Z(Ring):\n    cmd_type = 'a.first'\nz = Z()\nnothing = [Ring(), 5]\n")
        self.write("bell", _SOUND)
        found = discover()
        self.assertEqual(found.complaints, [])
        names = [*(kind.cmd_type for kind in commands.BUILTIN), "bell.ring", "a.first"]
        self.assertEqual((list(found.commands), self.found(found)[1]), (names, ["bell.toll"]))

    def test_every_kind(self) -> None:
        """Orders, settings, reports and migrations are found as command handlers and jobs are."""
        package = self.directory.parent.parent / "bell_tables" / "sql"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "0001_initial.sql").write_text("create table bells (n integer)")
        self.patch(sys, "path", [*sys.path, str(package.parent.parent)])
        self.write("bell", _EVERY)
        found = discover(world=False)
        self.assertEqual(found.complaints, [])
        self.assertEqual(found.catalogue["bell.mend.v1"].request_schema.defaults, {})
        self.assertEqual((found.defaults["bell.tone"], found.reports["bell"].path), (440, "/v1/reports/bell"))
        self.assertEqual(migrations.tables(found.migrations.values()) - migrations.tables(), {"bells.bells"})
        self.assertEqual([command_name(each) for each in found.orders.values()][-1], "bell-mend")
        self.assertEqual(found.sources["settings", "bell.tone"], "s2s.plugins.bell")

    def test_the_world_is_replaced(self) -> None:
        """A plug-in takes the name of a job, order, setting or report of the bundled world, whose other parts stay."""
        self.write(
            "bell",
            _EVERY.replace("bell.mend.v1", "world.set_sector_status.v1")
            .replace("bell.tone", "job.decay.rate_permille")
            .replace('Report("bell"', 'Report("world"')
            .replace('Migrations("bells", "bell_tables")', "None")
            + "class Decay(Toll):\n    job_type = 'decay'\ndecay = Decay()\n",
        )
        found = discover()
        self.assertEqual(found.complaints, [])
        names = {
            ("jobs", "decay"),
            ("orders", "world.set_sector_status.v1"),
            ("settings", "job.decay.rate_permille"),
            ("reports", "world"),
        }
        self.assertEqual(found.replaced, names)
        self.assertEqual({found.sources[each] for each in names}, {"s2s.plugins.bell"})
        self.assertIn("port_refresh", found.jobs)
        self.assertIn("s2s_world", found.migrations)

    def test_one_of_both_kinds(self) -> None:
        """An object may be a command handler and a job at once."""
        self.write("both", _PREAMBLE + "class Both(Ring, Toll):\n    def run(self, txn, run): pass\nboth = Both()\n")
        self.assertEqual(self.found(discover()), (["bell.ring"], ["bell.toll"]))

    def test_another_name_for_the_same(self) -> None:
        """An object with two names, or imported by another plug-in, is found once and causes no complaint."""
        self.write("a_bell", _SOUND + "also = ring\n")
        self.write("b_bell", "from s2s.plugins.a_bell import ring, toll")
        found = discover()
        self.assertEqual((self.found(found), found.complaints), ((["bell.ring"], ["bell.toll"]), []))

    def test_nothing_is_written(self) -> None:
        """The search for plug-ins writes no file, unlike Twisted's own search."""
        self.write("bell", _SOUND)
        discover()
        self.assertEqual([path.name for path in self.directory.iterdir()], ["bell.py"])

    def test_broken(self) -> None:
        """Each kind of broken plug-in has one line that names the plug-in, the fault and the cure."""
        for name, (text, expected) in _BROKEN.items():
            with self.subTest(name=name):
                self.write(name, f"{_PREAMBLE}\n{text}\n")
                [said] = discover().complaints
                (self.directory / f"{name}.py").unlink()
                sys.modules.pop(f"s2s.plugins.{name}", None)
                self.assertTrue(said.startswith(f"plug-in s2s.plugins.{name}"), said)
                self.assertIn(expected, said)
                self.assertTrue(said.isprintable() and len(said) <= 300, said)

    def test_broken_ones_stop_nothing(self) -> None:
        """Of many broken plug-ins each has its line, and the sound plug-ins before and after them are found."""
        rename = ("bell.", "last.")
        self.write("a_bell", _SOUND)
        for name, (text, _) in _BROKEN.items():
            self.write(name, f"{_PREAMBLE}\n{text}\n")
        self.write("zz_bell", _SOUND.replace(*rename))
        found = discover()
        names, job_names = self.found(found)
        self.assertEqual((names[0], names[-1]), ("bell.ring", "last.ring"))
        self.assertEqual(job_names, ["bell.toll", "last.toll"])
        complained = {name for name in _BROKEN for said in found.complaints if f"s2s.plugins.{name}" in said}
        self.assertEqual(complained, set(_BROKEN))

    def test_passed_over(self) -> None:
        """A module whose name is no identifier, and a directory with an ``__init__.py``, have one line each."""
        self.write("my-bell", _SOUND)
        elsewhere = Path(self.mktemp()).absolute()
        directory = elsewhere / "s2s" / "plugins"
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("")
        self.patch(sys, "path", [*sys.path, str(elsewhere)])
        # This is the state of another copy of s2s.
        self.assertEqual(len(discover().complaints), 1)
        (directory / "bell.py").write_text(_SOUND)
        module, package = discover().complaints
        self.assertIn(f"plug-in {self.directory}/my-bell.py is left out: its name", module)
        self.assertIn("rename it", module)
        self.assertIn("is left out: it has an __init__.py: remove that file", package)

    def test_a_directory_that_may_not_be_read(self) -> None:
        """Directories that cannot be listed cause one line, and the built-in types are found."""

        def fail(_: str) -> None:
            raise PermissionError(13, "Permission denied", "/some/where")

        self.patch(discovery, "getModule", fail)
        found = discover()
        self.assertIn("notice.publish", found.commands)
        self.assertEqual(len(found.complaints), 1)
        self.assertIn("/some/where", found.complaints[0])

    def test_the_first_keeps_the_name(self) -> None:
        """Of two plug-ins with one name, that of the first module is used."""
        self.write("b_bell", _SOUND)
        self.write("a_bell", _SOUND)
        found = discover()
        self.assertEqual(type(found.commands["bell.ring"]).__module__, "s2s.plugins.a_bell")
        self.assertEqual(len(found.complaints), 2)

    def test_interrupt(self) -> None:
        """Ctrl-C while a plug-in is loaded is not reported as a fault of the plug-in."""
        self.write("slow", "raise KeyboardInterrupt")
        self.assertRaises(KeyboardInterrupt, discover)


class ConsoleTests(DiscoveryTestCase):
    """``s2s plugins list``."""

    def test_list(self) -> None:
        """The command lists plug-ins with their sources, and exits 1 with a line for each that is left out."""
        self.write("bell", _SOUND)
        self.write("broken", "1 / 0")
        result = CliRunner(env={"COLUMNS": "200"}).invoke(console_command, ["list"])
        self.assertEqual(result.exit_code, 1, result.output)
        lines = [line.split() for line in result.stdout.splitlines()]
        self.assertIn(["command", "notice.publish", "s2s", "-", "-"], lines)
        self.assertIn(["command", "bell.ring", "s2s.plugins.bell", "-", "-"], lines)
        self.assertIn(["job", "bell.toll", "s2s.plugins.bell", "-", "daily@12:00Z"], lines)
        self.assertIn(["order", "world.set_sector_status.v1", "s2s.world.set_sector_status", "-", "-"], lines)
        self.assertRegex(result.stderr, r"\Aplug-in s2s\.plugins\.broken is left out: ZeroDivisionError.*\n\Z")

    def test_json(self) -> None:
        """With ``--json`` the command writes the same data as JSON."""
        self.write("bell", _SOUND)
        rows = json.loads(CliRunner().invoke(console_command, ["list", "--json"]).stdout)
        ring = {"kind": "command", "name": "bell.ring", "source": "s2s.plugins.bell"}
        self.assertIn({**ring, "replaces": None, "schedule": None}, rows)

    def test_a_replacement(self) -> None:
        """The list shows what a plug-in replaces in the bundled world; ``--no-world`` lists nothing of the world."""
        self.write("bell", _PREAMBLE + "class Decay(Toll):\n    job_type = 'decay'\ndecay = Decay()\n")
        rows = json.loads(CliRunner().invoke(console_command, ["list", "--json"]).stdout)
        [row] = [row for row in rows if row["name"] == "decay"]
        self.assertEqual((row["source"], row["replaces"]), ("s2s.plugins.bell", "s2s.world"))
        rows = json.loads(CliRunner().invoke(console_command, ["list", "--json", "--no-world"]).stdout)
        self.assertEqual([row for row in rows if row["source"].startswith("s2s.world") or row["replaces"]], [])
        self.assertEqual({row["name"] for row in rows if row["kind"] == "job"}, {"decay"})


class PoisonTests(RoleTestCase):
    """Payloads that would make a validator compute for years."""

    @inlineCallbacks
    def test_the_server_lives(self) -> Iterator[Deferred[Any]]:
        """The server refuses each such payload with its path, serves the next one, and ends on SIGTERM."""
        plugin = self.directory / "s2s" / "plugins" / "poison.py"
        plugin.parent.mkdir(parents=True)
        members = {"words": {"pattern": "^([A-Za-z]+ ?)+$"}, "rows": {"uniqueItems": True}}
        schema = {"type": "object", "properties": members}
        plugin.write_text(_PREAMBLE + f"class Poison(Ring):\n    schema = {schema!r}\nring = Poison()\n")
        path = os.pathsep.join((str(self.directory), os.environ.get("PYTHONPATH", "")))
        with mock.patch.dict(os.environ, PYTHONPATH=path.rstrip(os.pathsep)):
            server = self.server()
            yield server.start()
        peer = server.connect()
        self.addCleanup(peer.close)
        peer.greet()
        rows = [{"n": n} for n in range(5000)]
        for name, poison in (("words", "a" * 48 + "!"), ("rows", [*rows, rows[0]])):
            refused = peer.call(PUSH, command(name, {name: poison}, cmd_type="bell.ring"))
            self.assertEqual((refused["code"], refused["details"]["path"]), ("bad_payload", f"/payload/payload/{name}"))
        self.assertTrue(peer.call(PUSH, command("sound", {"rows": rows[:9]}, cmd_type="bell.ring"))["accepted"])
        server.terminate()
        yield poll(lambda: not server.is_running, "the server ends")
        server.assert_ended_well()
