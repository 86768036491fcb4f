"""A database clock that is wrong for a while: the warnings, and the repair of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, execute, fail, inlineCallbacks, succeed
from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseError, DatabaseUnavailable, StatementRefused
from s2s.handlers.jobs import parse_schedule
from s2s.runtime.clock import Clock, suspended_s
from s2s.store import driver
from s2s.store.monitors import clock_watch
from s2s.store.monitors.clock_watch import ADOPT_S, LOOK_S, ClockWatch
from s2s.store.pool import blocking
from s2s.store.tables import (
    actions,
    clock_drift,
    commands,
    commands_admin,
    jobs,
    outbox,
    ready,
    retention,
    rotation,
    tokens,
)
from s2s.store.tables.clock_drift import ENGINE_RULES, SERVER_RULES
from s2s.store.tables.commands import Push
from s2s.store.tables.retention import Keep
from s2s.store.troubles import TELL_S, Troubles
from tests.support import clock_fault
from tests.support.peer import PUSH, command
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import RoleTestCase
from tests.support.waiting import poll

_NOW = 1_800_000_000.0


class _Database:
    """A database whose clock the test sets.

    :ivar ahead_s: seconds by which its clock is ahead.
    :ivar wait_s: seconds of the fake clock that pass before, and again after, a check reads the database's clock.
    """

    def __init__(self, time: FakeClock) -> None:
        self.time = time
        self.ahead_s = 0.0
        self.wait_s = 0.0
        self.is_away = False
        self.healed: list[dict[str, int]] = []
        self.refused: dict[str, DatabaseError] = {}
        self.troubles = Troubles(time)
        self.steps: list[Any] = []
        #: For each check, whether it took the database's clock to be behind.
        self.behind: list[bool] = []

    def run(self, function: Any, *args: Any) -> Deferred[Any]:
        if self.is_away:
            return fail(DatabaseUnavailable("gone"))
        if function is not clock_drift.look:
            self.steps.append(args)
            return execute(function, *args)
        self.time.rightNow += self.wait_s
        at = _NOW + self.time.seconds() + self.ahead_s
        self.behind.append(args[1](at))
        self.time.rightNow += self.wait_s
        return succeed((at, self.healed.pop(0) if self.healed else {}, self.refused))


class WatchTests(SynchronousTestCase):
    """The log lines of :class:`ClockWatch`, and when it trusts the database's clock."""

    def setUp(self) -> None:
        """Make a watch on a fake clock and a fake database."""
        self.time = FakeClock()
        self.database = _Database(self.time)
        self.wall_off_s = 0.0
        self.places: list[Any] = []
        #: The number of rows that each step pulls back.
        self.found: list[int] = []
        clock = Clock(self.time, lambda: _NOW + self.time.seconds() + self.wall_off_s)
        self.watch = ClockWatch(self.database, clock, {}, {"commands": self.step})  # type: ignore[arg-type]

    def step(self, place: Any) -> tuple[int, Any]:
        """Return the next row count and place that the test has set."""
        return self.found.pop(0) if self.found else 0, self.places.pop(0) if self.places else None

    def looks(self, count: int = 1) -> list[str]:
        """Run some checks, and return the log lines."""
        with capturedLogs() as logs:
            if not self.watch._looking.running:
                self.watch.start()
                self.addCleanup(self.watch.stop)
                count -= 1
            for _ in range(count):
                self.time.advance(LOOK_S)
        return [each["text"] if "text" in each else each["log_format"] for each in logs]

    def test_right(self) -> None:
        """A correct clock is trusted after the first check, and nothing is logged, even if the checks are slow."""
        self.assertFalse(self.watch.is_trusted)
        self.assertEqual(self.looks(3), [])
        self.database.wait_s = 400.0
        self.assertEqual(self.looks(3), [])
        self.assertTrue(self.watch.is_trusted)

    def test_a_leap(self) -> None:
        """A leap is logged once, and its end is logged once; in between the clock is not trusted."""
        self.looks()
        for ahead_s, way in ((7200.0, "7200 s ahead"), (-7200.0, "7200 s back"), (400 * 86400.0, "34560000 s ahead")):
            with self.subTest(way=way):
                self.database.ahead_s = ahead_s
                (told,) = self.looks(3)
                self.assertIn(f"the database's clock has leapt {way}", told)
                self.assertFalse(self.watch.is_trusted)
                self.database.ahead_s = 0.0
                self.assertEqual(self.looks(3), ["the database's clock is back where it was before it leapt"])
                self.assertTrue(self.watch.is_trusted)
                self.looks(20)

    def test_behind(self) -> None:
        """A check takes the clock to be behind only while it is, even if the database is slow."""
        for wait_s in (0.0, 400.0):
            self.database.wait_s = wait_s
            for ahead_s in (0.0, -7200.0, 0.0, 7200.0, 0.0):
                self.database.ahead_s = ahead_s
                self.looks(2)
                self.assertEqual(self.database.behind[-1], ahead_s < 0, (wait_s, ahead_s))

    def test_behind_from_the_start(self) -> None:
        """The first check of a process recognises a clock that is behind by comparing it with this machine's clock."""
        self.database.ahead_s = -7200.0
        self.looks(3)
        self.database.ahead_s = 0.0
        self.looks(2)
        self.assertEqual((self.database.behind[:3], self.database.behind[-1]), ([True] * 3, False))

    def test_both_clocks_leap(self) -> None:
        """A leap that this machine's clock shares, as with a database on the same machine, is logged as well."""
        self.looks()
        self.wall_off_s = self.database.ahead_s = 7200.0
        (told,) = self.looks(3)
        self.assertIn("7200 s ahead", told)
        self.assertFalse(self.watch.is_trusted)

    def test_both_clocks_are_set_right(self) -> None:
        """A shared leap back is logged as a possible correction, and the clock is taken to be behind for an hour."""
        for off_s in (0.0, 90.0):
            with self.subTest(off_s=off_s):
                self.setUp()
                self.wall_off_s, self.database.ahead_s = 7200.0, 7200.0 + off_s
                self.looks(3)
                self.wall_off_s, self.database.ahead_s = 0.0, off_s
                (told,) = self.looks(3)
                self.assertIn("the database's clock and this machine's have leapt 7200 s back: either", told)
                self.assertIn("or they were wrong before", told)
                self.assertTrue(self.database.behind[-1])
                self.looks(int(ADOPT_S / LOOK_S) + 3)
                self.assertFalse(self.database.behind[-1])
                self.assertTrue(self.watch.is_trusted)

    def test_set_right(self) -> None:
        """A clock that stays at its new time is trusted again after ADOPT_S (an hour)."""
        self.looks()
        self.wall_off_s = self.database.ahead_s = 7200.0
        told = self.looks(int(ADOPT_S / LOOK_S) + 3)
        self.assertEqual(len(told), 2, told)
        self.assertIn("it is trusted", told[-1])
        self.assertTrue(self.watch.is_trusted)

    def test_wrong_from_the_start(self) -> None:
        """A clock that is ahead at the start is detected by this machine's clock, and is trusted once both agree."""
        self.database.ahead_s = 7200.0
        (told,) = self.looks(3)
        self.assertIn("is 7200 s ahead of this machine's", told)
        self.assertFalse(self.watch.is_trusted)
        self.database.ahead_s = 0.0
        self.assertEqual(self.looks(3), ["the database's clock is right again"])
        self.assertTrue(self.watch.is_trusted)

    def test_suspended(self) -> None:
        """A suspension of the machine for hours, during which the monotonic clock stands still, is not a leap."""
        self.looks()
        self.patch(clock_watch, "suspended_s", lambda: 7200.0 + suspended_s())
        self.wall_off_s = self.database.ahead_s = 7200.0
        self.assertEqual(self.looks(3), [])
        self.assertTrue(self.watch.is_trusted)

    def test_slow_drift(self) -> None:
        """A clock that drifts by 0.25 s per check is never taken for a leap."""
        self.looks()
        for _ in range(200):
            self.database.ahead_s += 0.25
            self.assertEqual(self.looks(), [])
        self.assertTrue(self.watch.is_trusted)

    def test_bounded_lines(self) -> None:
        """A clock that leaps at every check causes a bounded number of log lines per minute."""
        self.looks()
        told = []
        for _ in range(120):
            self.database.ahead_s = 7200.0 - self.database.ahead_s
            told += self.looks()
        # Ten full minutes, and the minute that has begun.
        self.assertLessEqual(len(told), 11 * clock_watch.MOST_TOLD)
        self.assertGreaterEqual(len(told), 10)

    def test_what_was_pulled_back(self) -> None:
        """Rows pulled back are logged in one line, and a check that reached its row limit continues immediately."""
        self.database.healed = [{"jobs": 2, "orders": clock_drift.STEP_ROWS}, {"orders": 3}]
        self.assertEqual(self.looks(), ["times that lay too far in the future were reset: 2 jobs, 1003 orders"])

    def test_cycles(self) -> None:
        """A table of one step is scanned at each check; a larger one after a leap, and every ten minutes."""
        self.looks(3)
        self.assertEqual(len(self.database.steps), 3)
        self.places = ["a", "b"]
        self.looks()
        self.assertEqual(self.database.steps[3:], [(None,), ("a",), ("b",)])
        self.looks(10)
        self.assertEqual(len(self.database.steps), 6)
        self.database.ahead_s = 7200.0
        self.looks()
        self.assertEqual(len(self.database.steps), 7)
        self.places = ["a"]
        self.looks()
        self.looks(int(clock_watch.CYCLE_S / LOOK_S))
        self.assertEqual(len(self.database.steps), 10)

    def test_a_cycle_that_pulled_back(self) -> None:
        """A large table in which a row was pulled back is scanned again at the next check."""
        self.places, self.found = ["a"], [1000, 3]
        self.looks()
        self.assertEqual(len(self.database.steps), 2)
        self.places = ["a", "b"]
        self.looks()
        self.assertEqual(len(self.database.steps), 5)
        self.looks(10)
        self.assertEqual(len(self.database.steps), 5)

    def test_away(self) -> None:
        """While the database is away, one line is logged, its clock is not trusted, and the checks continue."""
        self.looks()
        self.assertTrue(self.watch.is_trusted)
        self.database.is_away = True
        self.assertEqual(self.looks(5), ["the database's clock is not watched for the moment: {why}"])
        self.assertFalse(self.watch.is_trusted)
        self.database.is_away = False
        self.looks()
        self.assertTrue(self.watch.is_trusted)
        self.database.ahead_s = 7200.0
        self.assertEqual(len(self.looks(2)), 1)

    def test_what_is_refused(self) -> None:
        """Rows that the database refuses to change are logged once a minute, and the clock is still checked."""
        self.looks()
        self.addCleanup(self.database.troubles.stop)
        self.database.refused = {"orders": StatementRefused("a trigger", state="P0001")}
        with capturedLogs() as logs:
            self.looks(int(2 * TELL_S / LOOK_S))
        told = [formatEvent(each) for each in logs]
        self.assertEqual(len(told), 2, told)
        self.assertIn("times of orders are not pulled back: a trigger (SQLSTATE P0001)", told[0])
        self.assertTrue(self.watch.is_trusted)
        self.database.ahead_s = 7200.0
        self.looks()
        self.assertFalse(self.watch.is_trusted)

    def test_a_step_that_is_refused(self) -> None:
        """A table whose rows the database refuses to change does not keep the other tables from being scanned."""
        self.addCleanup(self.database.troubles.stop)

        def refuse(_: Any) -> Any:
            raise StatementRefused("a trigger")

        self.watch._steps = {"commands": refuse, "notices": self.step}
        self.found = [2]
        self.assertIn("were reset: 2 notices", self.looks()[-1])
        self.assertTrue(self.watch.is_trusted)


class RuleTests(DatabaseTestCase):
    """:mod:`s2s.store.tables.clock_drift`, on rows that were written while the clock was ahead."""

    def heal(self) -> dict[str, int]:
        """Pull back rows by the rules of both roles, and return the row counts."""
        with blocking(self.url) as txn:
            healed = clock_drift.look(txn, ENGINE_RULES)[1] | clock_drift.look(txn, SERVER_RULES)[1]
            for name, step in clock_drift.SERVER_STEPS.items():
                count, place = step(txn)
                self.assertIsNone(place)
                healed |= {name: count} if count else {}
        return healed

    def value(self, query: str) -> Any:
        """Return the single value of a query."""
        [(value,)] = self.execute(query)
        return value

    def test_nothing(self) -> None:
        """Valid future times are left unchanged: those of jobs, pauses, leases, keys, tokens and delayed commands."""
        with blocking(self.url) as txn:
            schedules = {"a": "every:10s", "b": "every:86400s", "c": "daily@00:00Z"}
            jobs.declare(txn, "boot-1", schedules, lambda schedule, ts: parse_schedule(schedule).next_after(ts))
            outbox.put(txn, "test.run", "leased", {})
            outbox.put(txn, "test.run", "put off", {})
            outbox.Claims().claim(txn, 1, 5.0)
            outbox.retry(txn, [(2, 60.0, "paused", "")])
        self.execute("update s2s.jobs set attempts = 9, retry_at = now() + interval '300 seconds' where job_type = 'a'")
        self.execute("insert into s2s.orders (rpc, params) values ('test.v1', '{}')")
        for due in ("now() + interval '1 day'", "'infinity'", "now() - interval '1 day'", "now()"):
            self.execute(
                f"insert into s2s.commands (cmd_type, idem_key, payload, due_at) values ('t', 'k', '{{}}', {due})"
            )
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, attempts, due_at)"
            " values ('t', 'k', '{}', 9, now() + interval '300 seconds')"
        )
        self.execute(
            "insert into s2s.s2s_keys (key_id, key_b64, role, active_from) values ('k', 'x', 'any', '2100-01-01')"
        )
        with blocking(self.url) as txn:
            tokens.add(txn, "t", "observer", "", 400)
        self.assertEqual(self.heal(), {})

    def test_jobs(self) -> None:
        """A job is due at a time of its schedule within one period, and its next attempt within five minutes."""
        for ahead in ("2 hours", "400 days"):
            for job_type, schedule in (("often", "every:10s"), ("seldom", "every:3600s"), ("daily", "daily@03:00Z")):
                with self.subTest(ahead=ahead, schedule=schedule):
                    self.execute("delete from s2s.jobs")
                    at = self.value(f"select extract(epoch from now() + interval '{ahead}')::bigint")
                    due_at = parse_schedule(schedule).next_after(at)
                    self.execute(
                        "insert into s2s.jobs (job_type, schedule, due_at) values (%s, %s, to_timestamp(%s))",
                        job_type,
                        schedule,
                        due_at,
                    )
                    self.heal()
                    [(healed, now)] = self.execute(
                        "select extract(epoch from due_at)::bigint, extract(epoch from now())::bigint from s2s.jobs"
                    )
                    period = parse_schedule(schedule)
                    # A time ahead by less than a period plus the slack is left unchanged.
                    self.assertLessEqual(healed, now + period.every_s + clock_drift.SLACK_S)
                    self.assertEqual(healed % period.every_s, period.offset_s)
        self.execute("update s2s.jobs set due_at = now(), attempts = 1, retry_at = now() + interval '2 hours'")
        self.assertEqual(self.heal(), {"daily jobs": 1})
        self.assertTrue(self.value("select retry_at <= now() from s2s.jobs"))

    def test_a_row_that_is_refused(self) -> None:
        """A table whose trigger refuses the change is reported with the SQLSTATE, and other tables are repaired."""
        self.execute(
            "insert into s2s.orders (order_id, rpc, params, stepped_at) values ('o', 't', '{}', now() + '1 day')"
        )
        with blocking(self.url) as txn:
            outbox.put(txn, "test.run", "late", {})
        self.execute("update s2s.outbox set send_at = now() + interval '1 day'")
        for refusal, state in (
            ("raise exception 'not this one'", "raised P0001"),
            ("perform no_such_function()", "42883"),
            ("perform 1 / 0", "22012"),
        ):
            with self.subTest(state=state):
                self.execute(
                    f"create or replace function public.refuse() returns trigger language plpgsql as"
                    f" $$ begin {refusal}; return new; end $$;"
                    "create or replace trigger refuse before update on s2s.orders for each row"
                    " execute function public.refuse()"
                )
                with blocking(self.url) as txn:
                    refused = clock_drift.look(txn, ENGINE_RULES)[2]
                self.assertEqual(getattr(refused["orders"], "state", ""), f"{state} in public.refuse()")
        self.assertEqual(self.execute("select 1 from s2s.outbox where send_at > now()"), [])

    def test_jobs_by_hand(self) -> None:
        """A job with a schedule that no engine would write does not keep another job from being repaired."""
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at, retry_at) values"
            " ('long', 'every:99999999999s', now() + interval '2 hours', now() + interval '2 hours'),"
            " ('none', 'every:0s', now() + interval '2 hours', null),"
            " ('other', 'every:x', now() + interval '2 hours', null),"
            " ('right', 'every:10s', now() + interval '2 hours', null)"
        )
        with blocking(self.url) as txn:
            self.assertEqual(clock_drift.look(txn, ENGINE_RULES)[1:], ({"jobs": 2}, {}))
        self.assertEqual(
            self.execute("select job_type from s2s.jobs where due_at < now() + interval '1 hour' order by 1"),
            [("right",)],
        )

    def test_a_run_that_is_begun(self) -> None:
        """A run that began while the clock was ahead continues immediately, with its due time unchanged."""
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at, state, attempts) values"
            " ('begun', 'every:10s', now() + interval '2 hours', '{\"at\": 1}', 0),"
            " ('failed', 'every:10s', now() + interval '2 hours', null, 1)"
        )
        due = self.execute("select floor(extract(epoch from due_at))::bigint from s2s.jobs order by job_type")
        self.assertEqual(self.heal(), {})
        with blocking(self.url) as txn:
            found = [jobs.attempt(txn, [job_type]) for job_type in ("begun", "failed")]
        self.assertEqual([(each.due_at,) for each in found if each], due)

    def test_orders(self) -> None:
        """Orders that were placed or attempted while the clock was ahead are due immediately, in their order."""
        for ahead in (3, 1, 2):
            self.execute(
                "insert into s2s.orders (order_id, rpc, params, created_at, stepped_at, attempts, retry_at)"
                " select 'o' || h, 'test.v1', '{}', t, t, 1, t from (values (%s)) v (h),"
                " lateral (select now() + h * interval '1 hour' as t) l",
                ahead,
            )
        self.assertEqual(self.heal(), {"orders": 3})
        with blocking(self.url) as txn:
            orders = (
                "select order_id from s2s.orders where retry_at <= now() and created_at <= now() order by stepped_at"
            )
            txn.execute(orders)
            self.assertEqual([row[0] for row in txn], ["o1", "o2", "o3"])

    def test_outbox(self) -> None:
        """A waiting outbox row whose time is more than a minute ahead becomes due; a dead row is left unchanged."""
        with blocking(self.url) as txn:
            for key in "abc":
                outbox.put(txn, "test.run", key, {})
        self.execute("update s2s.outbox set send_at = now() + interval '400 days' where idem_key <> 'c'")
        self.execute("update s2s.outbox set state = 'dead' where idem_key = 'b'")
        self.assertEqual(self.heal(), {"rows of the outbox": 1})
        with blocking(self.url) as txn:
            self.assertEqual(sorted(row.idem_key for row in outbox.Claims().claim(txn, 9, 1.0)), ["a", "c"])

    def test_commands(self) -> None:
        """A command accepted, charged or retried while the clock was ahead becomes due; a delayed command does not."""
        at = int(self.value("select extract(epoch from now())::bigint"))
        pushes = [Push("t", "plain", bytes(32), "{}"), Push("t", "wanted later", bytes(32), "{}", 7, at + 7200)]
        pushes += [Push("t", key, bytes(32), "{}", 900) for key in ("charged", "retried")]
        with blocking(self.url) as txn:
            ids = [each.cmd_id for each in driver.drive(txn, commands.push_batch(pushes))]
            commands.charge(txn, [commands.Charge(ids[2], "error")])
        self.execute("update s2s.commands set status = 'dead' where cmd_id = %s", ids[3])
        with blocking(self.url) as txn:
            actions.act(txn, commands_admin.RETRY, [ids[3]])
        self.execute(
            "update s2s.commands set created_at = created_at + interval '2 hours',"
            " due_at = due_at + case idem_key when 'wanted later' then interval '0' else interval '2 hours' end"
        )
        self.assertEqual(self.heal(), {"commands": 3})
        late = self.execute(
            "select idem_key, extract(epoch from due_at)::bigint from s2s.commands where due_at > now()"
        )
        self.assertEqual(late, [("wanted later", at + 7200)])
        self.assertEqual(self.heal(), {})

    def test_where_looks_start(self) -> None:
        """Rows that were pulled back are found by processes that made their last scan while the clock was ahead."""
        with blocking(self.url) as txn:
            driver.drive(txn, commands.push_batch([Push("t", "k", bytes(32), "{}")]))
            outbox.put(txn, "test.run", "k", {})
        self.execute(
            "update s2s.commands set created_at = created_at + '2 hours', due_at = due_at + interval '2 hours'"
        )
        self.execute("update s2s.outbox set send_at = send_at + interval '2 hours'")
        ahead = float(self.value("select extract(epoch from now() + interval '2 hours')::float8"))
        # On a clock that stands still, no search of older rows (Lookback) is due.
        looks, claims = ready.Ready(now=lambda: 0.0), outbox.Claims(lambda: 0.0)
        for each in (looks, claims):
            with each._lookback.measured():
                pass
            each._lookback._cost_s = 1.0
        looks._starts, claims._start = {100: (ahead, 1)}, (ahead, 1)
        self.assertEqual(self.heal(), {"commands": 1, "rows of the outbox": 1})
        with blocking(self.url) as txn:
            # The command is due by the transaction's clock, less the slack of a scan.
            self.assertEqual(len(looks.candidates(txn, 9)), 1)
            self.assertEqual(len(claims.claim(txn, 9, 1.0)), 1)

    def test_many_commands(self) -> None:
        """Each step reads a bounded number of rows, even among many delayed commands."""
        self.patch(clock_drift, "STEP_ROWS", 100)
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, priority, due_at)"
            " select 't', 'u' || i, '{}'::jsonb, i % 3, now() + i * interval '1 hour' from generate_series(1, 500) i"
            " union all select 't', 'ready' || i, '{}', 1, now() - interval '1 hour' from generate_series(1, 500) i"
        )
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, priority, created_at, due_at)"
            " select 't', 'o' || i, '{}', i % 3, t, t from generate_series(1, 50) i,"
            " lateral (select now() + interval '200 hours' as t) l"
        )
        healed, place, steps = 0, None, 0
        while steps == 0 or place is not None:
            with blocking(self.url) as txn:
                count, place = clock_drift.heal_commands(txn, place)
            healed, steps = healed + count, steps + 1
        # 550 delayed rows of three priorities, in steps of 100 rows.
        self.assertEqual((healed, steps), (50, 6))
        self.assertEqual(self.value("select count(*) from s2s.commands where due_at <= now()"), 550)

    def test_keys(self) -> None:
        """A key that was added, retired or revoked while the clock was ahead gets its correct start and end."""
        add = "insert into s2s.s2s_keys (key_id, key_b64, role) values (%s, %s, 'any')"
        for key_id in ("made", "retired", "revoked", "successor"):
            self.execute(add, key_id, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")
        with blocking(self.url) as txn:
            rotation.activate(txn, "successor")
            rotation.retire(txn, "retired")
            rotation.revoke(txn, "revoked")
        self.execute(
            "update s2s.s2s_keys set created_at = created_at + '1 day', active_from = active_from + interval '1 day'"
        )
        self.execute(
            "update s2s.s2s_keys set closed_at = closed_at + interval '400 days', active_to = active_to + '400 days'"
        )
        self.assertEqual(self.heal(), {"keys": 4})
        self.assertEqual(
            self.execute(
                "select key_id, active_from <= now(), active_to <= now(), active_to <= now() + interval '60 seconds'"
                " from s2s.s2s_keys order by key_id"
            ),
            [
                ("made", True, None, None),
                ("retired", True, False, True),
                ("revoked", True, True, True),
                ("successor", True, None, None),
            ],
        )

    def test_tokens(self) -> None:
        """A token expires after the requested number of days; an explicit expiry time is left unchanged."""
        with blocking(self.url) as txn:
            tokens.add(txn, "days", "observer", "", 7)
            tokens.add(txn, "for-ever", "observer")
        self.execute(
            "insert into s2s.api_tokens (name, role, token_sha256, expires_at)"
            " values ('until', 'observer', sha256(''), '2100-01-01 00:00:01+00')"
        )
        self.execute("update s2s.api_tokens set created_at = created_at + interval '400 days'")
        self.execute("update s2s.api_tokens set expires_at = expires_at + interval '400 days' where name = 'days'")
        self.assertEqual(self.heal(), {"tokens": 3})
        self.assertEqual(
            self.execute(
                "select name, expires_at < now() + interval '7 days 1 minute', expires_at = '2100-01-01 00:00:01+00'"
                " from s2s.api_tokens order by name"
            ),
            [("days", True, False), ("for-ever", None, None), ("until", False, True)],
        )

    def look_behind(self) -> dict[str, int]:
        """Run the rules of both roles with a clock that may be behind, and return the row counts."""
        with blocking(self.url) as txn:
            return clock_drift.look(txn, {**ENGINE_RULES, **SERVER_RULES}, lambda _: True)[1]

    def test_while_the_clock_is_behind(self) -> None:
        """While the clock is behind, a token's expiry and a daily job's due time stay; an outbox row becomes due."""
        with blocking(self.url) as txn:
            tokens.add(txn, "days", "observer", "", 7)
            jobs.declare(
                txn, "boot-1", {"a": "daily@00:00Z"}, lambda schedule, ts: parse_schedule(schedule).next_after(ts)
            )
            outbox.put(txn, "test.run", "late", {})
        later = "interval '400 days'"
        self.execute(f"update s2s.api_tokens set created_at = created_at + {later}, expires_at = expires_at + {later}")
        self.execute(
            f"update s2s.jobs set due_at = due_at + {later}; update s2s.outbox set send_at = send_at + {later}"
        )
        right = self.execute("select expires_at, due_at from s2s.api_tokens, jobs")
        self.assertEqual(self.look_behind(), {"rows of the outbox": 1})
        self.assertEqual(self.execute("select expires_at, due_at from s2s.api_tokens, jobs"), right)

    def test_jobs_while_the_clock_may_be_behind(self) -> None:
        """While the clock is behind, a job of ``every:Ns`` is due within N seconds, and a retry within its pause."""
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at, attempts, retry_at) values"
            " ('often', 'every:10s', now() + interval '2 hours', 0, null),"
            " ('failed', 'every:10s', now(), 1, now() + interval '2 hours')"
        )
        self.assertEqual(self.look_behind(), {"jobs": 2})
        self.assertTrue(
            self.value("select bool_and(greatest(due_at, retry_at) <= now() + interval '10 seconds') from s2s.jobs")
        )

    def test_keys_while_the_clock_may_be_behind(self) -> None:
        """While the clock is behind, an added key is active, a closed one ends, and a planned one is unchanged.

        The states stay the same when the clock is right again.
        """
        add = "insert into s2s.s2s_keys (key_id, key_b64, role, created_at, active_from, active_to, closed_at) values"
        at = "now() + interval"
        # By a correct clock, 'b' was added before 'a', and so 'a' signs.
        self.execute(
            f"{add} ('b', 'x', 'any', {at} '100 minutes', {at} '100 minutes', null, null),"
            f" ('a', 'x', 'any', {at} '110 minutes', {at} '110 minutes', null, null),"
            f" ('planned', 'x', 'any', {at} '110 minutes', {at} '1 day', {at} '2 days', null),"
            f" ('retired', 'x', 'any', now(), now(), {at} '111 minutes', {at} '110 minutes'),"
            f" ('revoked', 'x', 'any', now(), now(), {at} '110 minutes', {at} '110 minutes')"
        )
        planned = "select active_from, active_to from s2s.s2s_keys where key_id = 'planned'"
        right = self.execute(planned)
        self.assertEqual(self.look_behind(), {"keys": 5})
        self.assertEqual(self.execute(planned), right)
        for later in ("1 second", "2 hours"):
            found = self.execute(
                f"select key_id from s2s.s2s_keys where active_from <= {at} '{later}'"
                f" and (active_to is null or active_to > {at} '61 seconds') and key_id <> 'planned'"
                " order by active_from"
            )
            self.assertEqual(found, [("b",), ("a",)], later)
        self.assertEqual(self.look_behind(), {})

    def test_requests_while_the_clock_may_be_behind(self) -> None:
        """A control request that expired for its sender is not taken later, even if the clock is behind."""
        self.execute(
            "insert into s2s.steering (engine, type, payload, expires_at) values ('e', 't', '{}', now() + '2 hours')"
        )
        self.assertEqual(self.look_behind(), {"control requests": 1})
        self.assertEqual(self.execute("select 1 from s2s.steering where expires_at > now()"), [])

    def test_of_servers(self) -> None:
        """Future times of control requests, engine links and batch notes are pulled back."""
        self.execute(
            "insert into s2s.steering (engine, type, payload, expires_at) values ('e', 't', '{}', now() + '2 hours')"
        )
        self.execute(
            "insert into s2s.engine_links (server_boot_id, key_id, name, address, seen_at)"
            " values ('s', 'k', 'e', 'a', now() + interval '400 days')"
        )
        self.execute(
            "insert into s2s.batch_notes (boot_id, worker, cmd_ids, noted_at) values ('b', 0, '{1}', now() +"
            " interval '2 hours')"
        )
        self.assertEqual(self.heal(), {"control requests": 1, "links": 1, "notes of batches": 1})
        self.assertEqual(self.execute("select 1 from s2s.steering where expires_at > now()"), [])
        self.assertEqual(self.execute("select 1 from s2s.engine_links where seen_at > now()"), [])
        self.assertEqual(self.execute("select 1 from s2s.batch_notes where noted_at > now()"), [])

    def test_notices(self) -> None:
        """A notice that was published while the clock was ahead expires after its intended lifetime."""
        self.execute(
            "insert into s2s.notices (cmd_id, scope, message, severity, created_at, expires_at)"
            " select i, 'global', 'x', 'info', t, t + interval '1 hour' from generate_series(1, 3) i,"
            " lateral (select now() + case i when 1 then interval '0' else interval '400 days' end as t) l"
        )
        self.assertEqual(self.heal(), {"notices": 2})
        self.assertEqual(
            self.value("select count(*) from s2s.notices where expires_at <= now() + interval '1 hour'"), 3
        )


class RetentionTests(DatabaseTestCase):
    """The rows that retention removes while the clock is wrong, and afterwards."""

    def insert(self, key: str, created: str, finished: str) -> None:
        """Store a finished command; the times are intervals from now."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, status, created_at, finished_at)"
            " values ('t', %s, '{}', 'done', now() + %s::interval, now() + %s::interval)",
            key,
            created,
            finished,
        )

    def sweep(self) -> list[str]:
        """Run one retention pass, and return the keys of the remaining commands."""
        with blocking(self.url) as txn:
            retention.advance(txn)
            after: int | None = 0
            while after is not None:
                _, after = retention.sweep_commands(txn, after, Keep(7, 90, 30))
            retention.sweep_keys(txn)
            retention.sweep_steering(txn)
        return [key for (key,) in self.execute("select idem_key from s2s.commands order by cmd_id")]

    def test_a_clock_that_is_ahead(self) -> None:
        """A clock that is ahead by 400 days causes no removal of commands, idempotency keys or control requests."""
        # The test cannot set the clock, so the stored retention time and the rows are 400 days older instead.
        self.execute("update s2s.database set retention_at = now() - interval '400 days'")
        self.insert("yesterday", "-401 days", "-401 days")
        self.execute(
            "insert into s2s.idempotency_keys (idem_key, cmd_id, fingerprint, expires_at)"
            " values ('k', 7, decode(repeat('00', 32), 'hex'), now() - interval '380 days')"
        )
        self.execute(
            "insert into s2s.steering (engine, type, payload, created_at, expires_at)"
            " values ('e', 't', '{}', now() - interval '401 days', now())"
        )
        for _ in range(5):
            self.assertEqual(self.sweep(), ["yesterday"])
        counts = "select (select count(*) from s2s.idempotency_keys), (select count(*) from s2s.steering)"
        self.assertEqual(self.execute(counts), [(1, 1)])

    def test_right_again(self) -> None:
        """The reference time of retention is never ahead of the clock for longer than one pass."""
        self.execute("update s2s.database set retention_at = now() + interval '400 days'")
        self.insert("young", "-1 day", "-1 day")
        self.insert("old", "-8 days", "-8 days")
        self.assertEqual(self.sweep(), ["young"])

    def test_made_by_a_clock_that_was_not_set(self) -> None:
        """A database made with a clock of 1970 removes old rows immediately, and keeps rows dated 1970 from now on."""
        self.execute("update s2s.database set retention_at = to_timestamp(60)")
        self.insert("old", "-8 days", "-8 days")
        self.insert("young", "-1 day", "-1 day")
        self.insert("misdated", "0 days", "0 days")
        self.execute("update s2s.commands set created_at = 'epoch', finished_at = 'epoch' where idem_key = 'misdated'")
        self.assertEqual(self.sweep(), ["young", "misdated"])
        self.execute("update s2s.commands set finished_at = now() - interval '8 days'")
        self.assertEqual(self.sweep(), [])

    def test_rows_to_come(self) -> None:
        """Rows written while the clock was ahead hide no older rows, and are removed after their retention period."""
        self.patch(retention, "STEP_ROWS", 2)
        for number in range(3):
            self.insert(f"ahead{number}", "400 days", "400 days")
        self.insert("old", "-8 days", "-8 days")
        self.assertEqual(self.sweep(), ["ahead0", "ahead1", "ahead2"])
        self.assertEqual(self.execute("select 1 from s2s.commands where finished_at > now()"), [])
        self.execute("update s2s.commands set finished_at = now() - interval '8 days'")
        self.assertEqual(self.sweep(), [])

    def test_requests_to_come(self) -> None:
        """A control request written while the clock was ahead gets a time that is not in the future."""
        self.execute(
            "insert into s2s.steering (engine, type, payload, created_at, expires_at)"
            " values ('e', 't', '{}', now() + interval '400 days', now())"
        )
        self.sweep()
        self.assertEqual(self.execute("select 1 from s2s.steering where created_at > now()"), [])


class RolesTests(RoleTestCase):
    """Both roles, during and after a short time in which the database's clock is ahead."""

    @inlineCallbacks
    def test_ahead_for_a_moment(self) -> Iterator[Deferred[Any]]:
        """Work accepted or planned while the clock was ahead is done soon after, and both logs report the repair."""
        server = self.server()
        engine = self.engine(server.port, "--name", "engine-1")
        self.execute("insert into s2s_world.sectors (sector_id, name) values (1, 'a')")
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('port_refresh', 'every:10s', to_timestamp(60))"
        )
        clock_fault.begin(self.execute)
        yield server.start()
        yield engine.start()
        yield poll(
            lambda: self.execute("select 1 from s2s.jobs where job_type = 'port_refresh' and runs = 1"), "it has run"
        )
        peer = server.connect()
        peer.greet()
        at = self.execute("select extract(epoch from now())::bigint + 5000")[0][0]
        for push in (command("pushed"), command("wanted later", due_at=at)):
            self.assertTrue(peer.call(PUSH, push)["accepted"])
        peer.close()
        with blocking(self.url) as txn:
            outbox.put(txn, "notice.publish", "emitted", {"scope": "global", "message": "emitted", "severity": "info"})
        self.execute(
            "insert into s2s.orders (order_id, rpc, params)"
            """ values ('o', 'world.set_sector_status.v1', '{"sector_id": 1, "status": "fedspace"}')"""
        )
        clock_fault.end(self.execute)
        published = "select message from s2s.notices order by 1"
        yield poll(lambda: self.execute(published) == [("emitted",), ("pushed",)], "both are published")
        yield poll(lambda: self.execute("select status from s2s.orders") == [("done",)], "the order is done")
        yield poll(
            lambda: self.execute("select 1 from s2s.jobs where job_type = 'port_refresh' and runs > 1"), "it ran again"
        )
        self.assertEqual(
            self.execute(
                "select idem_key, extract(epoch from due_at)::bigint from s2s.commands where status = 'ready'"
            ),
            [("wanted later", at)],
        )
        for role in (server, engine):
            yield role.says("times that lay too far in the future were reset:")
