"""The command types that a server accepts: what any server of its database serves or has served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BadPayload, DatabaseUnavailable, DbUnavailable, UnknownCommand
from s2s.handlers.commands import Command, CommandHandler, registry
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
    """Make a registry of one type, whose payload has a member ``n`` of some kind."""

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
        """Make the pool that they share."""
        super().setUp()
        self.database = Database(self.url, threads=2)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.time = task.Clock()

    async def server(self, served: Mapping[str, CommandHandler]) -> tuple[LiveServedTypes, Inbox]:
        """Start a server, as far as it accepts."""
        with blocking(self.url) as txn:
            known = command_types.read(txn)
        types = LiveServedTypes(self.database, Clock(self.time), served, known)
        self.addCleanup(types.stop)
        await types.start()
        return types, Inbox(self.database, served, types=types)

    def logged(self) -> list[LogEvent]:
        """Give the events that are logged from now on."""
        events: list[LogEvent] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        return events

    async def accepts(self, inbox: Inbox, cmd_type: str, n: object = 1) -> bool:
        """Whether a push is accepted, new or known."""
        return bool((await inbox.push(_push(cmd_type, n)))["accepted"])

    async def test_others_types(self) -> None:
        """What another server serves is accepted, whichever of the two started first."""
        types, first = await self.server(_served("test.a"))
        _, second = await self.server(_served("test.b"))
        self.assertTrue(await self.accepts(second, "test.a"))
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        await poll(lambda: "test.b" in types.schemas, "it is known")
        self.assertTrue(await self.accepts(first, "test.b"))

    async def test_a_plug_in_that_is_gone(self) -> None:
        """A type that was served before is accepted and waits, and its payload is judged as before."""
        await self.server(_served("test.a"))
        _, inbox = await self.server({})
        self.assertTrue(await self.accepts(inbox, "test.a"))
        self.assertEqual(self.execute("select cmd_type, status from s2s.commands"), [("test.a", "ready")])
        error = await self.assertFailure(inbox.push(_push("test.a", "1")), BadPayload)
        self.assertEqual(error.details["path"], "/payload/payload/n")

    async def test_known_just_now(self) -> None:
        """A type that a server has begun to serve a moment ago is accepted, though no NOTIFY has come."""
        _, inbox = await self.server({})
        await self.server(_served("test.a"))
        pushing = inbox.push(_push("test.a"))
        self.assertNoResult(pushing)
        self.time.advance(UNKNOWN_GAP_S)
        self.assertTrue((await pushing)["accepted"])

    async def test_nobody_has_served_it(self) -> None:
        """Any other type is refused, and the refusal names what is accepted."""
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
        """The schema that was declared last holds on every server, for the type's own handlers too."""
        types, first = await self.server(_served("test.a", "integer"))
        _, second = await self.server(_served("test.a", "string"))
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        await poll(lambda: types.schemas["test.a"].is_valid({"n": "1"}), "the schema is in force")
        for inbox in (first, second):
            self.assertTrue(await self.accepts(inbox, "test.a", "1"))
            await self.assertFailure(inbox.push(_push("test.a", 1)), BadPayload)

    async def test_a_schema_that_is_none(self) -> None:
        """A row that was spoilt by hand is told of, and spoils nothing else; one's own type is judged by one's own."""
        for name, schema in (("test.a", "{"), ("test.bad", '{"type": 7}'), ("test.null", "null")):
            self.execute("insert into s2s.command_types (cmd_type, schema) values (%s, %s)", name, schema)
        logged = self.logged()
        types, inbox = await self.server(_served("test.a"))
        self.assertTrue(await self.accepts(inbox, "test.a"))
        self.execute("update s2s.command_types set schema = '[' where cmd_type = 'test.a'")
        types.notify()
        self.time.advance(NOTIFY_GAP_S)
        told = "the schema of {cmd_type} in command_types cannot be used: {why}"
        await poll(lambda: len([event for event in logged if event["log_format"] == told]) == 3, "each is told, once")
        self.assertEqual(sorted(types.schemas), ["test.a"])
        self.assertTrue(await self.accepts(inbox, "test.a"))

    async def test_every_character(self) -> None:
        """A schema may hold what jsonb cannot, such as the character 0 in a pattern."""
        served = _served("test.a")
        served["test.a"].schema["properties"]["n"] = {"type": "string", "pattern": "^[^\0]*$"}
        await self.server(served)
        _, inbox = await self.server({})
        self.assertTrue(await self.accepts(inbox, "test.a", "fine"))
        await self.assertFailure(inbox.push(_push("test.a", "\0")), BadPayload)


class AwayTests(SynchronousTestCase):
    """While the database is away."""

    def test_unknown_type(self) -> None:
        """A type that is not known here is not refused for good: it may be served by now."""

        class Away(ServedTypes):
            def read_now(self) -> Deferred[None]:
                return Deferred.fromCoroutine(self._fail())

            async def _fail(self) -> None:
                raise DatabaseUnavailable("away")

        inbox = Inbox(None, {}, types=Away({}))  # type: ignore[arg-type]
        self.failureResultOf(inbox.push(_push("test.a")), DbUnavailable)
        self.assertEqual(inbox.refused, 1)


class RoleServedTests(RoleTestCase):
    """A real server."""

    async def test_before_it_listens(self) -> None:
        """What was served before is accepted from the first push on, and the server's own types are in the table."""
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
