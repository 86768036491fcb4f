"""Which commands run next: finished ones are not read again, and none below a start point is lost."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.store.tables import claims, commands, lookback, ready
from s2s.store.tables.lookback import LEAST_S, SHARE, SLACK_S, Lookback
from s2s.store.tables.ready import FIND_S, Ready
from tests.support.postgres import DatabaseTestCase, RecordingCursor

_ROW = tuple[str, int, float, str]


class LookbackTests(SynchronousTestCase):
    """:class:`s2s.store.tables.lookback.Lookback`."""

    def setUp(self) -> None:
        """Make a lookback with a simulated clock."""
        self.now = 0.0
        self.lookback = Lookback(lambda: self.now)

    def costs(self, *seconds: float) -> None:
        """Measure look-backs of these costs, in seconds."""
        for cost in seconds:
            with self.lookback.measured():
                self.now += cost

    def test_share_of_the_time(self) -> None:
        """After a look-back of c seconds the next one is due 20 c seconds later, and none is due meanwhile."""
        self.assertTrue(self.lookback.is_due)
        self.costs(0.0, 0.005, 0.02, 0.08, 0.3, 1.2)
        with self.lookback.measured():
            self.now += 3.0
            self.assertFalse(self.lookback.is_due)
        self.now += SHARE * 3.0 - 0.1
        self.assertFalse(self.lookback.is_due)
        self.now += 0.2
        self.assertTrue(self.lookback.is_due)
        self.assertFalse(self.lookback.is_cheap)

    def test_cheap(self) -> None:
        """After a look-back that costs nothing the next one is due a quarter of a second later."""
        with self.lookback.measured():
            pass
        self.assertTrue(self.lookback.is_cheap)
        self.assertFalse(self.lookback.is_due)
        self.now += LEAST_S
        self.assertTrue(self.lookback.is_due)

    def test_one_that_fails(self) -> None:
        """A look-back that fails is repeated on schedule."""
        self.costs(0.0, 0.005, 0.02, 0.08, 0.3)
        with self.assertRaises(ZeroDivisionError), self.lookback.measured():
            self.now += 1.0
            raise ZeroDivisionError
        self.assertFalse(self.lookback.is_due)
        self.now += SHARE
        self.assertTrue(self.lookback.is_due)

    def test_a_database_that_stands_still(self) -> None:
        """After one look-back of 20 s, as in an outage, the next one is due soon, since the cost is capped."""
        self.costs(0.001, 20.0)
        self.assertFalse(self.lookback.is_due)
        self.now += LEAST_S
        self.assertTrue(self.lookback.is_due)


class ReadyTests(DatabaseTestCase):
    """:class:`s2s.store.tables.ready.Ready`, through :func:`s2s.store.tables.claims.claim`."""

    def setUp(self) -> None:
        """Make a process that serves one type, whose look-backs the test starts and which are never cheap."""
        super().setUp()
        self.patch(lookback, "CHEAP_S", -1.0)
        self.now = 0.0
        self.ready = self.process()
        self.txn = self.begin()
        self.batches = 0

    def process(self) -> Ready:
        """Return the state of a process that has just started."""
        return Ready(["test.run"], lambda: self.now)

    def begin(self) -> Cursor:
        """Open a transaction that ends with the test."""
        context = blocking(self.url)
        txn = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return txn

    def hold_snapshot(self) -> None:
        """Hold a snapshot until the test ends, as a forgotten psql does."""
        self.begin().execute("set transaction isolation level repeatable read; select 1")

    def insert(self, *rows: _ROW, execute: Any = None) -> None:
        """Insert commands: key, priority, seconds until due, type."""
        for key, priority, due_in, cmd_type in rows:
            statement = (
                "insert into s2s.commands (cmd_type, idem_key, payload, priority, due_at)"
                " values (%s, %s, '{}', %s, clock_timestamp() + %s * interval '1 s')"
            )
            params = (cmd_type, key, priority, due_in)
            if execute is None:
                self.execute(statement, *params)
            else:
                execute(statement, params)

    def fill(self, count: int, cmd_type: str = "test.run") -> None:
        """Insert many commands that have been due for a minute."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, due_at)"
            " select %s, %s || n, '{}', now() - interval '1 minute' from generate_series(1, %s) n",
            cmd_type,
            cmd_type,
            count,
        )

    def run_batch(self, limit: int = 10) -> list[str]:
        """Claim and finish a batch, and return its keys in order."""
        self.batches += 1
        cmd_ids = claims.claim(self.txn, "boot", 0, limit, ready=self.ready)
        self.txn.connection.commit()
        commands.finish(self.txn, cmd_ids)
        claims.release(self.txn, "boot", 0)
        self.txn.connection.commit()
        known = dict(self.execute("select cmd_id, idem_key from s2s.commands where cmd_id = any(%s)", cmd_ids))
        return [known[cmd_id] for cmd_id in cmd_ids]

    def run_all(self) -> list[str]:
        """Run batches until a claim finds no command."""
        ran = []
        while batch := self.run_batch(256):
            ran += batch
        return ran

    def pages(self) -> int:
        """Count the pages that the scan of a claim reads."""
        with blocking(self.url) as txn:
            txn.execute("set local enable_seqscan = off")
            with txn.connection.cursor(cursor_factory=RecordingCursor) as recording:
                self.ready.candidates(recording, 256)
                return recording.pages()

    def test_dead_front(self) -> None:
        """While a snapshot is held, a claim reads the waiting commands and not the finished ones."""
        self.hold_snapshot()
        self.fill(20_000)
        self.assertEqual(len(self.run_all()), 20_000)
        self.insert(("next", 100, 0, "test.run"))
        self.assertLess(self.pages(), 100)
        self.ready = self.process()
        self.assertGreater(self.pages(), 300)
        self.assertEqual(self.run_batch(), ["next"])

    def test_dead_notes(self) -> None:
        """While a snapshot is held, neither a claim nor a batch reads the notes of earlier batches."""
        self.hold_snapshot()
        self.insert(("a", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a"])
        self.execute(
            "insert into s2s.batch_notes (boot_id, worker, cmd_ids)"
            " select 'boot', 0, array[n] from generate_series(1000, 21000) n"
        )
        self.execute("delete from s2s.batch_notes")
        self.insert(("b", 100, 0, "test.run"))
        self.assertGreater(self.pages(), 200)
        self.assertEqual(self.run_batch(), ["b"])
        self.insert(("c", 100, 0, "test.run"))
        cmd_ids = claims.claim(self.txn, "boot", 0, 10, ready=self.ready)
        self.txn.connection.commit()
        with self.txn.connection.cursor(cursor_factory=RecordingCursor) as recording:
            self.assertEqual(claims.claimed(recording, "boot", 0, self.ready.notes[0])[0], cmd_ids)
            self.assertLess(recording.pages(), 20)
        claims.release(self.txn, "boot", 0)
        self.txn.connection.commit()
        self.assertLess(self.pages(), 100)

    def test_unserved_front(self) -> None:
        """Commands of an unserved type cost one scan, and stay unchanged for a process that serves the type."""
        self.fill(20_000, "test.other")
        before = self.execute("select min(due_at), max(due_at), sum(attempts) from s2s.commands")
        self.insert(("mine", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["mine"])
        self.insert(("mine too", 100, 0, "test.run"))
        self.assertLess(self.pages(), 100)
        self.assertEqual(self.run_batch(), ["mine too"])
        after = "select min(due_at), max(due_at), sum(attempts) from s2s.commands where cmd_type = 'test.other'"
        self.assertEqual(self.execute(after), before)
        self.ready = Ready(["test.other"])
        self.assertEqual(len(self.run_batch(256)), 256)

    def test_only_unserved(self) -> None:
        """If only commands of unserved types wait, scans step past them too."""
        self.fill(20_000, "test.other")
        self.assertEqual(self.run_batch(), [])
        self.assertLess(self.pages(), 100)

    def test_served_anew(self) -> None:
        """Commands of a type that the process begins to serve are found by the next claim."""
        self.fill(20, "test.other")
        self.assertEqual(self.run_batch(), [])
        self.ready.serve(["test.run", "test.other"])
        self.assertEqual(len(self.run_batch(256)), 20)

    def test_many_at_one_moment(self) -> None:
        """The start point also moves past commands with the same due_at, as after a bulk load."""
        self.hold_snapshot()
        self.fill(20_000)
        self.assertEqual(self.execute("select count(distinct due_at) from s2s.commands"), [(1,)])
        self.execute("update s2s.commands set due_at = now() - interval '1 hour'")
        for _ in range(60):
            self.assertEqual(len(self.run_batch(256)), 256)
        pages = self.pages()
        self.ready = self.process()
        self.assertGreater(self.pages(), pages + 200)

    def test_a_late_commit(self) -> None:
        """A late commit is found at once if its due_at is within the slack, otherwise after the next look-back."""
        for age, is_at_once in ((SLACK_S / 4, True), (60.0, False)):
            late = self.begin()
            self.insert((f"late {age}", 100, -age, "test.run"), execute=late.execute)
            self.insert((f"early {age}", 100, 0, "test.run"))
            self.assertEqual(self.run_batch(), [f"early {age}"])
            late.connection.commit()
            if not is_at_once:
                self.assertEqual(self.run_batch(), [])
                self.now += LEAST_S
            self.assertEqual(self.run_batch(), [f"late {age}"])

    def test_bytes_of_a_batch(self) -> None:
        """A batch ends before its uncompressed payloads exceed the byte limit, but has at least one command."""
        self.patch(ready, "MOST_BYTES", 1_000_000)
        self.insert(*((f"k{n}", 100, 0, "test.run") for n in range(5)))
        self.execute(
            "update s2s.commands set payload = jsonb_build_object('x', repeat('x', case idem_key when 'k3' then 2000000"
            " else 400000 end)) where idem_key <> 'k4'"
        )
        [(stored,)] = self.execute("select max(pg_column_size(payload)) from s2s.commands where idem_key <> 'k3'")
        self.assertLess(stored, 10_000)
        self.assertEqual([self.run_batch() for _ in range(4)], [["k0", "k1"], ["k2"], ["k3"], ["k4"]])

    def test_due_never(self) -> None:
        """A command that is due at infinity waits, and does not hide other commands."""
        self.insert(("never", 100, 0, "test.run"), ("soon", 100, 3600, "test.run"), ("only", 50, 0, "test.run"))
        self.execute("update s2s.commands set due_at = 'infinity' where idem_key in ('never', 'only')")
        self.assertEqual(self.run_batch(), [])
        self.assertLessEqual(self.ready.next_due_s(self.txn) or 0, 3600)
        self.execute("delete from s2s.commands where idem_key = 'soon'")
        self.assertEqual(self.run_batch(), [])
        self.assertGreater(self.ready.next_due_s(self.txn) or 0, 3600)

    def test_two_workers(self) -> None:
        """A claim uses the look-back result that was known when it began, whatever another worker finds meanwhile."""
        self.insert(("a", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a"])
        self.insert(("b", 100, 0, "test.run"), ("c", 100, 0, "test.run"), ("past", 100, -3600, "test.run"))
        ids = dict(self.execute("select idem_key, cmd_id from s2s.commands"))
        scan = self.ready._scan

        def look_back_meanwhile(*args: Any) -> Any:
            found = scan(*args)
            self.ready._lookback.behind = [ids["past"]]
            return found

        self.patch(self.ready, "_scan", look_back_meanwhile)
        self.assertEqual(self.run_batch(), ["b", "c"])
        self.assertEqual(self.run_batch(), ["past"])

    def test_due_in_the_past(self) -> None:
        """A command with a due_at before those of finished commands runs first, after the next look-back."""
        self.insert(("a", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a"])
        self.insert(("now", 100, 0, "test.run"), ("past", 100, -3600, "test.run"), ("low", 900, -7200, "test.run"))
        self.now += LEAST_S
        self.assertEqual(self.run_batch(), ["past", "now", "low"])

    def test_run_again(self) -> None:
        """A finished command that is set ready by hand, with a new or its old due_at, is found."""
        self.insert(("a", 100, -60, "test.run"), ("b", 100, -30, "test.run"), ("c", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a", "b", "c"])
        self.execute("update s2s.commands set status = 'ready', due_at = now() where idem_key = 'b'")
        self.assertEqual(self.run_batch(), ["b"])
        self.execute("update s2s.commands set status = 'ready' where idem_key = 'a'")
        self.now += LEAST_S
        self.assertEqual(self.run_batch(), ["a"])

    def test_a_batch_given_back(self) -> None:
        """A command that another process releases is found, even below our start point."""
        self.insert(("theirs", 100, -60, "test.run"))
        other = self.begin()
        self.assertEqual(len(claims.claim(other, "other", 0, 10, ready=self.process())), 1)
        other.connection.commit()
        self.insert(("ours", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["ours"])
        claims.release_all(other, "other")
        other.connection.commit()
        self.now += LEAST_S
        self.assertEqual(self.run_batch(), ["theirs"])

    def test_new_priorities(self) -> None:
        """A command of a known, empty priority is found at once, one of a new priority by the next search."""
        self.insert(("a", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a"])
        self.insert(("100", 100, 0, "test.run"), ("7", 7, -60, "test.run"), ("500", 500, -60, "test.run"))
        self.insert(("8", 8, -60, "test.run"))
        self.now += FIND_S
        self.assertEqual(self.run_batch(), ["7", "8", "100", "500"])
        self.insert(("7 again", 7, 0, "test.run"), ("9", 9, 0, "test.run"), ("-1", -1, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["7 again"])
        self.now += FIND_S
        self.assertEqual(self.run_batch(), ["-1", "9"])

    def test_dead_priorities(self) -> None:
        """While a snapshot is held, a claim reads no priority whose commands finished before the process started."""
        self.hold_snapshot()
        self.fill(20_000)
        self.assertEqual(len(self.run_all()), 20_000)
        self.ready = self.process()
        self.insert(("a", 500, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a"])
        self.insert(("b", 500, 0, "test.run"))
        self.assertLess(self.pages(), 100)
        self.assertEqual(self.run_batch(), ["b"])
        self.insert(("again", 100, 0, "test.run"))
        self.now += FIND_S
        self.assertEqual(self.run_batch(), ["again"])

    def test_empty_priorities_take_no_room(self) -> None:
        """Priorities whose commands are not due yet do not shorten a small batch."""
        for priority in range(10):
            self.insert((f"later {priority}", priority, 3600, "test.run"))
        self.insert(("a", 100, 0, "test.run"), ("b", 100, 0, "test.run"), ("c", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(2), ["a", "b"])
        self.assertGreater(self.ready.next_due_s(self.txn) or 0, 3500)

    def test_more_behind_than_a_batch(self) -> None:
        """If more than a batch appears below the start point, scans begin at the start of the index, in order."""
        self.insert(("a", 100, 0, "test.run"))
        self.assertEqual(self.run_batch(), ["a"])
        for number in range(25):
            self.insert((f"{number:02}", 100, number - 3600, "test.run"))
        self.now += LEAST_S
        ran = [*self.run_batch(), *self.run_batch(), *self.run_batch()]
        self.assertEqual(ran, [f"{number:02}" for number in range(25)])

    def test_more_priorities_than_are_remembered(self) -> None:
        """Commands run even if there are more priorities than start points, which only SQL can cause."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, priority)"
            " select 'test.run', n::text, '{}', n from generate_series(1, 3000) n"
        )
        self.assertEqual(len(self.run_all()), 3000)

    @settings(max_examples=25)
    @given(st.data())
    def test_nothing_is_lost(self, data: st.DataObject) -> None:
        """Whatever the order of inserts and commits, past due times and priorities, each served command runs once."""
        self.execute("delete from s2s.commands")
        self.ready = self.process()
        late: list[Cursor] = []
        ran: list[str] = []
        served: set[str] = set()
        for number in range(data.draw(st.integers(1, 12))):
            action = data.draw(
                st.sampled_from(["insert", "insert late", "commit", "run", "run one", "wait", "restart"])
            )
            if action.startswith("insert"):
                row = (
                    str(number),
                    data.draw(st.sampled_from([0, 1, 100, 1000])),
                    data.draw(st.sampled_from([-3600.0, -1.0, 0.0])),
                    data.draw(st.sampled_from(["test.run", "test.other"])),
                )
                served |= {row[0]} if row[3] == "test.run" else set()
                if action == "insert":
                    self.insert(row)
                else:
                    late.append(self.begin())
                    self.insert(row, execute=late[-1].execute)
            elif action == "commit" and late:
                late.pop().connection.commit()
            elif action == "wait":
                self.now += LEAST_S
            elif action == "restart":
                self.ready = self.process()
            elif action.startswith("run"):
                ran += self.run_batch(1 if action == "run one" else 10)
        for txn in late:
            txn.connection.commit()
        self.now += LEAST_S
        ran += self.run_all()
        self.assertEqual(sorted(ran), sorted(served))
        self.assertEqual(
            self.execute("select count(*) from s2s.commands where status = 'ready' and cmd_type = 'test.run'"), [(0,)]
        )


class CheapTests(DatabaseTestCase):
    """Scans from the beginning of the index that cost nothing."""

    def test_idle(self) -> None:
        """A scan that finds nothing is followed at once by one from the beginning, so no command waits."""
        self.patch(lookback, "CHEAP_S", float("inf"))
        ready = Ready(None, lambda: 0.0)
        insert = (
            "insert into s2s.commands (cmd_type, idem_key, payload, due_at)"
            " values ('test.run', %s, '{}', to_timestamp(%s))"
        )
        for key, due_at in (("a", 1_000_000), ("b", 5)):
            self.execute(insert, key, due_at)
            with blocking(self.url) as txn:
                [found] = ready.candidates(txn, 10)
                commands.finish(txn, [found.cmd_id])
