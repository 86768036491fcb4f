"""Tables ``commands``, ``idempotency_keys`` and ``batch_notes``: accepting, claiming, charging."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from s2s.errors import StatementRefused
from s2s.store import driver
from s2s.store.driver import Cursor, Steps
from s2s.store.pool import blocking
from s2s.store.tables import claims, commands
from s2s.store.tables.commands import Charge, Outcome, Push
from s2s.store.tables.ready import Ready
from tests.support.postgres import DatabaseTestCase, RecordingCursor


def _push(key: str, content: int = 0, **more: Any) -> Push:
    return Push("test.run", key, bytes([content]) * 32, '{"n":1}', **more)


@st.composite
def _pushes(draw: st.DrawFn) -> Push:
    """Draw a push from few keys and contents, so that duplicates and conflicts occur."""
    return Push(
        draw(st.sampled_from(["test.run", "test.other"])),
        draw(st.sampled_from(["a", "b", "B", "c'\\"])),
        draw(st.sampled_from([bytes(32), b"\\'\0\xff" * 8])),
        draw(st.sampled_from(["{}", '{"text":"\\n\\\\\'%s"}'])),
        draw(st.integers(0, 1000)),
        draw(st.none() | st.integers(4102444800, 4102444900)),
    )


class PushTests(DatabaseTestCase):
    """:func:`commands.push_batch`, :func:`commands.push_one` and :func:`commands.push_singly`."""

    def push(self, *pushes: Push) -> list[Outcome]:
        """Push one batch and commit it."""
        with blocking(self.url) as txn:
            return driver.drive(txn, commands.push_batch(pushes))

    def push_alone(self, push: Push) -> list[Outcome]:
        """Push one command in the way in which the inbox pushes a lone command."""

        def work() -> Steps[list[Outcome]]:
            outcome = commands.pushed_one((yield commands.push_one(push)))
            if outcome is not None:
                return [outcome]
            return (yield from commands.push_batch([push]))

        with blocking(self.url) as txn:
            return driver.drive(txn, work())

    def test_order_of_arrival(self) -> None:
        """The cmd_ids follow the order of arrival, not the order of the keys."""
        outcomes = self.push(_push("c"), _push("a"), _push("b"))
        self.assertTrue(all(outcome.is_new for outcome in outcomes))
        self.assertEqual(
            self.execute("select idem_key, cmd_id from s2s.commands order by cmd_id"),
            [(key, outcome.cmd_id) for key, outcome in zip("cab", outcomes, strict=True)],
        )

    def test_what_is_stored(self) -> None:
        """Priority, due_at and payload are stored as pushed; a push without a due_at is due immediately."""
        self.push(_push("a", priority=7, due_at=4102444800), _push("b"))
        rows = self.execute(
            "select priority, extract(epoch from due_at)::bigint, payload, status, due_at <= now()"
            " from s2s.commands order by cmd_id"
        )
        self.assertEqual(rows[0], (7, 4102444800, {"n": 1}, "ready", False))
        self.assertEqual((rows[1][0], rows[1][4]), (100, True))

    def test_a_duplicate_has_the_live_status(self) -> None:
        """A duplicate returns the first command's id and current status, even after the command's row is removed."""
        (first,) = self.push(_push("a"))
        self.execute("update s2s.commands set status = 'done'")
        self.assertEqual(self.push(_push("a")), [Outcome(first.cmd_id, "done")])
        self.execute("update s2s.idempotency_keys set status = 'done'")
        self.execute("delete from s2s.commands")
        self.assertEqual(self.push(_push("a")), [Outcome(first.cmd_id, "done")])
        self.assertEqual(self.execute("select count(*) from s2s.commands"), [(0,)])

    @settings(max_examples=40)
    @given(st.lists(_pushes(), min_size=1, max_size=8))
    def test_one_by_one(self, pushes: list[Push]) -> None:
        """Pushing commands one by one, with the statement for a lone push, has the same result as pushing one batch."""
        made = []
        for way in (lambda: self.push(*pushes), lambda: [each for push in pushes for each in self.push_alone(push)]):
            self.execute("truncate s2s.commands, s2s.idempotency_keys restart identity")
            outcomes = way()
            # A duplicate push uses up a number of the sequence, so compare places instead of ids.
            places = {cmd_id: place for place, cmd_id in enumerate(dict.fromkeys(each.cmd_id for each in outcomes))}
            rows = self.execute(
                "select c.cmd_id, cmd_type, idem_key, payload, priority, c.status, fingerprint::text,"
                " case when due_at > now() then extract(epoch from due_at)::bigint end, k.cmd_id"
                " from s2s.commands c join s2s.idempotency_keys k using (idem_key) order by c.cmd_id"
            )
            told = [(places[each.cmd_id], each.status, each.is_new, each.is_conflict) for each in outcomes]
            made.append((told, [(places[cmd_id], *rest, places[known]) for cmd_id, *rest, known in rows]))
        self.assertEqual(*made)

    def test_a_refused_row_alone(self) -> None:
        """Pushed row by row, only the refused row fails; ids and winners of duplicates follow the order of arrival."""
        self.execute("alter table s2s.commands add check (idem_key <> 'bad')")
        with blocking(self.url) as txn:
            outcomes = commands.push_singly(txn, [_push("z"), _push("bad"), _push("a"), _push("z", 1), _push("a")])
        z, bad, a, z_again, a_again = outcomes
        self.assertIsInstance(bad, Exception)
        self.assertTrue(z.is_new and a.is_new and z.cmd_id < a.cmd_id)
        self.assertEqual(z_again, Outcome(z.cmd_id, "ready", is_conflict=True))
        self.assertEqual(a_again, Outcome(a.cmd_id, "ready"))
        self.assertEqual(self.execute("select idem_key from s2s.idempotency_keys order by 1"), [("a",), ("z",)])


class ClaimTests(DatabaseTestCase):
    """Candidates, batch notes and charges."""

    def setUp(self) -> None:
        """Open a transaction on a connection of its own."""
        super().setUp()
        self.txn = self.begin()

    def begin(self) -> Cursor:
        """Open a transaction that ends with the test."""
        context = blocking(self.url)
        txn = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return txn

    def insert(self, *rows: tuple[str, int, str, int]) -> None:
        """Store commands with the key, priority, SQL expression of due_at, and attempts of each."""
        for key, priority, due_at, attempts in rows:
            self.execute(
                "insert into s2s.commands (cmd_type, idem_key, payload, priority, due_at, attempts)"
                f" values ('test.run', %s, '{{}}', %s, {due_at}, %s)",
                key,
                priority,
                attempts,
            )

    def keys(self, cmd_ids: list[int]) -> list[str]:
        """Return the keys of commands."""
        known = dict(self.execute("select cmd_id, idem_key from s2s.commands"))
        return [known[cmd_id] for cmd_id in cmd_ids]

    def claim(self, worker: int = 0, limit: int = 10, boot_id: str = "boot") -> list[str]:
        """Claim and commit."""
        cmd_ids = claims.claim(self.txn, boot_id, worker, limit)
        self.txn.connection.commit()
        return self.keys(cmd_ids)

    def test_run_order(self) -> None:
        """Commands run by lower priority number, then earlier due_at, then lower cmd_id; a future command waits."""
        past = "now() - interval '1 hour'"
        self.insert(
            ("late", 5, "now()", 0),
            ("first", 1, past, 0),
            ("early", 5, past, 0),
            ("early2", 5, past.replace("'1", "'1.0"), 0),
            ("future", 0, "now() + interval '1 hour'", 0),
            ("last", 1000, past, 0),
        )
        self.execute(
            "update s2s.commands set due_at = (select due_at from s2s.commands where idem_key = 'early')"
            " where idem_key = 'early2'"
        )
        self.assertEqual(self.claim(), ["first", "early", "early2", "late", "last"])
        self.assertEqual(self.claim(limit=2), ["first", "early"])

    def test_batches_of_one_sort(self) -> None:
        """Commands that failed before are in batches of their own, and one that runs alone is a batch by itself."""
        past = "now() - interval '1 hour'"
        keys = ("a", 0), ("failed", 1), ("b", 0), ("killer", 1), ("failed too", 3)
        self.insert(*((key, 1, past, attempts) for key, attempts in keys), ("later", 2, past, 0), ("last", 2, past, 1))
        self.execute("update s2s.commands set runs_alone = true where idem_key = 'killer'")
        self.assertEqual(self.claim(0), ["a", "b"])
        self.assertEqual(self.claim(1), ["failed", "failed too"])
        self.assertEqual(self.claim(2), ["killer"])
        self.assertEqual(self.claim(3), ["later"])
        self.assertEqual(self.claim(4), ["last"])
        self.assertEqual(self.claim(5), [])

    def test_a_worker_has_one_note(self) -> None:
        """A new claim of a worker replaces its old batch, and a claim that finds no command leaves no note."""
        self.insert(("a", 1, "now()", 0))
        self.assertEqual(self.claim(0), ["a"])
        self.assertEqual(self.claim(0), ["a"])
        self.execute("update s2s.commands set status = 'done'")
        self.assertEqual(self.claim(0), [])
        self.assertEqual(self.execute("select * from s2s.batch_notes"), [])

    def test_a_million_in_the_future_cost_nothing(self) -> None:
        """A claim skips future commands of lower priority numbers in the index without reading them."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, priority, due_at)"
            " select 'test.run', 'f' || i, '{}', i % 10, now() + interval '1 day' from generate_series(1, 100000) i"
        )
        self.execute("vacuum analyze s2s.commands")
        self.insert(("now", 500, "now() - interval '1 second'", 0))
        self.assertEqual(self.claim(), ["now"])
        self.assertLess(self.look(), 300)
        ready = Ready()
        ready.candidates(self.txn, 10)
        self.assertGreater(ready.next_due_s(self.txn) or 0, 3600)

    def test_what_has_run_is_stepped_over_once(self) -> None:
        """A claim passes once, and not more often, over the commands that were done since the last vacuum."""
        self.execute("alter table s2s.commands set (autovacuum_enabled = off)")
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload) select 'test.run', 'r' || i, '{}'"
            " from generate_series(1, 50000) i"
        )
        self.execute("analyze s2s.commands")
        self.execute("update s2s.commands set status = 'done'")
        self.insert(("now", 100, "now()", 0))
        look = "select priority from s2s.commands where status = 'ready' order by priority, due_at limit 1"
        self.pages(look)  # the first reader visits each dead row, and marks its index entry as dead
        once = self.pages(look)
        self.assertGreater(once, 100)
        self.assertLess(self.look(), 1.2 * once)

    def look(self) -> int:
        """Count the pages that the search of a claim reads."""
        with self.txn.connection.cursor(cursor_factory=RecordingCursor) as recording:
            Ready().candidates(recording, 256)
            pages = recording.pages()
        self.txn.connection.rollback()
        return pages

    def pages(self, query: str) -> int:
        """Count the pages that a statement reads."""
        plan = self.execute("explain (analyze, buffers, format json) " + query)[0][0][0]["Plan"]
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    def test_take_skips_what_is_locked_or_over(self) -> None:
        """take() returns the commands of a batch that are still ready and not locked elsewhere, in run order."""
        self.insert(*((key, priority, "now()", 0) for key, priority in (("a", 3), ("b", 2), ("c", 1), ("d", 0))))
        ids = {key: cmd_id for cmd_id, key in self.execute("select cmd_id, idem_key from s2s.commands")}
        other = self.begin()
        commands.take(other, [ids["b"]])
        self.execute("update s2s.commands set status = 'cancelled' where idem_key = 'c'")
        self.assertEqual([command.idem_key for command in commands.take(self.txn, list(ids.values()))], ["d", "a"])

    def test_charges_end_in_death(self) -> None:
        """Each charge adds an attempt, an error and a pause of at most min(2^n, 300) s; the tenth is the last."""
        self.insert(("a", 1, "now()", 0))
        ((cmd_id,),) = self.execute("select cmd_id from s2s.commands")
        for attempt in range(1, 11):
            self.assertEqual(commands.charge(self.txn, [Charge(cmd_id, f"E: {attempt}")]), int(attempt == 10))
            self.txn.connection.commit()
            ((attempts, error, status, pause, finished),) = self.execute(
                "select attempts, error, status, extract(epoch from due_at - now())::float8, finished_at from"
                " s2s.commands"
            )
            self.assertEqual((attempts, error), (attempt, f"E: {attempt}"))
            self.assertEqual(status, "dead" if attempt == 10 else "ready")
            self.assertEqual(finished is None, attempt < 10)
            self.assertLessEqual(pause, min(2**attempt, 300))
        self.assertEqual(commands.charge(self.txn, [Charge(cmd_id, "again")]), 0)

    def test_stops(self) -> None:
        """A command is charged from the fourth stop on that interrupts it alone, and no other command of a batch is."""
        self.insert(("a", 0, "now()", 0), ("b", 0, "now()", 0))

        def stop() -> list[tuple[Any, ...]]:
            claims.release_all(self.txn, "boot")
            self.txn.connection.commit()
            self.assertEqual(self.execute("select count(*) from s2s.batch_notes"), [(0,)])
            return self.execute(
                "select stops, attempts, runs_alone, due_at > now() from s2s.commands order by idem_key"
            )

        for times in (1, 2, 3):
            self.assertEqual(self.claim(), ["a", "b"])
            self.assertEqual(stop(), [(times, 0, True if times == 3 else None, False)] * 2)
        self.assertEqual(self.claim(), ["a"])
        self.assertEqual(stop(), [(4, 1, True, True), (3, 0, True, False)])
        self.execute("update s2s.commands set due_at = '2020-01-01', attempts = 9 where idem_key = 'a'")
        self.assertEqual(self.claim(), ["a"])
        stop()
        [(status, error)] = self.execute("select status, error from s2s.commands where idem_key = 'a'")
        self.assertEqual(status, "dead")
        self.assertIn("5 times the process was stopped", error)

    def test_a_stop_while_a_command_is_locked(self) -> None:
        """A command that its stopped process still holds is counted later, once, by the reaper of another process."""
        self.insert(("a", 0, "now()", 0))
        self.assertEqual(self.claim(), ["a"])
        holder = self.begin()
        holder.execute("select from s2s.commands for update")
        claims.release_all(self.txn, "boot")
        self.txn.connection.commit()
        for _ in range(2):
            self.assertEqual(claims.reap(self.txn, "other", None, set()).charged, 0)
            self.txn.connection.commit()
            self.assertEqual(self.execute("select stops from s2s.commands"), [(None,)])
            self.assertEqual(self.claim(boot_id="other"), [])
        holder.connection.rollback()
        for _ in range(2):
            claims.reap(self.txn, "other", None, set())
            self.txn.connection.commit()
            self.assertEqual(self.execute("select stops, attempts from s2s.commands"), [(1, 0)])
        self.assertEqual(self.claim(boot_id="other"), ["a"])

    def test_a_clock_that_is_set_back(self) -> None:
        """A charge is written although the clock is set back meanwhile, and one that a trigger drops is refused."""
        self.insert(("a", 0, "now()", 0), ("b", 0, "now()", 0))
        [(a,), (b,)] = self.execute("select cmd_id from s2s.commands order by idem_key")
        self.txn.execute(
            "create function back() returns trigger language plpgsql as $$ begin"
            " if old.idem_key = 'a' then new.due_at := new.due_at - interval '1 hour'; return new; end if;"
            " return old; end $$;"
            "create trigger back before update on s2s.commands for each row execute function back()"
        )
        self.assertEqual(commands.charge(self.txn, [Charge(a, "E")]), 0)
        self.txn.execute("select attempts, error, due_at < now() from s2s.commands where cmd_id = %s", (a,))
        self.assertEqual(self.txn.fetchall(), [(1, "E", True)])
        with self.assertRaises(StatementRefused):
            commands.charge(self.txn, [Charge(b, "E")])

    def test_deaths_count_otherwise(self) -> None:
        """A command is dead after 50 deaths of its process, with pauses of at most 10 s, or after ten failures."""
        self.insert(("a", 1, "now()", 0), ("b", 1, "now()", 0))
        a, b = (cmd_id for (cmd_id,) in self.execute("select cmd_id from s2s.commands order by cmd_id"))
        for attempt in range(1, 51):
            died = {a, b} if attempt <= 30 else {a}
            dead = commands.charge(self.txn, [Charge(cmd_id, "died or failed", cmd_id in died) for cmd_id in (a, b)])
            self.txn.connection.commit()
            self.assertEqual(dead, {40: 1, 50: 1}.get(attempt, 0), attempt)
            pauses = "select max(extract(epoch from due_at - now()))::float8 from s2s.commands where cmd_id = any(%s)"
            self.assertLessEqual(self.execute(pauses, sorted(died))[0][0], 10)
        self.assertEqual(
            self.execute("select attempts, deaths, status from s2s.commands order by cmd_id"),
            [(50, 50, "dead"), (40, 30, "dead")],
        )
