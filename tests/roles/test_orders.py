"""Every order runs once, even if it is given by link and by table at once, or its engine is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from tests.support.peer import CHECK, Frame, ListeningPeer, Peer
from tests.support.roles import Engine, RoleTestCase, free_port
from tests.support.waiting import poll

TICK = "admin.engine.force_tick.v1"
SECTOR = "world.set_sector_status.v1"
SHIPS = "admin.player.update_all_ships.v1"
_RACES = 1000


class OrderTestCase(RoleTestCase):
    """Engines, and a test peer as their server."""

    def setUp(self) -> None:
        """Listen for the engine's connection."""
        super().setUp()
        self.listening = ListeningPeer()
        self.addCleanup(self.listening.close)

    def linked(self, engine: Engine) -> Peer:
        """Accept an engine's connection, prove the link for both sides, and wait until the engine no longer starts."""
        peer = self.listening.accept()
        self.addCleanup(peer.close)
        peer.greet()
        deadline = time.monotonic() + 10
        while peer.call(CHECK, {})["state"] == "starting":
            assert time.monotonic() < deadline, "it starts for ever"
        return peer

    def give(self, order_id: str, rpc: str, params: Frame) -> None:
        """Insert an order into the table, without sending it over the link."""
        self.execute(
            "insert into s2s.orders (order_id, rpc, params) values (%s, %s, %s::jsonb)",
            order_id,
            rpc,
            json.dumps(params),
        )

    def order(self, order_id: str) -> tuple[Any, ...]:
        """Return the status, the result and the progress of an order."""
        return self.execute("select status, result, state from s2s.orders where order_id = %s", order_id)[0]


class RaceTests(OrderTestCase):
    """Orders that arrive by link and by table."""

    @inlineCallbacks
    def test_a_thousand_races(self) -> Iterator[Deferred[Any]]:
        """Orders that one engine receives over the link, while another finds them in the table, run once each."""
        self.execute(
            f"insert into s2s_world.sectors select n, 'Sector ' || n, 'neutral' from generate_series(1, {_RACES}) n;"
            "create table public.changes (sector_id bigint, n serial);"
            "create function note() returns trigger language plpgsql set search_path from current as"
            " 'begin insert into public.changes values (new.sector_id); return null; end';"
            "create trigger note after update on s2s_world.sectors for each row execute function note()"
        )
        linked, alone = self.engine(self.listening.port), self.engine(free_port(), name="engine-2")
        yield linked.start()
        peer = self.linked(linked)
        yield alone.start()
        ids: dict[str, str] = {}
        for first in range(1, _RACES + 1, 50):
            sectors = range(first, first + 50)
            params = [{"sector_id": sector, "status": "fedspace"} for sector in sectors]
            frames = [peer.envelope(SECTOR, {"order_id": f"race-{each['sector_id']}", **each}) for each in params]
            # Half of the orders arrive on the link first, the other half in the table.
            if first % 100 == 1:
                peer.write_all(frames)
            self.execute(
                "insert into s2s.orders (order_id, rpc, params) select 'race-' || (p ->> 'sector_id'), %s, p"
                " from jsonb_array_elements(%s::jsonb) p on conflict do nothing",
                SECTOR,
                json.dumps(params),
            )
            if first % 100 != 1:
                peer.write_all(frames)
            ids.update({frame["id"]: frame["payload"]["order_id"] for frame in frames})
        answers = peer.answers(list(ids))
        yield poll(
            lambda: self.execute("select count(*) from s2s.orders where status = 'done'") == [(_RACES,)],
            "all are done",
            timeout=60,
        )
        self.assertEqual(
            self.execute("select count(*), count(distinct sector_id) from public.changes"), [(_RACES, _RACES)]
        )
        for message_id, answer in answers.items():
            # A busy machine may exceed the deadline of the answer.
            if answer.get("code") != "deadline_exceeded":
                self.assertEqual((answer["order_id"], answer["ok"]), (ids[message_id], True))
                self.assertIn(answer["status"], ("queued", "running", "done"))
        # Each way must have won several times, or there was no race.
        engines = dict(self.execute("select engine, count(*) from s2s.orders group by engine"))
        self.assertEqual(set(engines), {"engine-1", "engine-2"})
        self.assertGreater(min(engines.values()), _RACES // 50)
        self.assertEqual(self.execute("select count(*) from s2s.audit where action = %s", SECTOR), [(2 * _RACES,)])


class LongOrderTests(OrderTestCase):
    """``admin.player.update_all_ships.v1``."""

    def make_ships(self, ships: int) -> None:
        """Create ships that count their changes in their fuel."""
        self.ships = ships
        self.execute("insert into s2s_world.sectors values (1, 'Sol', 'neutral')")
        self.execute(
            "insert into s2s_world.ships select n, 1, 1, 0, 0, 100, 10 from generate_series(1, %s) n", self.ships
        )
        self.execute(
            "create function count_change() returns trigger language plpgsql set search_path from current as"
            " 'begin new.fuel := old.fuel + 1; return new; end';"
            "create trigger count_change before update of turns on s2s_world.ships for each row execute"
            " function count_change()"
        )
        self.execute("vacuum analyze s2s_world.ships")

    def done(self) -> int:
        """Return the number of ships that the order has passed."""
        state = self.order("long")[2]
        return int(state["done"]) if state else 0

    def assert_each_once(self, turns: int) -> None:
        """Assert that every ship was changed once, to the expected value."""
        found = self.execute("select count(*) from s2s_world.ships where turns = %s and fuel = 1", turns)
        self.assertEqual(found, [(self.ships,)])

    @inlineCallbacks
    def test_killed_in_the_middle(self) -> Iterator[Deferred[Any]]:
        """An order whose engine is killed three times continues where it was: no ship is missed or changed twice."""
        self.make_ships(1_000_000)
        engine = self.engine(free_port())
        yield engine.start()
        self.give("long", SHIPS, {"update_field": "turns", "new_value": 77, "reason": "a test"})
        for _ in range(3):
            before = self.done()
            yield poll(lambda before=before: self.done() > before, "it gets on")
            engine.kill()
            self.assertEqual(self.order("long")[0], "running")
            self.assertEqual(self.execute("select count(*) from s2s_world.ships where turns = 77"), [(self.done(),)])
            self.assertLess(self.done(), self.ships)
            yield engine.start()
        yield poll(lambda: self.order("long")[0] == "done", "it is done", timeout=300)
        self.assertEqual(self.order("long")[1], {"update_field": "turns", "new_value": 77, "ships": self.ships})
        self.assert_each_once(77)
        self.assertEqual(self.execute("select count(*) from s2s.audit where subject = 'long'"), [(2,)])

    @inlineCallbacks
    def test_health_meanwhile(self) -> Iterator[Deferred[Any]]:
        """During a long order, which is answered as running, the engine answers health checks and runs short orders."""
        self.make_ships(200_000)
        self.execute(
            "create function dawdle() returns trigger language plpgsql set search_path from current as"
            " 'begin perform pg_sleep(0.2); return null; end';"
            "create trigger dawdle after update of turns on s2s_world.ships for each statement execute"
            " function dawdle()"
        )
        engine = self.engine(self.listening.port)
        yield engine.start()
        peer = self.linked(engine)
        long = peer.send(SHIPS, {"order_id": "long", "update_field": "turns", "new_value": 5, "reason": "a test"})
        yield poll(lambda: self.execute("select status from s2s.orders") == [("running",)], "it runs")
        self.assertEqual(peer.answer(long)["payload"]["status"], "running")
        slowest_s, checks = 0.0, 0
        while self.order("long")[0] == "running":
            began = time.monotonic()
            self.assertEqual(peer.call(CHECK, {})["state"], "running")
            slowest_s, checks = max(slowest_s, time.monotonic() - began), checks + 1
            if checks == 3:
                short = peer.call(SECTOR, {"order_id": "short", "sector_id": 1, "status": "fedspace"})
                self.assertEqual((short["status"], self.order("long")[0]), ("done", "running"))
        self.assertGreater(checks, 10)
        # The deadline of a health check is three seconds.
        self.assertLess(slowest_s, 1.0)
        again = peer.call(SHIPS, {"order_id": "long", "update_field": "turns", "new_value": 5, "reason": "a test"})
        self.assertEqual(
            again,
            {
                "ok": True,
                "order_id": "long",
                "status": "done",
                "result": {"update_field": "turns", "new_value": 5, "ships": self.ships},
            },
        )
        self.assert_each_once(5)

    @inlineCallbacks
    def test_stopped_in_the_middle(self) -> Iterator[Deferred[Any]]:
        """A shutdown ends after the current batch, with exit code 0; the next start continues the order."""
        self.make_ships(300_000)
        engine = self.engine(free_port())
        yield engine.start()
        self.give("long", SHIPS, {"update_field": "turns", "new_value": 8, "reason": "a test"})
        yield poll(lambda: self.order("long")[0] == "running", "it runs")
        engine.terminate()
        engine.assert_ended_well()
        self.assertEqual(self.order("long")[0], "running")
        self.assertLess(self.done(), self.ships)
        yield engine.start()
        yield poll(lambda: self.order("long")[0] == "done", "it is done", timeout=300)
        self.assert_each_once(8)
