"""Orders to an engine with its own database, such as one in another language: its reply ends the row."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from click.testing import CliRunner
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.cli import main
from s2s.store.pool import blocking
from s2s.store.tables import engines
from tests.support.installed import ORDERS
from tests.support.peer import ACK, K1, Frame
from tests.support.postgres import Session, database_url, drop_database, make_database, template
from tests.support.roles import Engine, RoleTestCase, Server
from tests.support.waiting import poll

SECTOR = "world.set_sector_status.v1"
#: The reply of a foreign engine to an order: the payload of its ack or error; ``None``: it never replies.
Answer = Callable[[Frame], Frame | None]


class _Stranger:
    """A linked engine that answers orders in a thread, until its link ends.

    :ivar got: the ``order_id`` of each received order, in their order.
    """

    def __init__(self, server: Server, name: str, answer: Answer) -> None:
        self.got: list[str] = []
        self._peer = server.connect(name=name)
        self._peer.greet()
        self._peer.may_be_cut = True
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while (frame := self._peer.read()) is not None:
                if frame["type"] not in ORDERS or "ack_of" in frame:
                    continue
                self.got.append(frame["payload"]["order_id"])
                said = self._answer(frame["payload"])
                if said is None:
                    continue
                if "late" in said:
                    # The server does not wait for a second reply.
                    self._peer.reply(frame, ACK, {})
                    said = said["late"]
                if "code" in said:
                    self._peer.refuse(frame, said["code"])
                else:
                    self._peer.reply(frame, ACK, {"order_id": frame["payload"]["order_id"], **said})
        except OSError:
            pass  # closed by the test

    def leave(self) -> None:
        """End the link, and the thread."""
        self._peer.link.shutdown(2)
        self._thread.join(10)
        self._peer.close()


def _says(status: str, result: Any = None) -> Answer:
    return lambda _: {"ok": status not in ("refused", "failed"), "status": status, "result": result}


class ForeignEngineTests(RoleTestCase):
    """The server with test peers that do not share its database."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Start the server."""
        super().setUp()
        self.server_role = self.server()
        yield self.server_role.start()

    def stranger(self, answer: Answer, name: str = "stranger") -> _Stranger:
        """Link an engine that ends with the test."""
        stranger = _Stranger(self.server_role, name, answer)
        self.addCleanup(stranger.leave)
        return stranger

    def give(self, count: int = 1, name: str = "o") -> None:
        """Put orders into the table, each after the previous one."""
        self.execute(
            "insert into s2s.orders (order_id, rpc, params, stepped_at) select %s || n, %s,"
            """ '{"sector_id": 1, "status": "neutral"}', now() + n * interval '1 microsecond'"""
            " from generate_series(1, %s) n",
            name,
            SECTOR,
            count,
        )

    def rows(self, name: str = "%") -> list[tuple[Any, ...]]:
        """Return status, result, engine and way of orders."""
        query = "select status, result, engine, way from s2s.orders where order_id like %s order by order_id"
        return self.execute(query, name)

    @inlineCallbacks
    def test_done(self) -> Iterator[Deferred[Any]]:
        """An order answered as done is sent once, and its row and its audit have the content of the reply."""
        stranger = self.stranger(_says("done", {"changed": 3}))
        self.give()
        yield poll(lambda: self.rows() == [("done", {"changed": 3}, "stranger", "link")], "it is done")
        self.assertEqual(
            self.execute("select started_at is not null, finished_at is not null, retry_at from s2s.orders"),
            [(True, True, None)],
        )
        [(told,)] = self.execute("select result from s2s.audit where subject = 'o1' and result is not null")
        self.assertEqual(told, {"status": "done", "result": {"changed": 3}, "engine": "stranger", "way": "link"})
        yield self.server_role.says("order o1 world.set_sector_status.v1 by")
        self.assertEqual(stranger.got, ["o1"])

    @inlineCallbacks
    def test_refused_and_failed(self) -> Iterator[Deferred[Any]]:
        """A refusal, a failure, and an error about the order itself are stored likewise."""
        why = {"code": "not_found", "message": "no such sector"}
        answers: dict[str, Answer] = {
            "o1": _says("refused", why),
            "o2": _says("failed", {"code": "internal_error", "message": "half of it"}),
            "o3": lambda _: {"code": "bad_payload"},
        }
        self.stranger(lambda payload: answers[payload["order_id"]](payload))
        self.give(3)
        yield poll(lambda: all(row[0] not in ("queued", "running") for row in self.rows()), "all are over")
        self.assertEqual([row[0] for row in self.rows()], ["refused", "failed", "refused"])
        self.assertEqual(self.rows("o1")[0][1], why)
        self.assertEqual(self.rows("o3")[0][1], {"code": "bad_payload", "message": "bad_payload"})

    @inlineCallbacks
    def test_running_first(self) -> Iterator[Deferred[Any]]:
        """A running order keeps its row open; the order is sent to that engine again, and its last reply ends it."""
        said = iter(("running", "done"))

        def answer(payload: Frame) -> Frame | None:
            return _says(next(said))(payload)

        stranger = self.stranger(answer)
        self.give()
        yield poll(lambda: len(stranger.got) == 1, "it is sent")
        other = self.stranger(_says("refused"), "another")
        self.assertEqual(self.rows()[0][0], "queued")
        yield poll(lambda: self.rows()[0][0] == "done", "it is done")
        self.assertEqual((stranger.got, other.got), (["o1", "o1"], []))

    @inlineCallbacks
    def test_late(self) -> Iterator[Deferred[Any]]:
        """A signed end that no request awaits any more ends the row."""
        end = _says("done", {"changed": 3})
        stranger = self.stranger(lambda payload: {"late": end(payload)})
        self.give()
        yield poll(lambda: self.rows() == [("done", {"changed": 3}, "stranger", "link")], "it is done")
        self.assertEqual(stranger.got, ["o1"])

    @inlineCallbacks
    def head_of_the_line(self, answer: Answer) -> Iterator[Deferred[Any]]:
        """Assert that a new order is done while 300 before it get a reply that does not end them."""
        done = _says("done")
        stranger = self.stranger(lambda payload: (done if payload["order_id"] == "new1" else answer)(payload))
        self.give(300)
        yield poll(lambda: len(set(stranger.got)) >= 256, "the line is full")
        self.give(1, "new")
        yield poll(lambda: self.rows("new1")[0][0] == "done", "the new one is done")
        self.assertEqual({row[0] for row in self.rows("o%")}, {"queued"})
        # A minute has a bounded number of lines, and one that counts the others.
        self.assertLess(len(self.server_role.lines(": order o")), 40)

    def test_never_answered(self) -> Deferred[Any]:
        """Three hundred orders that are never answered do not delay later orders."""
        return self.head_of_the_line(lambda _: None)

    def test_never_over(self) -> Deferred[Any]:
        """Three hundred orders that are answered as running do not delay later orders."""
        return self.head_of_the_line(_says("running"))

    @inlineCallbacks
    def test_an_engine_without_orders(self) -> Iterator[Deferred[Any]]:
        """An order that the engine does not serve is not ended by that reply: it stays queued for another engine."""
        self.stranger(lambda _: {"code": "unsupported_type"}, "none")
        self.give()
        yield self.server_role.says("order o1: unsupported_type")
        self.assertEqual(self.rows()[0][0], "queued")
        self.stranger(_says("done"))
        yield poll(lambda: self.rows() == [("done", None, "stranger", "link")], "it is done")

    @inlineCallbacks
    def test_a_broadcast(self) -> Iterator[Deferred[Any]]:
        """A broadcast that no linked engine can sweep is reported to its author, but not while no engine is linked."""
        hint = "no linked engine shares this database"

        def tell() -> str:
            told = CliRunner(env={"S2S_DATABASE_URL": self.url}).invoke(main, ["broadcast", "hello"])
            self.assertEqual(told.exit_code, 0, told.output)
            return str(told.stderr)

        self.assertEqual(tell(), "")
        self.stranger(_says("done"))
        yield poll(lambda: self.execute("select 1 from s2s.engine_links"), "it is shown as linked")
        self.assertIn(hint, tell())
        engine = Engine(self.directory, self.url, self.server_role.port)
        self.addCleanup(engine.stop)
        yield engine.start()
        yield poll(lambda: len(self.execute("select 1 from s2s.engine_links")) == 2, "ours is shown, too")
        self.assertEqual(tell(), "")

    @inlineCallbacks
    def test_a_setting(self) -> Iterator[Deferred[Any]]:
        """A setting names the linked engines that it does not reach; a setting of servers alone names none."""

        def tell(key: str) -> str:
            told = CliRunner(env={"S2S_DATABASE_URL": self.url}).invoke(main, ["config", "set", key, "99"])
            self.assertEqual(told.exit_code, 0, told.output)
            return str(told.stderr)

        engine = Engine(self.directory, self.url, self.server_role.port)
        self.addCleanup(engine.stop)
        yield engine.start()
        yield poll(lambda: self.execute("select 1 from s2s.engine_links"), "it is shown as linked")
        self.assertEqual(tell("relay.window"), "")
        self.stranger(_says("done"))
        yield poll(lambda: len(self.execute("select 1 from s2s.engine_links")) == 2, "both are shown")
        hint = (
            "the setting does not reach linked engines that do not share this database: stranger:"
            " set it where the engine's own database is"
        )
        self.assertEqual(tell("relay.window"), f"{hint}\n")
        self.assertEqual(tell("commands.keep_days"), "")
        with blocking(self.url) as txn:
            self.assertEqual(engines.strangers(txn), ["stranger"])


class OwnDatabaseTests(RoleTestCase):
    """An engine of s2s with another database than the server's."""

    def _make_own_database(self, name: str) -> str:
        """Make a database with the server's key, and return its URL."""
        make_database(name, template())
        self.addCleanup(drop_database, name)
        url = database_url(name)
        with Session(url) as session:
            session.run(
                "insert into s2s.s2s_keys (key_id, key_b64, role, active_from) values (%s, %s, 'any', to_timestamp(0))",
                *K1,
            )
        return url

    @inlineCallbacks
    def test_done(self) -> Iterator[Deferred[Any]]:
        """An order that this engine ran in its own database ends in the server's too."""
        url = self._make_own_database("engine_database_of_its_own")
        with Session(url) as session:
            session.run("insert into s2s_world.sectors (sector_id, name) values (1, 'a')")
        server = self.server()
        yield server.start()
        engine = Engine(self.directory, url, server.port)
        self.addCleanup(engine.stop)
        yield engine.start()
        for order_id, sector_id in (("there", 1), ("missing", 2)):
            params = f'{{"sector_id": {sector_id}, "status": "fedspace"}}'
            self.execute(
                "insert into s2s.orders (order_id, rpc, params) values (%s, %s, %s::jsonb)", order_id, SECTOR, params
            )
        query = "select status, engine from s2s.orders order by order_id"
        yield poll(lambda: self.execute(query) == [("refused", "engine-1"), ("done", "engine-1")], "both are over")
        with Session(url) as session:
            self.assertEqual(session.run("select status from s2s_world.sectors"), [("fedspace",)])

    @inlineCallbacks
    def test_paused(self) -> Iterator[Deferred[Any]]:
        """``engine list`` shows the state of such an engine, and no desired state: its own database has it."""
        url = self._make_own_database("engine_paused_in_its_own_database")
        server = self.server()
        yield server.start()
        for its_url, engine_name in ((url, "away"), (self.url, "ours")):
            engine = Engine(self.directory, its_url, server.port, name=engine_name)
            self.addCleanup(engine.stop)
            yield engine.start()
        yield poll(lambda: len(self.execute("select 1 from s2s.engine_links")) == 2, "both are shown as linked")

        def run(*argv: str) -> Any:
            done = CliRunner(env={"S2S_DATABASE_URL": self.url}).invoke(main, ["engine", *argv, "--json"])
            self.assertEqual(done.exit_code, 0, done.output)
            return json.loads(done.stdout)

        for engine_name in ("away", "ours"):
            yield deferToThread(run, "pause", engine_name)
        rows = yield deferToThread(run, "list")
        found = {row["name"]: (row["state"], row["wanted"], row["reason"]) for row in rows}
        self.assertEqual(
            found, {"away": ("paused", None, ""), "ours": ("paused", "paused", "requested at a command line")}
        )
