"""The world: the constraints of its tables, its seeding, and updates of ships in batches."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import psycopg2
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.cli.world_seed import make_world
from s2s.store import interruptible, lock_wait
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.store.tables import audit
from s2s.world import seed
from s2s.world import tables as world
from tests.cli.test_cli import CliTestCase
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

MOST_ID = 2**53 - 1
#: A valid row of each table.
ROWS: dict[str, dict[str, Any]] = {
    "sectors": {"sector_id": 1, "name": "Sol", "status": "fedspace"},
    "ports": {
        "port_id": 1,
        "sector_id": 1,
        "commodity": "ore",
        "stock": 5,
        "base_stock": 6,
        "capacity": 9,
        "price": 15,
        "base_price": 16,
        "min_price": 10,
        "max_price": 20,
    },
    "ships": {"ship_id": 1, "player_id": 1, "sector_id": 1, "turns": 1, "fuel": 1, "shields": 1, "hold_capacity": 1},
}

#: Rows at the bounds, which each table accepts, and rows just past the bounds, which it refuses.
TAKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sectors", {"sector_id": 2, "status": "neutral"}),
    ("sectors", {"sector_id": MOST_ID, "status": "port_closed", "name": "x" * 200}),
    ("ports", {"stock": 0, "base_stock": 0, "price": 10, "base_price": 10}),
    ("ports", {"stock": 9, "base_stock": 9, "price": 20, "base_price": 20}),
    ("ports", {"min_price": 1, "max_price": MOST_ID, "capacity": MOST_ID}),
    ("ports", {"stock": 0, "base_stock": 0, "capacity": 0, "commodity": "organics"}),
    ("ports", {"port_id": MOST_ID, "commodity": "equipment"}),
    ("ships", {"ship_id": MOST_ID, "player_id": MOST_ID}),
)
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sectors", {"sector_id": 0}),
    ("sectors", {"sector_id": MOST_ID + 1}),
    ("sectors", {"sector_id": 3, "name": ""}),
    ("sectors", {"sector_id": 3, "name": "x" * 201}),
    ("sectors", {"sector_id": 3, "status": "closed"}),
    ("sectors", {"sector_id": 3, "status": None}),
    ("ports", {"port_id": 0}),
    ("ports", {"port_id": MOST_ID + 1}),
    ("ports", {"commodity": "gold"}),
    ("ports", {"stock": 10}),
    ("ports", {"stock": -1}),
    ("ports", {"base_stock": 10}),
    ("ports", {"base_stock": -1}),
    ("ports", {"stock": 0, "base_stock": 0, "capacity": -1}),
    ("ports", {"capacity": MOST_ID + 1}),
    ("ports", {"price": 21}),
    ("ports", {"price": 9}),
    ("ports", {"base_price": 21}),
    ("ports", {"base_price": 9}),
    ("ports", {"min_price": 0}),
    ("ports", {"max_price": MOST_ID + 1}),
    ("ports", {"sector_id": 7}),
    ("ships", {"ship_id": 0}),
    ("ships", {"ship_id": MOST_ID + 1}),
    ("ships", {"player_id": 0}),
    ("ships", {"player_id": MOST_ID + 1}),
    ("ships", {"sector_id": 7}),
)


def _count(txn: Cursor) -> world.Counts:
    txn.execute(world.COUNTS.query)
    return world.Counts(*(txn.fetchone() or ()))


class TableTests(DatabaseTestCase):
    """The constraints of ``sectors``, ``ports`` and ``ships``."""

    def setUp(self) -> None:
        """Insert a sector."""
        super().setUp()
        self.insert("sectors", {})

    def insert(self, table: str, changed: dict[str, Any]) -> None:
        """Insert the row of :data:`ROWS` with some columns changed."""
        row = {**ROWS[table], **changed}
        marks = ", ".join(["%s"] * len(row))
        self.execute(f"insert into {table} ({', '.join(row)}) values ({marks})", *row.values())

    def test_bounds(self) -> None:
        """A row at a bound is accepted; one past it is refused by a check or a foreign key."""
        for table, changed in TAKEN:
            with self.subTest(table=table, changed=changed):
                self.insert(table, changed)
            if table != "sectors":
                self.execute(f"delete from {table}")
        for table, changed in REFUSED:
            with self.subTest(table=table, changed=changed):
                self.assertRaises(psycopg2.IntegrityError, self.insert, table, changed)

    def test_fields_of_ships(self) -> None:
        """The bounds of a field in ``SHIP_FIELDS`` are those of the table's check, at both ends."""
        for at, (field, most) in enumerate(world.SHIP_FIELDS.items()):
            with self.subTest(field=field):
                for id, value in enumerate((0, most), start=1):
                    self.insert("ships", {"ship_id": 2 * at + id, field: value})
                for value in (-1, most + 1):
                    self.assertRaises(psycopg2.IntegrityError, self.insert, "ships", {"ship_id": 99, field: value})

    def test_a_sector_in_use(self) -> None:
        """A sector with a port or a ship in it cannot be deleted."""
        for table in ("ports", "ships"):
            self.insert(table, {})
            self.assertRaises(psycopg2.IntegrityError, self.execute, "delete from s2s_world.sectors")
            self.execute(f"delete from {table}")
        self.execute("delete from s2s_world.sectors")


class StoreTests(DatabaseTestCase):
    """:mod:`s2s.world.tables`."""

    def test_batches(self) -> None:
        """The batches change each ship that existed at the start once, and no other ship."""
        self.execute("insert into s2s_world.sectors values (1, 'Sol', 'neutral')")
        ids = st.sets(st.integers(1, 60) | st.integers(1, MOST_ID - 1), max_size=40)

        @settings(max_examples=60)
        @given(ids, st.integers(1, 45), st.sampled_from(sorted(world.SHIP_FIELDS)))
        def check(ids: set[int], rows: int, field: str) -> None:
            txn.execute("delete from s2s_world.ships")
            txn.execute(
                "insert into s2s_world.ships select id, 1, 1, 1, 1, 1, 1 from unnest(%s::bigint[]) id", (sorted(ids),)
            )
            count, last = world.count_ships(txn)
            self.assertEqual((count, last), (len(ids), max(ids, default=0)))
            txn.execute("insert into s2s_world.ships values (%s, 1, 1, 1, 1, 1, 1)", (last + 1,))
            after, sizes = 0, []
            while (end := world.end_of_batch(txn, after, last, rows)) is not None:
                sizes.append(world.update_ships(txn, field, 7, after, end))
                after = end
            whole, rest = divmod(count, rows)
            self.assertEqual(sizes, [rows] * whole + [rest] * (rest > 0))
            txn.execute(f"select array_agg(ship_id order by ship_id) from s2s_world.ships where {field} = 7")
            self.assertEqual(txn.fetchone(), (sorted(ids) or None,))

        with blocking(self.url) as txn:
            check()

    def test_an_unknown_field(self) -> None:
        """A column that is not in ``SHIP_FIELDS`` cannot be set."""
        with blocking(self.url) as txn:
            self.assertRaises(KeyError, world.update_ships, txn, "player_id", 1, 0, 1)

    def test_sector_status(self) -> None:
        """The status of only one sector is changed, and its previous status is returned."""
        self.execute("insert into s2s_world.sectors values (1, 'Sol', 'fedspace'), (2, 'Rim', 'neutral')")
        with blocking(self.url) as txn:
            self.assertEqual(world.set_sector_status(txn, 2, "port_closed"), "neutral")
            self.assertIsNone(world.set_sector_status(txn, 3, "port_closed"))
        self.assertEqual(
            self.execute("select status from s2s_world.sectors order by 1"), [("fedspace",), ("port_closed",)]
        )


class SeedTests(DatabaseTestCase):
    """:func:`s2s.cli.world_seed.make_world`."""

    #: The digests of the tables for 300 sectors, 3000 ships and seed 7.
    DIGESTS = ["f5090fdcc4d6cbd0", "3bd007b435b60dcd", "526fe817a35250ad"]

    def make(self, sectors: int, ships: int, seed: int = 1, **options: Any) -> bool:
        """Make a world, and commit it."""
        with blocking(self.url) as txn:
            return make_world(txn, sectors, ships, seed, **options)

    def digests(self) -> list[str]:
        """Return the digest of each table's rows."""
        with blocking(self.url) as txn, interruptible.copying():
            found = []
            for table in ROWS:
                text = io.BytesIO()
                txn.copy_expert(f"copy (select * from s2s_world.{table} order by 1) to stdout", text)
                found.append(hashlib.sha256(text.getvalue()).hexdigest()[:16])
            return found

    def test_deterministic(self) -> None:
        """The same sizes and seed make the same bytes in every release, however many rows a COPY has."""
        self.assertTrue(self.make(300, 3000, 7))
        self.assertEqual(self.digests(), self.DIGESTS)
        self.patch(seed, "CHUNK_ROWS", 271)
        self.make(300, 3000, 7, replace=True)
        self.assertEqual(self.digests(), self.DIGESTS)
        self.make(300, 3000, 8, replace=True)
        for one, other in zip(self.digests(), self.DIGESTS, strict=True):
            self.assertNotEqual(one, other)

    def test_a_living_world(self) -> None:
        """Each sector has a port away from its base, and decay finds ships with little and with much to lose."""
        self.make(1000, 4000)
        with blocking(self.url) as txn:
            counts = _count(txn)
        self.assertEqual((counts.sectors, counts.fedspace, counts.ports, counts.ships), (1000, 10, 1000, 4000))
        self.assertEqual(counts.fedspace + counts.neutral + counts.port_closed, 1000)
        self.assertTrue(5 <= counts.port_closed <= 50, counts)
        for statement, expected in (
            ("select min(sector_id), max(sector_id) from s2s_world.sectors where status = 'fedspace'", (1, 10)),
            (
                "select min(port_id), max(port_id), count(*) from s2s_world.ports where port_id = sector_id",
                (1, 1000, 1000),
            ),
            ("select count(*) from s2s_world.ports where stock = base_stock or price = base_price", (0,)),
            ("select count(distinct commodity), count(distinct stock < base_stock) from s2s_world.ports", (3, 2)),
            (
                "select min(ship_id), max(ship_id), max(player_id) <= 1000, min(player_id) from s2s_world.ships",
                (1, 4000, True, 1),
            ),
            (
                "select count(*) filter (where shields <= 3) > 500, count(*) filter (where shields > 300) > 500"
                " from s2s_world.ships join s2s_world.sectors using (sector_id) where status = 'neutral'",
                (True, True),
            ),
        ):
            with self.subTest(statement=statement):
                self.assertEqual(self.execute(statement), [expected])
        # The table is analysed, so the planner knows its size.
        self.assertEqual(self.execute("select reltuples from pg_class where relname = 'ships'"), [(4000,)])

    def test_any_seed(self) -> None:
        """The tables accept the world of any sizes and seed."""

        @settings(max_examples=20)
        @given(st.integers(1, 40), st.integers(0, 40), st.integers())
        def check(sectors: int, ships: int, seed: int) -> None:
            seen: list[int] = []
            self.assertTrue(make_world(txn, sectors, ships, seed, replace=True, progress=seen.append))
            counts = _count(txn)
            self.assertEqual((counts.sectors, counts.ports, counts.ships), (sectors, sectors, ships))
            self.assertEqual(sum(seen), 2 * sectors + ships)

        with blocking(self.url) as txn:
            check()

    def test_only_where_there_is_none(self) -> None:
        """An existing world is kept, unless it is to be replaced."""
        self.make(20, 30)
        before = self.digests()
        self.assertFalse(self.make(10, 10, 2))
        self.assertEqual(self.digests(), before)
        self.assertTrue(self.make(10, 10, 2, replace=True))
        self.assertEqual([self.execute(f"select count(*) from {table}") for table in ROWS], [[(10,)]] * 3)

    def test_whole_or_not(self) -> None:
        """Progress is reported for each chunk; an interrupt in between keeps the previous world."""
        self.make(20, 30)
        before = self.digests()
        self.patch(seed, "CHUNK_ROWS", 100)
        seen = []

        def progress(rows: int) -> None:
            seen.append(rows)
            if len(seen) == 8:
                raise KeyboardInterrupt

        self.assertRaises(KeyboardInterrupt, self.make, 250, 1000, replace=True, progress=progress)
        self.assertEqual(seen, [100, 100, 50, 100, 100, 50, 100, 100])
        self.assertEqual(self.digests(), before)

    @inlineCallbacks
    def test_two_at_once(self) -> Iterator[Deferred[Any]]:
        """Of two processes that make a world at once, the second waits, and keeps the world of the first."""
        with blocking(self.url) as txn:
            self.assertTrue(make_world(txn, 20, 30, 1))
            second = deferToThread(self.make, 20, 30, 2)
            waits = "select pid from pg_locks where locktype = 'advisory' and not granted"
            yield poll(lambda: self.execute(waits), "the second one waits")
        self.assertFalse((yield second))
        first = self.digests()
        self.make(20, 30, 1, replace=True)
        self.assertEqual(self.digests(), first)

    @inlineCallbacks
    def test_replaced_while_others_work(self) -> Iterator[Deferred[Any]]:
        """A replacement waits for its table locks in short tries, so that others can write, and names the holder."""
        self.patch(lock_wait, "PAUSE_S", 0.3)
        self.make(20, 30)
        holder = psycopg2.connect(self.url)
        self.addCleanup(holder.close)
        holder.cursor().execute("select from s2s_world.ships")
        told: list[str] = []

        def replace() -> None:
            with blocking(self.url) as txn:
                audit.sign(txn, "cli:alice", for_session=True)
                make_world(txn, 10, 10, 1, replace=True, tell=told.append)

        made = deferToThread(replace)
        yield poll(lambda: told)
        self.assertIn(f"pid {holder.info.backend_pid} holds them", told[0])
        self.execute("set lock_timeout = '10s'")
        self.execute("update s2s_world.ships set fuel = 0 where ship_id = 1")
        holder.rollback()
        yield made
        self.assertEqual(self.execute("select count(*) from s2s_world.ships"), [(10,)])
        self.assertEqual(self.execute("select actor from s2s.audit order by audit_id desc limit 1"), [("cli:alice",)])


class CommandTests(CliTestCase):
    """``s2s world``."""

    def test_seed(self) -> None:
        """A seeding prints one line, replaces a world only with ``--replace``, and is audited."""
        said = self.s2s("world", "seed", "--sectors", "30", "--ships", "50")
        self.assertRegex(said.stdout, r"^made 30 sectors, as many ports and 50 ships of seed 1 in [0-9.]+ s\n$")
        self.assertEqual(said.stderr, "")
        result = self.s2s("world", "seed", "--sectors", "3", "--ships", "5", expected=1)
        self.assertRegex(result.output, r"^Error: there is a world already: .*--replace.*\n$")
        told = self.json("world", "seed", "--sectors", "3", "--ships", "5", "--seed", "-9", "--replace")
        self.assertGreater(told.pop("seconds"), 0)
        self.assertEqual(told, {"sectors": 3, "ports": 3, "ships": 5, "seed": -9})
        audit = self.execute("select action, params from s2s.audit order by audit_id")
        self.assertEqual(
            audit,
            [
                ("world.seed", {"sectors": 30, "ports": 30, "ships": 50, "seed": 1, "replace": False}),
                ("world.seed", {**told, "replace": True}),
            ],
        )

    def test_sizes(self) -> None:
        """A size out of bounds is a usage error that names the option, and no world is made."""
        for sectors, ships in (("0", "1"), ("-1", "1"), ("10000001", "1"), ("1", "-1"), ("1", "10000001"), ("x", "1")):
            said = self.s2s("world", "seed", "--sectors", sectors, "--ships", ships, expected=2)
            self.assertIn("Error: Invalid value for '--s", said.stderr)
        self.assertEqual(self.json("world", "show")["sectors"], 0)

    def test_progress(self) -> None:
        """On a terminal, stderr shows a progress bar of the rows, and stdout holds only the JSON."""
        self.patch(seed, "CHUNK_ROWS", 10)
        argv = ("world", "seed", "--sectors", "30", "--ships", "50", "--json")
        said = self.s2s(*argv, env={"FORCE_COLOR": "1", "TERM": "xterm"})
        self.assertIn("110/110", said.stderr)
        self.assertEqual(json.loads(said.stdout)["ships"], 50)

    def test_show(self) -> None:
        """The counts are shown, also if there is no world."""
        self.assertEqual(set(self.json("world", "show").values()), {0})
        self.execute(
            "insert into s2s_world.sectors values (1, 'a', 'fedspace'), (2, 'b', 'neutral'), (3, 'c', 'port_closed')"
        )
        self.execute("insert into s2s_world.sectors select n, 'd', 'neutral' from generate_series(4, 5) n")
        self.execute("insert into s2s_world.ships select n, 1, 1, 1, 1, n / 5, 1 from generate_series(1, 6) n")
        counts = {"sectors": 5, "fedspace": 1, "neutral": 3, "port_closed": 1}
        counts |= {"ports": 0, "ships": 6, "ships_without_shields": 4}
        self.assertEqual(self.json("world", "show"), counts)
        shown = dict(line.split() for line in self.s2s("world", "show").output.splitlines())
        self.assertEqual(shown, {name: str(count) for name, count in counts.items()})
