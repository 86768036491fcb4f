"""The command types that a server accepts: those that any server of its database serves or has served."""

from __future__ import annotations

from collections.abc import Mapping
from threading import get_ident
from typing import Any

import psycopg2
from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import (
    BadPayload,
    DatabaseUnavailable,
    DbUnavailable,
    NotReady,
    Overloaded,
    ShuttingDown,
    UnknownCommand,
)
from s2s.handlers.commands import Command, CommandHandler, registry
from s2s.protocol.catalogue.vet import MAX_SIZE
from s2s.protocol.limits import Counters
from s2s.roles.server import inbox as inbox_module
from s2s.roles.server import served_types
from s2s.roles.server.inbox import Inbox
from s2s.roles.server.served_types import NOTIFY_GAP_S, UNKNOWN_GAP_S, LiveServedTypes, ServedTypes
from s2s.runtime.clock import Clock
from s2s.store.driver import Cursor
from s2s.store.pool import Database, blocking
from s2s.store.tables import command_types
from tests.support.peer import PUSH, command
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import RoleTestCase
from tests.support.waiting import poll


def _served(name: str, kind: str = "integer") -> Mapping[str, CommandHandler]:
    """Create a registry of one type, whose payload has a member ``n`` of some JSON type."""

    class One(CommandHandler):
        cmd_type = name
        schema = {"type": "object", "properties": {"n": {"type": kind}}}

        def run(self, txn: Cursor, command: Command) -> None:
            """Do nothing."""

    return registry([One()])


def _push(cmd_type: str, n: object = 1) -> dict[str, Any]:
    return {"cmd_type": cmd_type, "idem_key": cmd_type, "payload": {"n": n}}


class LiveServedTypesTests(DatabaseTestCase):
    """:class:`LiveServedTypes` in the inboxes of several servers."""

    def setUp(self) -> None:
        """Create the pool that the servers share."""
        super().setUp()
        self.database = Database(self.url, threads=2)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.time = task.Clock()

    async def server(self, served: Mapping[str, CommandHandler]) -> tuple[LiveServedTypes, Inbox]:
        """Start a server up to the point at which it accepts pushes."""
        with blocking(self.url) as txn:
            known = command_types.read(txn)
        types = LiveServedTypes(self.database, Clock(self.time), served, known)
        self.addCleanup(types.stop)
        await types.start()
        return types, Inbox(self.database, served, types=types)

    def logged(self) -> list[LogEvent]:
        """Return a list of the events that are logged from now on."""
        events: list[LogEvent] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        return events

    async def accepts(self, inbox: Inbox, cmd_type: str, n: object = 1) -> bool:
        """Return whether a push is accepted, as new or as a duplicate."""
        return bool((await inbox.push(_push(cmd_type, n)))["accepted"])

    async def test_others_types(self) -> None:
        """A type that another server serves is accepted, whichever of the two started first."""
        types, first = await self.server(_served("test.a"))
        _, second = await self.server(_served("test.b"))
        self.assertTrue(await self.accepts(second, "test.a"))
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        await poll(lambda: "test.b" in types.schemas, "it is known")
        self.assertTrue(await self.accepts(first, "test.b"))

    async def test_a_plug_in_that_is_gone(self) -> None:
        """A type that was served before is accepted and waits, and its payload is checked as before."""
        await self.server(_served("test.a"))
        _, inbox = await self.server({})
        self.assertTrue(await self.accepts(inbox, "test.a"))
        self.assertEqual(self.execute("select cmd_type, status from s2s.commands"), [("test.a", "ready")])
        error = await self.assertFailure(inbox.push(_push("test.a", "1")), BadPayload)
        self.assertEqual(error.details["path"], "/payload/payload/n")

    async def test_known_just_now(self) -> None:
        """A type that a server has just begun to serve is accepted, even before the NOTIFY."""
        _, inbox = await self.server({})
        await self.server(_served("test.a"))
        pushing = inbox.push(_push("test.a"))
        self.assertNoResult(pushing)
        self.time.advance(UNKNOWN_GAP_S)
        self.assertTrue((await pushing)["accepted"])

    async def test_nobody_has_served_it(self) -> None:
        """Any other type is refused, and the refusal names the accepted types."""
        await self.server(_served("test.b"))
        _, inbox = await self.server(_served("test.a"))
        pushing = inbox.push(_push("no.such"))
        self.time.advance(UNKNOWN_GAP_S)
        error = await self.assertFailure(pushing, UnknownCommand)
        self.assertEqual(error.details["supported"], ["test.a", "test.b"])
        self.assertEqual(inbox.refused, 1)

    async def test_a_row_that_was_removed(self) -> None:
        """A type whose row was removed is declared again by a server that serves it, and by no other."""
        types, _ = await self.server(_served("test.a"))
        await self.server(_served("test.b"))
        self.execute("delete from s2s.command_types")
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        await poll(
            lambda: self.execute("select cmd_type from s2s.command_types") == [("test.a",)], "it is declared again"
        )

    async def test_one_verdict(self) -> None:
        """The schema that was declared last is in force on every server, also for types with a local handler."""
        types, first = await self.server(_served("test.a", "integer"))
        _, second = await self.server(_served("test.a", "string"))
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        await poll(lambda: types.schemas["test.a"].is_valid({"n": "1"}), "the schema is in force")
        for inbox in (first, second):
            self.assertTrue(await self.accepts(inbox, "test.a", "1"))
            await self.assertFailure(inbox.push(_push("test.a", 1)), BadPayload)

    async def test_a_schema_that_is_none(self) -> None:
        """An unusable row has a line and affects no other type; a server's own type is checked by its own schema."""
        for name, schema in (("test.a", "{"), ("test.bad", '{"type": 7}'), ("test.null", "null")):
            self.execute("insert into s2s.command_types (cmd_type, schema) values (%s, %s)", name, schema)
        logged = self.logged()
        types, inbox = await self.server(_served("test.a"))
        self.assertTrue(await self.accepts(inbox, "test.a"))
        self.execute("update s2s.command_types set schema = '[' where cmd_type = 'test.a'")
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        told = "the schema of {cmd_type} in s2s.command_types cannot be used: {why}"
        await poll(
            lambda: len([event for event in logged if str(event["log_format"]).startswith(told)]) == 3,
            "each is told, once",
        )
        self.assertEqual(sorted(types.schemas), ["test.a"])
        self.assertTrue(await self.accepts(inbox, "test.a"))
        # Another server may be able to use the schema, and a final refusal would set the engine's row aside.
        for name in ("test.bad", "test.null"):
            error = await self.assertFailure(inbox.push(_push(name)), NotReady)
            self.assertEqual((error.retryable, error.details["retry_after_ms"]), (True, 1000))

    async def test_a_schema_that_is_too_long(self) -> None:
        """A schema that is longer than allowed is neither read whole nor parsed, and the line has the reason."""
        self.execute("insert into s2s.command_types (cmd_type, schema) values ('test.a', repeat('[', 10000000))")
        with blocking(self.url) as txn:
            self.assertEqual(len(command_types.read(txn)["test.a"]), MAX_SIZE + 1)
        logged = self.logged()
        await self.server({})
        [why] = [event["why"] for event in logged if event.get("cmd_type") == "test.a"]
        self.assertIn(f"more than {MAX_SIZE} characters", why)

    async def test_more_than_are_read(self) -> None:
        """A type that was served before all those that a read returns is accepted, and stays accepted."""
        self.execute(
            """insert into s2s.command_types (cmd_type, schema, served_at) values ('test.old', '{}', '2020-01-01'),"""
            """ ('test.new', '{}', now())"""
        )
        self.patch(command_types, "MOST_TYPES", 1)
        types, inbox = await self.server({})
        self.assertEqual(list(types.schemas), ["test.new"])
        pushing = inbox.push(_push("test.old"))
        self.time.advance(UNKNOWN_GAP_S)
        self.assertTrue((await pushing)["accepted"])
        reading = types.read_now("test.none")
        self.time.advance(UNKNOWN_GAP_S)
        await reading
        self.assertTrue(await self.accepts(inbox, "test.old"))

    async def test_compiled_elsewhere(self) -> None:
        """Changed schemas are compiled outside the reactor's thread, before the waiting pushes continue."""
        _, inbox = await self.server({})
        compiled_in: list[int] = []
        real = served_types._compile
        self.patch(served_types, "_compile", lambda text: [compiled_in.append(get_ident()), real(text)][1])
        await self.server(_served("test.a"))
        pushing = inbox.push(_push("test.a"))
        self.time.advance(UNKNOWN_GAP_S)
        self.assertTrue((await pushing)["accepted"])
        self.assertEqual(len(compiled_in), 1)
        self.assertNotEqual(compiled_in, [get_ident()])

    async def test_a_schema_of_another_server(self) -> None:
        """A server logs once, with the cure, that another server's schema of its own type is in force."""
        types, _ = await self.server(_served("test.a", "integer"))
        logged = self.logged()
        await self.server(_served("test.a", "string"))
        for _ in range(2):
            reading = types.read_now("test.a")
            self.time.advance(UNKNOWN_GAP_S)
            await reading
        told = [event["log_format"] for event in logged if event.get("cmd_type") == "test.a"]
        self.assertEqual(len(told), 1)
        self.assertIn("start this server again", str(told))

    async def test_every_character(self) -> None:
        """A schema may contain characters that jsonb cannot store, such as the character 0 in a pattern."""
        served = _served("test.a")
        served["test.a"].schema["properties"]["n"] = {"type": "string", "pattern": "^[^\0]*$"}
        await self.server(served)
        _, inbox = await self.server({})
        self.assertTrue(await self.accepts(inbox, "test.a", "fine"))
        await self.assertFailure(inbox.push(_push("test.a", "\0")), BadPayload)


class AwayTests(SynchronousTestCase):
    """While the database is away."""

    def test_unknown_type(self) -> None:
        """A type that is unknown here is not refused for good, since another server may serve it by now."""

        class Away(ServedTypes):
            def read_now(self, cmd_type: str) -> Deferred[None]:
                return Deferred.fromCoroutine(self._fail())

            async def _fail(self) -> None:
                raise DatabaseUnavailable("away")

        inbox = Inbox(None, {}, types=Away({}))  # type: ignore[arg-type]
        self.failureResultOf(inbox.push(_push("test.a")), DbUnavailable)
        self.assertEqual(inbox.refused, 1)


class LookUpTests(SynchronousTestCase):
    """Pushes whose type is being looked up."""

    def setUp(self) -> None:
        """Create an inbox whose lookups the test ends."""
        self.looks: list[Deferred[None]] = []
        looks = self.looks

        class Slow(ServedTypes):
            def read_now(self, cmd_type: str) -> Deferred[None]:
                looks.append(Deferred())
                return looks[-1]

        self.counters = Counters()
        self.inbox = Inbox(None, {}, counters=self.counters, types=Slow({}))  # type: ignore[arg-type]

    def test_bounded(self) -> None:
        """Too many or too large waiting pushes are refused as overloaded; a single push always fits."""
        for bound in (("UNKNOWN_PUSHES", 2), ("UNKNOWN_BYTES", 20)):
            self.setUp()
            self.patch(inbox_module, *bound)
            waiting = [self.inbox.push(_push(f"test.a{number}")) for number in range(2)]
            error = self.failureResultOf(self.inbox.push(_push("test.over")), Overloaded).value
            self.assertEqual(error.details["retry_after_ms"], 1000)
            self.assertEqual(self.counters.met, {"inbox": 1})
            for look, push in zip(self.looks, waiting, strict=True):
                self.assertNoResult(push)
                look.callback(None)
                self.failureResultOf(push, UnknownCommand)
            self.assertNoResult(self.inbox.push(_push("test.a", "x" * 100)))

    def test_draining(self) -> None:
        """A draining server refuses no type for good: a final refusal would kill a row that another server accepts."""
        pushing = self.inbox.push(_push("test.a"))
        draining = self.inbox.drain()
        self.assertNoResult(draining)
        self.looks[0].callback(None)
        self.failureResultOf(pushing, ShuttingDown)
        self.successResultOf(draining)
        self.failureResultOf(self.inbox.push(_push("test.b")), ShuttingDown)


class RoleServedTests(RoleTestCase):
    """A real server."""

    async def test_while_it_stops(self) -> None:
        """A push whose type is being looked up while the server stops is refused because the server stops."""
        server = self.server()
        await server.start()
        peer = server.connect()
        self.addCleanup(peer.close)
        peer.greet()
        # The first read begins at once, the next one a second later at the earliest, and waits for the lock.
        self.assertEqual(peer.call(PUSH, command("one", {"n": 1}, cmd_type="test.no"))["code"], "unknown_command")
        holder = psycopg2.connect(self.url)
        self.addCleanup(holder.close)
        holder.cursor().execute("lock table s2s.command_types")
        pushed = peer.send(PUSH, command("two", {"n": 1}, cmd_type="test.no"))
        server.terminate()
        self.assertIn(peer.answer(pushed)["payload"]["code"], ("shutting_down", "db_unavailable"))

    async def test_before_it_listens(self) -> None:
        """Types served before are accepted from the first push on, and the server's own types are in the table."""
        self.execute("""insert into s2s.command_types (cmd_type, schema) values ('test.old', '{"type": "object"}')""")
        server = self.server()
        await server.start()
        peer = server.connect()
        self.addCleanup(peer.close)
        peer.greet()
        self.assertTrue(peer.call(PUSH, command("one", {"n": 1}, cmd_type="test.old"))["accepted"])
        self.assertEqual(peer.call(PUSH, command("two", {"n": 1}, cmd_type="test.no"))["code"], "unknown_command")
        self.assertEqual(self.count("command_types"), 2)
        self.assertEqual(self.execute("select status from s2s.commands"), [("ready",)])
