"""The jobs of the world: the effect of one run on ports and ships, compared with a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import psycopg2
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

from s2s.handlers.commands.notice_publish import NoticePublish
from s2s.handlers.jobs import JobRun, Unfinished
from s2s.protocol.catalogue.schema import Schema
from s2s.store.connection import prepare
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.world.decay import Decay
from s2s.world.drift import BATCH_ROWS, DriftJob
from s2s.world.port_refresh import PortRefresh
from tests.cli.test_cli import CliTestCase
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import RoleTestCase, free_port
from tests.support.waiting import poll

MOST = 2**53 - 1
MOST_SHIELDS = 10**9
STATUSES = ("fedspace", "neutral", "port_closed")
_SOME = settings(max_examples=40)


def drifted(value: int, goal: int, rate: int) -> int:
    """Return a value after one run, computed exactly with unbounded numbers."""
    step = -(-abs(goal - value) * rate // 1000)
    return value + step if goal > value else value - step


@dataclass(frozen=True)
class Port:
    """A port, in one of the three sectors."""

    port_id: int
    sector_id: int
    stock: int
    base_stock: int
    capacity: int
    price: int
    base_price: int
    min_price: int
    max_price: int

    def after(self, rate: int) -> Port:
        """Return the port after one run."""
        if STATUSES[self.sector_id - 1] == "port_closed":
            return self
        stock, price = drifted(self.stock, self.base_stock, rate), drifted(self.price, self.base_price, rate)
        return replace(self, stock=stock, price=price)

    @property
    def is_at_goal(self) -> bool:
        """Return whether stock and price are at their base."""
        return (self.stock, self.price) == (self.base_stock, self.base_price)


@dataclass(frozen=True)
class Ship:
    """A ship, in one of the three sectors."""

    ship_id: int
    sector_id: int
    shields: int

    def after(self, rate: int) -> Ship:
        """Return the ship after one run."""
        neutral = STATUSES[self.sector_id - 1] == "neutral"
        return replace(self, shields=drifted(self.shields, 0, rate)) if neutral else self

    @property
    def is_at_goal(self) -> bool:
        """Return whether the ship has no shields."""
        return self.shields == 0


@st.composite
def _between(draw: st.DrawFn, least: int, most: int) -> int:
    """Draw a number, often one at the end of the range."""
    return draw(st.one_of(st.integers(least, most), st.integers(least, min(least + 3, most)), st.just(most)))


@st.composite
def _ports(draw: st.DrawFn) -> list[Port]:
    ports = []
    for port_id in draw(st.sets(_between(1, MOST), max_size=9)):
        capacity, min_price = draw(_between(0, MOST)), draw(_between(1, MOST))
        max_price = draw(_between(min_price, MOST))
        stocks, prices = _between(0, capacity), _between(min_price, max_price)
        stock, base_stock, price, base_price = draw(stocks), draw(stocks), draw(prices), draw(prices)
        sector = draw(st.integers(1, 3))
        ports.append(Port(port_id, sector, stock, base_stock, capacity, price, base_price, min_price, max_price))
    return ports


@st.composite
def _ships(draw: st.DrawFn) -> list[Ship]:
    ids = draw(st.sets(_between(1, MOST), max_size=9))
    return [Ship(ship_id, draw(st.integers(1, 3)), draw(_between(0, MOST_SHIELDS))) for ship_id in ids]


_RATES = st.one_of(st.sampled_from((0, 1, 500, 999, 1000)), st.integers(0, 1000))
#: The longest possible distances, in both directions.
_FAR = [
    Port(1, 1, 0, MOST, MOST, MOST, 1, 1, MOST),
    Port(MOST, 2, MOST, 0, MOST, 1, MOST, 1, MOST),
    Port(7, 3, MOST, 0, MOST, 1, MOST, 1, MOST),
]


class WorldTestCase(DatabaseTestCase):
    """A test with a sector of each status, and one connection."""

    def setUp(self) -> None:
        """Make the sectors."""
        super().setUp()
        self.execute(
            "insert into s2s_world.sectors select n, 'S', (%s::text[])[n] from generate_series(1, 3) n", list(STATUSES)
        )
        self.connection = psycopg2.connect(self.url)
        self.addCleanup(self.connection.close)
        prepare(self.connection, 30, 30)

    @contextmanager
    def undone(self) -> Iterator[Cursor]:
        """Return a transaction that is rolled back."""
        with self.connection.cursor() as txn:
            yield txn
        self.connection.rollback()

    def put(self, txn: Cursor, rows: Sequence[Port | Ship]) -> None:
        """Write rows of one kind into their table."""
        for row in rows:
            names = [field.name for field in fields(row)]
            table, more = (
                ("s2s_world.ports", {"commodity": "'ore'"})
                if isinstance(row, Port)
                else ("s2s_world.ships", _NO_MATTER)
            )
            txn.execute(
                f"insert into {table} ({', '.join([*names, *more])})"
                f" values ({', '.join(['%s'] * len(names) + list(more.values()))})",
                astuple(row),
            )

    def read(self, txn: Cursor, kind: type[Port] | type[Ship]) -> list[Any]:
        """Read all rows of a kind, by their ids."""
        table = "s2s_world.ports" if kind is Port else "s2s_world.ships"
        txn.execute(f"select {', '.join(field.name for field in fields(kind))} from {table} order by 1")
        return [kind(*row) for row in txn]

    def go(self, txn: Cursor, job: DriftJob, rate: int, key: str = "test:60") -> tuple[dict[str, Any], int]:
        """Run a job to its end; the setting is changed after the run has begun.

        :returns: the result, and the number of steps.
        """
        state: dict[str, Any] = {}
        for step in range(1, 1000):
            outcome = job.run(txn, JobRun(txn, key, 60, {job.rate: 777 if state else rate}, 65536, state))
            if not isinstance(outcome, Unfinished):
                return dict(outcome or {}), step
            state = json.loads(json.dumps(outcome.state))
        raise AssertionError("it does not end")

    def notices(self, txn: Cursor) -> list[tuple[str, dict[str, Any]]]:
        """Return the notices in the outbox, checked by their schema, by key without the digest."""
        txn.execute("select cmd_type, idem_key, payload from s2s.outbox order by outbox_id")
        found = txn.fetchall()
        for cmd_type, _, payload in found:
            self.assertEqual(cmd_type, "notice.publish")
            Schema(NoticePublish.schema).check(payload)
        return [(key.rpartition(":")[0], payload) for _, key, payload in found]

    def check(self, kind: type[Port] | type[Ship], rows: Sequence[Any], rate: int) -> list[Any]:
        """Assert that the job has the effect of the model, with batches of any size.

        :returns: the rows afterwards.
        """
        rows = sorted(rows, key=lambda row: astuple(row)[0])
        expected = [row.after(rate) for row in rows]
        moved = [new for old, new in zip(rows, expected, strict=True) if new != old]
        arrived = sum(row.is_at_goal for row in moved)
        for batch_rows in (1, 2, 7, BATCH_ROWS):
            job = PortRefresh(batch_rows) if kind is Port else Decay(batch_rows)
            with self.undone() as txn:
                self.put(txn, rows)
                before = self.versions(txn, job)
                result, steps = self.go(txn, job, rate)
                self.assertEqual(self.read(txn, kind), expected)
                self.assertEqual(result, dict(zip(job.counts, (len(moved), arrived), strict=True)))
                self.assertEqual(steps, len(rows) // batch_rows + 1)
                # Rows without a change were not written either.
                self.assertEqual(len(self.versions(txn, job) - before), len(moved))
                told = [(key, payload["message"]) for key, payload in self.notices(txn)]
                self.assertEqual(told, [("test:60", job.message.format(arrived))] if arrived else [])
        return expected

    def versions(self, txn: Cursor, job: DriftJob) -> set[Any]:
        """Return the place of each row version."""
        txn.execute(f"select ctid::text from {job.table}")
        return set(txn)


_NO_MATTER = dict.fromkeys(("player_id", "turns", "fuel", "hold_capacity"), "1")


class PropertyTests(WorldTestCase):
    """Any world, any rate, any batch size."""

    @_SOME
    @given(_ports(), _RATES)
    @example(_FAR, 1000)
    @example(_FAR, 999)
    @example(_FAR, 1)
    @example([], 100)
    def test_port_refresh(self, ports: list[Port], rate: int) -> None:
        """Stock and price stay in bounds, move towards their base and never pass it; closed ports do not change."""
        after = self.check(Port, ports, rate)
        for old, new in zip(sorted(ports, key=lambda port: port.port_id), after, strict=True):
            self.assertTrue(0 <= new.stock <= new.capacity and new.min_price <= new.price <= new.max_price)
            self.assert_drifted(old.stock, new.stock, old.base_stock, 0 if old.sector_id == 3 else rate)
            self.assert_drifted(old.price, new.price, old.base_price, 0 if old.sector_id == 3 else rate)

    @_SOME
    @given(_ships(), _RATES)
    @example([Ship(1, 2, MOST_SHIELDS), Ship(2, 2, 1), Ship(MOST, 2, 0), Ship(4, 1, 1), Ship(5, 3, 1)], 1)
    @example([Ship(1, 2, MOST_SHIELDS), Ship(MOST, 1, MOST_SHIELDS)], 1000)
    def test_decay(self, ships: list[Ship], rate: int) -> None:
        """Shields never go below zero, and shrink in neutral sectors only."""
        after = self.check(Ship, ships, rate)
        for old, new in zip(sorted(ships, key=lambda ship: ship.ship_id), after, strict=True):
            self.assertGreaterEqual(new.shields, 0)
            self.assert_drifted(old.shields, new.shields, 0, rate if old.sector_id == 2 else 0)

    def assert_drifted(self, old: int, new: int, goal: int, rate: int) -> None:
        """Assert that a value moved towards its goal, not past it, and not at all at the rate 0."""
        self.assertTrue(min(old, goal) <= new <= max(old, goal))
        self.assertEqual(new == old, rate == 0 or old == goal)
        self.assertTrue(rate < 1000 or new == goal)


class ModelTests(SynchronousTestCase):
    """The model itself, on a few cases computed by hand."""

    def test_by_hand(self) -> None:
        """A tenth of the distance is rounded up, in both directions."""
        self.assertEqual(
            [drifted(value, 100, 100) for value in (0, 95, 99, 100, 101, 111)], [10, 96, 100, 100, 100, 109]
        )
        self.assertEqual([drifted(value, 0, 10) for value in (1000, 101, 100, 1, 0)], [990, 99, 99, 0, 0])


class RunTests(WorldTestCase):
    """Runs one after another, and concurrent with other transactions."""

    def test_everything_arrives(self) -> None:
        """At the least rate, ports and ships need as many runs as their distance to their goals; one notice follows."""
        port = Port(1, 1, 3, 0, 9, 5, 9, 1, 9)
        with self.undone() as txn:
            self.put(txn, [port, Ship(1, 2, 4), Ship(2, 2, 2), Ship(3, 2, 0)])
            for run in range(6):
                self.go(txn, PortRefresh(), 1, f"port_refresh:{run}")
                self.go(txn, Decay(), 1, f"decay:{run}")
            self.assertEqual([ship.shields for ship in self.read(txn, Ship)], [0, 0, 0])
            self.assertEqual(self.read(txn, Port), [replace(port, stock=0, price=9)])
            told = {key: payload["message"].partition(": ")[2] for key, payload in self.notices(txn)}
        self.assertEqual(told, {"decay:1": "1", "decay:3": "1", "port_refresh:3": "1"})

    def test_the_notice(self) -> None:
        """A run of several steps emits one notice with the total of all steps, at its end."""
        with self.undone() as txn:
            self.put(txn, [Ship(ship_id, 2, 1) for ship_id in range(1, 6)])
            job = Decay(2)
            first = job.run(txn, JobRun(txn, "decay:60", 60, {job.rate: 10}, 65536))
            assert isinstance(first, Unfinished)
            self.assertEqual(self.notices(txn), [])
            second = job.run(txn, JobRun(txn, "decay:60", 60, {}, 65536, first.state))
            assert isinstance(second, Unfinished)
            third = job.run(txn, JobRun(txn, "decay:60", 60, {}, 65536, second.state))
            self.assertEqual(third, {"decayed": 5, "bare": 5})
            [(key, notice)] = self.notices(txn)
        self.assertEqual((key, notice["scope"], notice["severity"]), ("decay:60", "global", "info"))
        self.assertEqual(notice["message"], "Ships that have lost their last shields: 5")

    def test_undone(self) -> None:
        """A run that is rolled back has changed nothing and emitted nothing."""
        with blocking(self.url) as txn:
            self.put(txn, [Ship(1, 2, 1), Port(1, 1, 1, 0, 9, 1, 1, 1, 1)])
        with self.undone() as txn:
            self.go(txn, Decay(), 10)
            self.go(txn, PortRefresh(), 10, "other")
            self.assertEqual(len(self.notices(txn)), 2)
        with self.undone() as txn:
            self.assertEqual((self.read(txn, Ship)[0].shields, self.read(txn, Port)[0].stock), (1, 1))
            self.assertEqual(self.notices(txn), [])

    def test_beside_others(self) -> None:
        """A ship that another transaction changes meanwhile loses shields from its current value."""
        with blocking(self.url) as txn:
            self.put(txn, [Ship(1, 2, 1000), Ship(2, 2, 5)])
        results: list[Any] = []

        def decay() -> None:
            with blocking(self.url) as txn:
                results.append(self.go(txn, Decay(), 100))

        running = threading.Thread(target=decay)
        with self.connection.cursor() as txn:
            txn.execute("update s2s_world.ships set shields = case ship_id when 1 then 50 else 0 end")
            running.start()
            while not self.execute("select 1 from pg_locks where not granted"):
                assert running.is_alive(), "it has not waited"
            self.connection.commit()
        running.join()
        self.assertEqual(results, [({"decayed": 1, "bare": 0}, 1)])
        with self.undone() as txn:
            self.assertEqual([ship.shields for ship in self.read(txn, Ship)], [45, 0])


class ConsoleTests(CliTestCase):
    """``s2s jobs``."""

    def test_list(self) -> None:
        """The list shows when each job is due and how its last run went, as text and as JSON."""
        self.assertIn("there are none", self.s2s("jobs", "list").output)
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at, state, attempts, error, runs,"
            " last_finished_at, last_result)"
            " values ('decay', 'every:60s', '2030-01-01 12:00Z', null, 0, null, 7, '2030-01-01 11:59:00.5Z',"
            """ '{"decayed": 3}'), ('tide', 'daily@06:00Z', '2030-01-01 06:00Z', '{"after": 9}', 2, 'KeyError: 1', 0,"""
            " null, null)"
        )
        lines = [" ".join(line.split()) for line in self.s2s("jobs", "list").output.splitlines()]
        self.assertEqual(
            lines[1:],
            [
                "decay every:60s 2030-01-01 11:59:00 7 decayed 3",
                "tide daily@06:00Z - 0 failed, attempt 2: KeyError: 1",
            ],
        )
        first, second = self.json("jobs", "list")
        self.assertEqual((first["due_at"], first["last_result"]), ("2030-01-01T12:00:00+00:00", {"decayed": 3}))
        self.assertEqual((first["is_running"], second["is_running"], second["error"]), (False, True, "KeyError: 1"))


class EngineTests(RoleTestCase):
    """A real engine."""

    @inlineCallbacks
    def test_it_runs_them(self) -> Iterator[Deferred[Any]]:
        """An engine runs both jobs when due, with the rates of the table, and their notices wait in the outbox."""
        # The rate moves values to their goals at once, so that a further run in the meantime changes nothing.
        self.execute(
            "insert into s2s_world.sectors values (1, 'Sol', 'fedspace'), (2, 'Vega', 'neutral');"
            "insert into s2s_world.ships values (1, 1, 1, 0, 0, 70, 0), (2, 1, 2, 0, 0, 70, 0);"
            "insert into s2s_world.ports values (1, 1, 'ore', 50, 80, 100, 9, 9, 1, 99);"
            "insert into s2s.jobs (job_type, schedule, due_at) values ('decay', 'every:60s', '2020-01-01'),"
            " ('port_refresh', 'every:10s', '2020-01-01');"
            "update s2s.config set value = '1000' where key ~ '^job'"
        )
        engine = self.engine(free_port())
        yield engine.start()
        yield poll(lambda: self.execute("select 1 from s2s.jobs where runs > 0 having count(*) = 2"), "both have run")
        self.assertEqual(self.execute("select shields from s2s_world.ships order by ship_id"), [(70,), (0,)])
        self.assertEqual(self.execute("select stock from s2s_world.ports"), [(80,)])
        told = {
            "decay": "Ships that have lost their last shields: 1",
            "port_refresh": "Ports that are back at their usual stock and price: 1",
        }
        at = 1577836800  # 2020
        emitted = self.execute("select idem_key, payload ->> 'message' from s2s.outbox")
        found = {key.rpartition(":")[0]: message for key, message in emitted}
        self.assertEqual(found, {f"{job}:{self.database_id()}:{at}:0": message for job, message in told.items()})
        yield engine.says("job decay: decayed 1, bare 1")
