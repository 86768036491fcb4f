"""The scheduler: each run once, step by step, despite failures of jobs, engines and connections."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg2
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent

from s2s.handlers.jobs import Job, JobRun, Outcome, Unfinished, registry
from s2s.handlers.run import MOST_TOLD
from s2s.protocol import canonical
from s2s.roles.engine import scheduler as scheduling
from s2s.roles.engine.scheduler import LINES, Scheduler
from s2s.roles.engine.state import EngineState
from s2s.runtime.clock import Clock
from s2s.store import poll_loop
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.kept_rows import KEPT
from s2s.store.pool import blocking
from s2s.store.tables import jobs
from s2s.store.tables.claims import presence_key
from s2s.store.tables.own_keys import digest
from tests.support.postgres import DatabaseTestCase, RecordingCursor, Session
from tests.support.roles import RoleTestCase, free_port
from tests.support.waiting import poll

Work = Callable[[Cursor, JobRun], Outcome]
_HOUR = 3600


class _Job(Job):
    """A job that runs a function of the test."""

    def __init__(self, job_type: str, work: Work, schedule: str = "every:3600s") -> None:
        self.job_type, self.schedule = job_type, schedule  # type: ignore[misc]
        self._work = work

    def run(self, txn: Cursor, run: JobRun) -> Outcome:
        """Record the run, emit a notice and call the function."""
        txn.execute("insert into public.effects (key, state) values (%s, %s)", (run.key, str(dict(run.state))))
        run.emit("notice.publish", f"{run.key} {dict(run.state)}", {"at": run.due_at})
        return self._work(txn, run)


def _nothing(txn: Cursor, run: JobRun) -> Outcome:
    return None


class SchedulerTestCase(DatabaseTestCase):
    """A test with a table of effects, in which every run of a job is recorded."""

    def setUp(self) -> None:
        """Create the table."""
        super().setUp()
        self.execute("create table public.effects (n serial, key text, state text)")
        self.patch(poll_loop, "POLL_S", 0.05)
        self.emitted = 0

    def start(
        self, *jobs: Job, condition: EngineState | None = None, timeout_s: float = 60.0, boot_id: str = "boot-1"
    ) -> Scheduler:
        """Start a scheduler, with its own pool, that stops at the end of the test."""
        condition = condition or EngineState()
        condition.wanted = condition.wanted or "running"
        database, handlers = self.pools("s2s-jobs", timeout_s=timeout_s)
        scheduler = Scheduler(
            boot_id, database, handlers, Clock(reactor), registry(jobs), condition, 65536, self.count_emitted, {}
        )
        scheduler.start()
        self.addCleanup(scheduler.stop)
        return scheduler

    def count_emitted(self) -> None:
        """Count the calls."""
        self.emitted += 1

    def due(self, *job_types: str, at: int = _HOUR) -> None:
        """Insert jobs that have been due for long."""
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) select t, 'every:3600s', to_timestamp(%s) from"
            " unnest(%s) t",
            at,
            list(job_types),
        )

    def key(self, job_type: str = "tick", due_at: int = _HOUR, runs: int = 0) -> str:
        """Return the key of a run."""
        return f"{job_type}:{self.database_id()}:{due_at}:{runs}"

    def emission(self) -> str:
        """Return the key of the command that a run emits in its only step."""
        return f"{self.key()} {{}}:{digest('notice.publish', canonical.dumps({'at': _HOUR}))}"

    def row(self, columns: str, job_type: str = "tick") -> tuple[Any, ...]:
        """Return columns of a job's row."""
        return self.execute(f"select {columns} from s2s.jobs where job_type = %s", job_type)[0]

    def reached(self, condition: str, job_type: str = "tick") -> Deferred[Any]:
        """Wait until a job's row fulfils a condition."""
        query = f"select 1 from s2s.jobs where job_type = %s and ({condition})"
        return poll(lambda: self.execute(query, job_type), f"{job_type}: {condition}")

    def effects(self) -> list[tuple[str, str]]:
        """Return key and state of every step that took effect, in their order."""
        return self.execute("select key, state from public.effects order by n")

    def outbox(self) -> list[str]:
        """Return the keys of the emitted commands."""
        return [key for (key,) in self.execute("select idem_key from s2s.outbox order by outbox_id")]

    def rush(self, job_type: str = "tick") -> None:
        """Make the retry of a job due now."""
        self.execute("update s2s.jobs set retry_at = now(), error = null where job_type = %s", job_type)

    def pause_long(self) -> None:
        """Prevent automatic retries, even on a slow machine."""
        self.patch(jobs, "PAUSE", "interval '1 hour'")

    def end_connections(self) -> None:
        """End every connection that is in a transaction."""
        self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-jobs handlers'"
            " and state = 'idle in transaction'"
        )

    def watch_looks(self) -> list[int]:
        """Return a list that grows with every query for a due job."""
        looks: list[int] = []
        attempt = jobs.attempt

        def watched(*args: Any) -> Any:
            looks.append(1)
            return attempt(*args)

        self.patch(jobs, "attempt", watched)
        return looks


class TimeTests(SchedulerTestCase):
    """The times at which a job runs."""

    async def test_due(self) -> None:
        """A job that has never run is due at the next time of its schedule, and not before."""
        seen: list[Any] = []

        def look(txn: Cursor, run: JobRun) -> None:
            txn.execute("select extract(epoch from now())::float8")
            seen.append((run.due_at, *(txn.fetchone() or ())))

        self.start(_Job("tick", look, "every:1s"))
        await poll(lambda: len(seen) >= 2, "two runs")
        times = [due_at for due_at, _ in seen]
        self.assertEqual(times, sorted(set(times)))
        for due_at, now in seen:
            self.assertTrue(due_at <= now)

    async def test_catching_up(self) -> None:
        """One run replaces all missed ones, and has its own due time; the next one follows the schedule."""
        self.due("tick")
        scheduler = self.start(_Job("tick", lambda _, __: {"caught": 1}))
        await self.reached("runs > 0")
        await poll(lambda: scheduler.runs == 1, "it is counted")
        ((next_due,),) = self.execute("select (floor(extract(epoch from now()) / 3600) + 1)::bigint * 3600")
        columns = (
            "extract(epoch from due_at)::bigint, extract(epoch from last_due_at)::bigint, runs, last_result, state"
        )
        self.assertEqual(self.row(columns), (next_due, _HOUR, 1, {"caught": 1}, None))
        self.assertEqual(self.effects(), [(self.key(), "{}")])
        self.assertEqual(self.outbox(), [self.emission()])
        self.assertEqual((self.emitted, scheduler.failed), (1, 0))
        self.assertTrue(self.row("last_finished_at between now() - interval '1 minute' and now()")[0])

    def test_next_time(self) -> None:
        """A run that ends late in a second does not skip the time at which the next second begins."""
        self.due("tick")
        with blocking(self.url) as txn:
            due = jobs.attempt(txn, ["tick"])
            assert due is not None
            asked: list[int] = []
            jobs.finish(txn, due, lambda _, ts: asked.append(ts) or 0, None)
            txn.execute("select floor(extract(epoch from now()))::bigint")
            self.assertEqual((asked[0],), txn.fetchone())

    async def test_a_time_set_by_hand(self) -> None:
        """A due time between two seconds, set by hand, delays nothing."""
        self.due("tick")
        self.execute("update s2s.jobs set due_at = to_timestamp(3600.7)")
        self.start(_Job("tick", _nothing))
        await self.reached("runs > 0")
        self.assertEqual(self.effects(), [(self.key(), "{}")])

    async def test_a_changed_schedule(self) -> None:
        """A job with another schedule in the table is due by its new one; a run in progress continues first."""
        self.due("begun")
        self.execute(
            "update s2s.jobs set schedule = 'daily@12:00Z', state = '{\"n\": 1}' where job_type = 'begun';"
            "insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'daily@12:00Z', now() +"
            " interval '9 days')"
        )
        self.start(_Job("tick", _nothing), _Job("begun", _nothing))
        await self.reached("runs > 0", "begun")
        self.assertEqual(self.effects(), [(self.key("begun"), "{'n': 1}")])
        for job_type in ("tick", "begun"):
            soon = "schedule = 'every:3600s' and due_at between now() and now() + interval '1 hour'"
            self.assertEqual(self.row(soon, job_type), (True,))

    async def test_the_same_schedule(self) -> None:
        """A job that is in the table with its declared schedule keeps its due time."""
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:3600s', '2100-01-01 00:00:07Z')"
        )
        self.due("other")
        self.start(_Job("tick", _nothing), _Job("other", _nothing))
        await self.reached("runs > 0", "other")
        self.assertEqual(self.row("due_at = '2100-01-01 00:00:07Z'"), (True,))

    async def test_a_row_that_was_removed(self) -> None:
        """A job whose row was removed is declared again."""
        self.patch(scheduling, "DECLARE_S", 0.1)
        self.start(_Job("tick", _nothing))
        await self.reached("true")
        self.execute("delete from s2s.jobs")
        await self.reached("schedule = 'every:3600s'")

    async def test_a_schedule_of_an_engine_that_is_gone(self) -> None:
        """A schedule of another release is logged once while its engine lives, and replaced when it has ended."""
        self.patch(scheduling, "DECLARE_S", 0.1)
        self.start(_Job("tick", _nothing, "every:5s"))
        await self.reached("schedule = 'every:5s'")
        other = Session(self.url)
        self.addCleanup(other.close)
        other.run("select pg_advisory_lock(%s)", presence_key("boot-2"))
        with capturedLogs() as captured:
            old = self.start(_Job("tick", _nothing, "every:86400s"), boot_id="boot-2")
            await self.reached("schedule = 'every:86400s' and declared_by = 'boot-2'")
            await old.stop()
            await deferLater(reactor, 0.6)
            self.assertEqual(self.row("schedule"), ("every:86400s",))
            other.close()
            await self.reached("schedule = 'every:5s' and due_at < now() + interval '6 seconds'")
            await deferLater(reactor, 0.3)
        [told, healed] = [formatEvent(event) for event in captured if "has the schedule" in formatEvent(event)]
        self.assertIn("has the schedule every:86400s of another release or plug-in", told)
        self.assertIn("this engine declares every:5s: run one release on all engines", told)
        self.assertEqual(healed, "job tick has the schedule every:5s again")

    async def test_two_releases_that_live(self) -> None:
        """Two living engines with different schedules do not alternate: that of the engine started last stays."""
        self.patch(scheduling, "DECLARE_S", 0.1)
        self.execute(
            "create table public.flips (schedule text); create function flip() returns trigger language plpgsql set"
            " search_path from current as"
            " $$ begin insert into public.flips values (new.schedule); return new; end $$;"
            " create trigger flip after insert or update of schedule on s2s.jobs for each row execute function flip()"
        )
        session = Session(self.url)
        self.addCleanup(session.close)
        for number, schedule in enumerate(("every:5s", "every:86400s"), 1):
            session.run("select pg_advisory_lock(%s)", presence_key(f"boot-{number}"))
            self.start(_Job("tick", _nothing, schedule), boot_id=f"boot-{number}")
            await self.reached(f"schedule = '{schedule}'")
        await deferLater(reactor, 0.6)
        self.assertEqual(self.execute("select * from public.flips"), [("every:5s",), ("every:86400s",)])

    async def test_a_schedule_set_by_hand(self) -> None:
        """A schedule that is set by hand in the table is logged, and soon replaced by the declared one."""
        self.patch(scheduling, "DECLARE_S", 0.1)
        self.start(_Job("tick", _nothing))
        await self.reached("true")
        with capturedLogs() as captured:
            self.execute("update s2s.jobs set schedule = 'every:7s'")
            await self.reached("schedule = 'every:3600s'")
        [told] = [formatEvent(event) for event in captured if "every:7s" in formatEvent(event)]
        self.assertIn("set by hand; this engine declares every:3600s: no engine that lives keeps the other one", told)

    async def test_a_schedule_of_a_job_that_runs(self) -> None:
        """A schedule is not replaced while the job's row is locked, and no check waits for the lock."""
        self.execute("insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:5s', now())")
        database, _ = self.pools("s2s-jobs")
        found = {"tick": jobs.OtherSchedule("every:5s", is_kept=False)}
        ours = _Job("tick", _nothing)
        scheduler = Scheduler(
            "boot-1", database, mock.Mock(), Clock(reactor), registry([ours]), EngineState(), 65536, lambda: None, {}
        )
        with blocking(self.url) as txn:
            jobs.hold_still(txn, "tick")
            self.assertEqual(await database.run(scheduler._declare, False, found), (found, {}))
        self.assertEqual(await database.run(scheduler._declare, False, found), ({}, {}))
        self.assertEqual(self.row("schedule"), ("every:3600s",))

    async def test_what_cannot_be_declared(self) -> None:
        """A job that cannot be declared, by a lock or a trigger, is named, delays no other, and is tried again."""
        self.patch(scheduling, "DECLARE_S", 0.1)
        self.patch(jobs, "DECLARE_LOCK_S", 0.05)
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('locked', 'every:5s', '2100-01-01');"
            "create function no() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.job_type = 'refused' then raise exception 'not this one'; end if; return new; end $$;"
            "create constraint trigger no after insert on s2s.jobs deferrable initially deferred"
            " for each row execute function no()"
        )
        holding = Session(self.url)
        self.addCleanup(holding.close)
        holding.run("begin")
        holding.run("select from s2s.jobs for update")
        with capturedLogs() as told:
            self.start(*(_Job(name, _nothing, "every:1s") for name in ("locked", "refused", "tick")))
            await self.reached("runs > 0")
            await deferLater(reactor, 0.5)
            holding.run("rollback")
            self.execute("drop trigger no on s2s.jobs")
            await self.reached("runs > 0", "locked")
            await self.reached("runs > 0", "refused")
        lines = [line for event in told if "declared" in (line := str(formatEvent(event)))]
        self.assertEqual(len(lines), 4, lines)
        self.assertIn("job locked cannot be declared, which is tried again every 0.1 s: canceling statement", lines[0])
        self.assertIn("the view pg_locks shows the session that holds the lock", lines[0])
        self.assertIn("job refused cannot be declared, which is tried again every 0.1 s: not this one", lines[1])
        self.assertEqual(sorted(lines[2:]), ["job locked is declared", "job refused is declared"])

    async def test_what_nobody_has(self) -> None:
        """A job of an engine that is gone stays in the table, and delays no other."""
        self.due("gone")
        self.due("tick", at=2 * _HOUR)
        self.start(_Job("tick", _nothing))
        await self.reached("runs > 0")
        self.assertEqual(self.row("runs, attempts", "gone"), (0, 0))


class FailureTests(SchedulerTestCase):
    """Jobs that fail."""

    async def test_a_run_that_raises(self) -> None:
        """A failed run is rolled back, recorded, and retried with its key after 2, 4, 8 … 300 s until it succeeds."""
        seen: list[tuple[str, int]] = []

        def work(txn: Cursor, run: JobRun) -> None:
            seen.append((run.key, run.due_at))
            if len(seen) <= 4:
                raise ValueError("not\x00 this\udc00 one\nand a second line")

        self.due("tick")
        with capturedLogs() as logs:
            ((before,),) = self.execute("select now()")
            scheduler = self.start(_Job("tick", work))
            for attempts, pause_s in ((1, 2), (2, 4), (3, 8)):
                await self.reached(f"attempts = {attempts} and error is not null")
                pauses = self.execute(
                    "select extract(epoch from retry_at - now())::float8, extract(epoch from retry_at - %s)::float8"
                    " from s2s.jobs",
                    before,
                )
                self.assertTrue(pauses[0][0] <= pause_s <= pauses[0][1], pauses)
                self.assertEqual(self.row("error, runs"), ("ValueError: not this? one", 0))
                self.assertEqual((self.effects(), self.outbox()), ([], []))
                if attempts == 3:
                    # The state after years of failures: the pause is bounded.
                    self.execute("update s2s.jobs set attempts = 5000")
                ((before,),) = self.execute("select now()")
                self.rush()
        await self.reached("attempts = 5001 and error is not null")
        self.assertTrue(self.row("retry_at between now() + interval '290 s' and now() + interval '300 s'")[0])
        self.rush()
        await self.reached("runs = 1")
        self.assertEqual(self.row("attempts, error, retry_at"), (0, None, None))
        self.assertEqual(seen, [(self.key(), _HOUR)] * 5)
        self.assertEqual(self.outbox(), [self.emission()])
        await poll(lambda: (scheduler.runs, scheduler.failed) == (1, 4), "the counters")
        told = [each for each in logs if each.get("why", "").startswith("ValueError: not this? one")]
        self.assertEqual([each["attempts"] for each in told], [1, 2, 3])

    async def test_kinds_of_failures(self) -> None:
        """Every kind of misbehaviour is recorded as the job's failure and rolled back; the other jobs continue."""

        def swallow(txn: Cursor, run: JobRun) -> None:
            with contextlib.suppress(psycopg2.Error):
                txn.execute("select 1 / 0")

        def leave(txn: Cursor, run: JobRun) -> None:
            raise SystemExit(3)

        def late(txn: Cursor, run: JobRun) -> None:
            txn.execute("insert into public.checked_late values (1, 2)")

        def slow(txn: Cursor, run: JobRun) -> None:
            txn.execute("set local statement_timeout = 10; select pg_sleep(60)")

        def result(value: Any) -> Work:
            return lambda _, __: value

        self.execute(
            "create table public.checked_late (n int primary key, m int references checked_late deferrable"
            " initially deferred)"
        )
        works: dict[str, tuple[Work, str]] = {
            "bad_sql": (lambda txn, _: txn.execute("select * from nowhere"), "UndefinedTable: relation"),
            "swallow": (swallow, "InFailedSqlTransaction: "),
            "exit": (leave, "SystemExit: 3"),
            "late": (late, 'insert or update on table "checked_late" violates foreign key constraint'),
            "slow": (slow, "QueryCanceled: "),
            "key": (lambda _, run: run.settings["no.such"], "KeyError: 'no.such'"),
            "object": (result({"a": object()}), "CanonicalError: at /a: "),
            "float": (result({"a": 0.5}), "CanonicalError: at /a: "),
            "nul": (result({"a": "\0"}), "CanonicalError: "),
            "number": (result(5), "TypeError: a step gives back None, a mapping or Unfinished of one, and no int"),
            "long": (result({"a": "x" * MOST_TOLD}), "ValueError: the return value of a step has 2048 bytes"),
            "state": (result(Unfinished({"a": {1, 2}})), "CanonicalError: at /a: "),
        }
        self.due(*works)
        self.due("tick", at=2 * _HOUR)
        self.pause_long()
        self.start(*(_Job(name, work) for name, (work, _) in works.items()), _Job("tick", _nothing))
        await self.reached("runs > 0")
        await poll(
            lambda: self.execute("select count(*) from s2s.jobs where error is not null") == [(len(works),)],
            "the errors",
        )
        for name, (_, error) in works.items():
            with self.subTest(name=name):
                said, *rest = self.row("error, attempts, runs, state", name)
                self.assertTrue(said.startswith(error), said)
                self.assertEqual(rest, [1, 0, None])
        self.assertEqual([key for key, _ in self.effects()], [self.key(due_at=2 * _HOUR)])
        self.assertEqual(len(self.outbox()), 1)
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_a_job_that_ends_its_transaction(self) -> None:
        """A job that commits or rolls back by itself fails, with an error in its row; no other change is committed."""
        works: dict[str, Work] = {
            "commits": lambda txn, _: txn.connection.commit(),
            "says_commit": lambda txn, _: txn.execute("commit"),
            "rolls_back": lambda txn, _: txn.connection.rollback(),
            "says_rollback": lambda txn, _: txn.execute("rollback"),
        }

        def then_more(work: Work) -> Work:
            def works_on(txn: Cursor, run: JobRun) -> None:
                work(txn, run)
                txn.execute("select 1")
                raise ValueError("mine")

            return works_on

        works.update({f"{name}_and_raises": then_more(work) for name, work in works.items()})
        self.due(*works)
        self.due("tick", at=2 * _HOUR)
        self.pause_long()
        self.start(*(_Job(name, work) for name, work in works.items()), _Job("tick", _nothing))
        await self.reached("runs > 0")
        await poll(
            lambda: self.execute("select count(*) from s2s.jobs where error is not null") == [(len(works),)],
            "the errors",
        )
        for name in works:
            with self.subTest(name=name):
                self.assertEqual(self.row("runs, attempts, state", name), (0, 1, None))
                told = "savepoint" if name.startswith("says") else "never commits"
                self.assertIn(told, self.row("error", name)[0].lower())
        # A commit of the job itself in SQL takes effect once.
        committed = sorted(key for key, _ in self.effects())
        expected = [*(self.key(name) for name in works if "says_commit" in name), self.key(due_at=2 * _HOUR)]
        self.assertEqual(committed, sorted(expected))

    async def test_a_row_that_cannot_be_changed(self) -> None:
        """A job whose row a trigger protects is named and has no effect, and the others run."""
        self.due("stays", "kept", "tick")
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.job_type = 'stays' then raise exception 'not this one'; end if;"
            " if new.job_type = 'kept' and new.runs > 0 then return null; end if; return new; end $$;"
            "create trigger keep before update on s2s.jobs for each row execute function keep()"
        )
        with capturedLogs() as told:
            self.start(_Job("stays", _nothing), _Job("kept", _nothing), _Job("tick", _nothing))
            await self.reached("runs > 0")
            await poll(lambda: any("job kept" in str(formatEvent(event)) for event in told), "the line about the other")
        lines = [str(formatEvent(event)) for event in told]
        # Either worker of the scheduler may have met the trigger.
        self.assertIn(len([line for line in lines if "job stays: not this one" in line]), range(1, LINES + 1), lines)
        self.assertEqual(self.row("runs", "stays"), (0,))
        self.assertTrue([line for line in lines if "job kept" in line and KEPT in line], lines)
        self.assertEqual([key for key, _ in self.effects() if not key.startswith("tick")], [])

    async def test_a_connection_that_is_lost(self) -> None:
        """A job whose connection ends, as when its process dies, is rolled back and retried after a pause."""
        calls: list[str] = []

        def work(txn: Cursor, run: JobRun) -> None:
            calls.append(run.key)
            if len(calls) == 1:
                self.end_connections()
                txn.execute("select 1")

        self.due("tick")
        self.pause_long()
        scheduler = self.start(_Job("tick", work))
        other = self.start(_Job("tick", work))
        await self.reached("attempts = 1")
        looks = self.watch_looks()
        await poll(lambda: len(looks) > 10, "looks of both")
        self.assertEqual(calls, [self.key()])
        self.assertEqual(self.row("attempts, runs, retry_at > now()"), (1, 0, True))
        self.assertEqual([key for key, _ in self.effects() if key.startswith("tick")], [])
        self.rush()
        await self.reached("runs = 1")
        self.assertEqual(calls, [self.key()] * 2)
        self.assertEqual(self.row("attempts, error"), (0, None))
        self.assertEqual((scheduler.failed, other.failed), (0, 0))

    async def test_one_that_always_loses_its_connection(self) -> None:
        """A job that always loses its connection is named and fails, if the database accepts other writes."""
        self.patch(jobs, "PAUSE", "interval '0.05 seconds'")

        def lose(txn: Cursor, run: JobRun) -> None:
            txn.execute("select pg_terminate_backend(pg_backend_pid())")

        def damaged(txn: Cursor, run: JobRun) -> None:
            own(txn).execute("do $$ begin raise exception 'invalid page in block 0' using errcode = 'XX001'; end $$")

        for name, work, why in (("loses", lose, "connection"), ("damaged", damaged, "invalid page")):
            self.due(name)
            with capturedLogs() as told:
                scheduler = self.start(_Job(name, work))
                await self.reached("error is not null", name)
                await scheduler.stop()
            self.assertIn(why, self.row("error", name)[0])
            self.assertGreaterEqual(self.row("attempts", name)[0], scheduling.LOSSES)
            lines = [line for event in told if f"job {name} failed" in (line := str(formatEvent(event)))]
            self.assertTrue(lines)
            self.assertIn(why, lines[0])
        self.assertEqual(self.effects(), [])

    async def test_one_that_loses_its_connection_while_the_database_is_at_fault(self) -> None:
        """A job is not marked as failed if the database refuses other writes, too."""
        self.patch(jobs, "PAUSE", "interval '0.05 seconds'")
        checks: list[int] = []

        def refuse(txn: Cursor) -> None:
            checks.append(1)
            own(txn).execute("do $$ begin raise exception 'no space' using errcode = '53100'; end $$")

        self.patch(scheduling.probe, "check", refuse)
        self.due("loses")
        self.start(_Job("loses", lambda txn, _: txn.execute("select pg_terminate_backend(pg_backend_pid())")))
        await poll(lambda: len(checks) > 2, "looks at the database")
        self.assertEqual(self.row("error", "loses"), (None,))

    async def test_an_error_made_of_a_lost_connection(self) -> None:
        """A job that converts the loss of its connection to an error of its own is not marked as failed."""

        def work(txn: Cursor, run: JobRun) -> None:
            self.end_connections()
            try:
                txn.execute("select 1")
            except psycopg2.Error:
                raise KeyError("mine") from None

        self.due("tick")
        scheduler = self.start(_Job("tick", work))
        await self.reached("attempts = 2 or retry_at < now()")
        self.assertEqual(self.row("error"), (None,))
        self.assertEqual(scheduler.failed, 0)


class StepTests(SchedulerTestCase):
    """Runs of more than one step."""

    def count_to(self, last: int) -> Work:
        """Return the work of a job with this many steps."""

        def work(txn: Cursor, run: JobRun) -> Outcome:
            at = run.state.get("at", 0) + 1
            return Unfinished({"at": at}) if at < last else {"steps": at}

        return work

    async def test_steps(self) -> None:
        """Each step has its own transaction and the key of the run, and continues where the previous one ended."""
        seen: list[int] = []
        count = self.count_to(3)

        def work(txn: Cursor, run: JobRun) -> Outcome:
            seen.append(len(self.effects()))
            return count(txn, run)

        self.due("tick")
        scheduler = self.start(_Job("tick", work))
        await self.reached("runs = 1")
        self.assertEqual(seen, [0, 1, 2])
        self.assertEqual(self.effects(), [(self.key(), state) for state in ("{}", "{'at': 1}", "{'at': 2}")])
        self.assertEqual(self.row("last_result, state"), ({"steps": 3}, None))
        await poll(lambda: (scheduler.runs, self.emitted) == (1, 3), "the counters")

    async def test_a_step_that_fails(self) -> None:
        """A step that fails is retried by itself: the previous steps stay committed."""
        failed: list[int] = []
        count = self.count_to(3)

        def work(txn: Cursor, run: JobRun) -> Outcome:
            if run.state.get("at") == 1 and not failed:
                failed.append(1)
                raise ValueError("the second")
            return count(txn, run)

        self.due("tick")
        self.start(_Job("tick", work))
        await self.reached("error is not null")
        self.assertEqual(self.row("attempts, state, runs"), (1, {"at": 1}, 0))
        self.rush()
        await self.reached("runs = 1")
        self.assertEqual([state for _, state in self.effects()], ["{}", "{'at': 1}", "{'at': 2}"])

    async def test_long_runs_take_turns(self) -> None:
        """With one worker, a run of many steps does not delay a job that becomes due after it."""
        self.patch(scheduling, "LINES", 1)
        self.patch(jobs, "SLICE_S", 0.0)
        self.due("long", at=_HOUR)
        self.due("short", at=2 * _HOUR)
        self.start(_Job("long", lambda *_: Unfinished({})), _Job("short", _nothing))
        await self.reached("runs = 1", "short")
        steps = len(self.effects())
        await poll(lambda: len(self.effects()) > steps + 3, "further steps of the long one")

    async def test_another_engine_goes_on(self) -> None:
        """A run whose engine is gone continues with its next step in another engine, with the same key."""
        reached = threading.Event()
        count = self.count_to(3)

        def until_second(txn: Cursor, run: JobRun) -> Outcome:
            if run.state:
                reached.set()
                self.end_connections()
            return count(txn, run)

        self.due("tick")
        first = self.start(_Job("tick", until_second))
        await poll(reached.is_set, "the second step")
        await first.stop()
        self.assertEqual(self.row("state, runs"), ({"at": 1}, 0))
        self.start(_Job("tick", count))
        await self.reached("runs = 1")
        states = ["{}", "{'at': 1}", "{'at': 2}"]
        self.assertEqual(self.effects(), [(self.key(), state) for state in states])

    async def test_shared(self) -> None:
        """Three schedulers on one database share the steps, and every step of every run takes effect once."""
        done_by: list[set[int]] = [set(), set(), set()]
        names = [f"job.{number}" for number in range(8)]
        count = self.count_to(12)

        def work_of(scheduler: int) -> Work:
            def work(txn: Cursor, run: JobRun) -> Outcome:
                done_by[scheduler].add(1)
                return count(txn, run)

            return work

        self.due(*names)
        for scheduler in range(3):
            self.start(*(_Job(name, work_of(scheduler)) for name in names))
        await poll(lambda: self.execute("select sum(runs) from s2s.jobs") == [(len(names),)], "all have run")
        states = ["{}", *(f"{{'at': {at}}}" for at in range(1, 12))]
        expected = sorted((self.key(name), state) for name in names for state in states)
        self.assertEqual(sorted(self.effects()), expected)
        self.assertEqual(done_by, [{1}] * 3)

    def test_an_attempt_that_is_stale(self) -> None:
        """An outdated attempt does nothing after others have continued the run, even with the same attempt count."""
        self.due("tick")

        def attempt() -> jobs.DueJob:
            with blocking(self.url) as txn:
                due = jobs.attempt(txn, ["tick"])
            assert due is not None
            return due

        def holds(due: jobs.DueJob) -> bool:
            with blocking(self.url) as txn:
                return jobs.hold(txn, due) is not None

        stale = attempt()
        self.rush()
        with blocking(self.url) as txn:
            due = jobs.attempt(txn, ["tick"])
            assert due is not None
            place = jobs.hold(txn, due)
            assert place is not None
            jobs.go_on(txn, due, place, {"at": 1}, False)
        self.assertEqual((due.attempts, holds(stale), holds(due)), (2, False, False))
        fresh = attempt()
        self.assertEqual((fresh.attempts, fresh.due_at), (stale.attempts, stale.due_at))
        self.assertEqual((holds(stale), holds(fresh)), (False, True))
        with blocking(self.url) as txn:
            jobs.release(txn, stale)
            jobs.fail(txn, stale, "long ago")
        self.assertEqual(self.row("attempts, error, retry_at"), (1, None, fresh.retry_at))

    async def test_one_look_for_many_steps(self) -> None:
        """A run of many steps continues without a query for other jobs until its slice is over."""

        def work(_: Cursor, run: JobRun) -> Outcome:
            at = run.state.get("at", 0) + 1
            return Unfinished({"at": at}) if at < 20 else None

        # The other worker would query repeatedly meanwhile.
        self.patch(poll_loop, "POLL_S", 60.0)
        for slice_s, most in ((60.0, 3), (0.0, 22)):
            self.execute("truncate s2s.jobs")
            self.patch(scheduling.jobs, "SLICE_S", slice_s)
            looks = self.watch_looks()
            self.due("tick")
            scheduler = self.start(_Job("tick", work))
            await self.reached("runs = 1")
            await scheduler.stop()
            self.assertLessEqual(abs(len(looks) - most), 2, slice_s)

    async def test_a_pause_in_a_slice(self) -> None:
        """A pause ends a slice: the attempt of the next step is given back, and no step runs until the resume."""
        condition = EngineState()

        def work(_: Cursor, run: JobRun) -> Outcome:
            at = run.state.get("at", 0) + 1
            if at == 3:
                condition.wanted = "paused"
            return Unfinished({"at": at}) if at < 6 else None

        self.patch(scheduling.jobs, "SLICE_S", 60.0)
        self.due("tick")
        self.start(_Job("tick", work), condition=condition)
        await self.reached("state ->> 'at' = '3' and attempts = 0 and retry_at is null")
        await deferLater(reactor, 0.3)
        self.assertEqual(self.row("state ->> 'at'"), ("3",))
        condition.wanted = "running"
        await self.reached("runs = 1")

    def test_what_a_snapshot_keeps(self) -> None:
        """The cost of a step does not grow with the dead versions of its row that an open snapshot keeps."""
        holding = psycopg2.connect(self.url)
        self.addCleanup(holding.close)
        holding.cursor().execute("begin isolation level repeatable read; select from s2s.jobs")
        self.due("tick")
        pages = []
        with blocking(self.url) as txn:
            due = jobs.attempt(txn, ["tick"])
            for number in range(3000):
                assert due is not None
                if number % 1000:
                    place = jobs.hold(txn, due)
                    due = jobs.go_on(txn, due, place or "", {"at": number}, True)
                    continue
                with txn.connection.cursor(cursor_factory=RecordingCursor) as recording:
                    jobs.hold(recording, due)
                    pages.append(recording.pages())
        self.assertLess(max(pages), 10)

    async def test_what_is_locked(self) -> None:
        """A job locked by another session is skipped, without a busy loop, and others run."""
        self.due("tick")
        holding = psycopg2.connect(self.url)
        self.addCleanup(holding.close)
        with holding.cursor() as txn:
            txn.execute("select * from s2s.jobs for update")
        self.due("other")
        self.start(_Job("tick", _nothing), _Job("other", _nothing))
        await self.reached("runs = 1", "other")
        before = self.transactions()
        await deferLater(reactor, 0.5)
        # Two workers poll ten times each in this time.
        self.assertLess(self.transactions() - before, 60)
        holding.rollback()
        await self.reached("runs = 1")

    async def test_one_that_hangs(self) -> None:
        """A hanging job occupies only one worker, even if its lock is lost meanwhile: the others run."""
        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        self.patch(jobs, "PAUSE", "interval '0.1 seconds'")

        def hang(*_: Any) -> Outcome:
            begun.set()
            assert go_on.wait(20)
            return None

        self.due("hangs")
        self.start(_Job("hangs", hang), _Job("well", _nothing, "every:1s"))
        await poll(begun.is_set, "it hangs")
        self.end_connections()
        await self.reached("runs >= 2", "well")
        self.assertEqual(self.row("runs, attempts", "hangs"), (0, 1))
        go_on.set()

    def transactions(self) -> int:
        """Return the number of transactions in this database."""
        self.execute("select pg_stat_clear_snapshot()")
        return int(self.execute("select xact_commit from pg_stat_database where datname = current_database()")[0][0])


class ConditionTests(SchedulerTestCase):
    """Pausing and stopping, and the settings that a job gets."""

    async def test_paused(self) -> None:
        """During a pause the current step finishes, the state is ``pausing`` until then, and no other step begins."""
        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def work(txn: Cursor, run: JobRun) -> Outcome:
            if run.state:
                return None
            begun.set()
            go_on.wait(20)
            return Unfinished({"at": 1})

        self.due("tick")
        condition = EngineState()
        self.start(_Job("tick", work), _Job("other", _nothing), condition=condition)
        await poll(begun.is_set, "the step")
        condition.wanted = "paused"
        self.assertEqual(condition.state, "pausing")
        self.execute("update s2s.jobs set due_at = to_timestamp(3600) where job_type = 'other'")
        go_on.set()
        await poll(lambda: condition.state == "paused", "the pause")
        # The next step may have been claimed already, and is given back.
        await self.reached("attempts = 0")
        self.assertEqual(self.row("state, runs"), ({"at": 1}, 0))
        before = self.effects()
        looks = self.watch_looks()
        await deferLater(reactor, 0.3)
        looks.clear()  # one may have been in progress
        await deferLater(reactor, 0.3)
        self.assertEqual((self.effects(), looks), (before, []))
        self.assertEqual(self.row("runs, attempts", "other"), (0, 0))
        condition.wanted = "running"
        await self.reached("runs = 1")
        await self.reached("runs = 1", "other")

    async def test_paused_while_it_looks(self) -> None:
        """A pause between the attempt and the step takes effect: the attempt is given back."""
        condition = EngineState()
        attempt, release = jobs.attempt, jobs.release
        released: list[Any] = []

        def attempt_then_pause(*args: Any) -> Any:
            found = attempt(*args)
            # Ignore the query of the other worker, which finds nothing: it may end after the pause.
            if found and not released:
                condition.wanted = "paused"
            return found

        def note_release(txn: Cursor, due: Any) -> None:
            release(txn, due)
            released.append(due)

        self.due("tick")
        self.patch(jobs, "attempt", attempt_then_pause)
        self.patch(jobs, "release", note_release)
        self.start(_Job("tick", _nothing), condition=condition)
        await poll(lambda: released and self.row("attempts = 0 and retry_at is null")[0], "the end")
        self.assertEqual((self.effects(), self.row("runs, error")), ([], (0, None)))
        condition.wanted = "running"
        await self.reached("runs = 1")

    async def test_stopped(self) -> None:
        """A stop waits for the current step, which is committed, and begins no other."""
        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def work(txn: Cursor, run: JobRun) -> Outcome:
            begun.set()
            go_on.wait(20)
            return Unfinished({"at": run.state.get("at", 0) + 1})

        self.due("tick")
        scheduler = self.start(_Job("tick", work))
        await poll(begun.is_set, "the step")
        stopped = scheduler.stop()
        self.assertFalse(stopped.called)
        go_on.set()
        await stopped
        self.assertEqual(self.row("state, attempts"), ({"at": 1}, 0))

    async def test_one_that_hangs(self) -> None:
        """A slow job does not delay another."""
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        self.due("tick")
        self.due("other", at=2 * _HOUR)
        self.start(_Job("tick", lambda _, __: go_on.wait(20) and None), _Job("other", _nothing))
        await self.reached("runs = 1", "other")
        self.assertEqual(self.row("runs"), (0,))
        go_on.set()
        await self.reached("runs = 1")

    async def test_settings(self) -> None:
        """Each step gets the settings at its start, including those set during the run, and the frame size limit."""
        seen: list[Any] = []
        key = "job.decay.rate_permille"

        def work(txn: Cursor, run: JobRun) -> Outcome:
            seen.append((run.setting(key), run.frame_size))
            if not run.state:
                self.execute("update s2s.config set value = '7' where key = %s", key)
                return Unfinished({"at": 1})
            txn.execute("update s2s.config set value = '8' where key = %s", (key,))
            return None

        self.due("tick")
        self.start(_Job("tick", work))
        await self.reached("runs = 1")
        self.assertEqual(seen, [(10, 65536), (7, 65536)])

    async def test_without_jobs(self) -> None:
        """Without jobs the scheduler sends no query to the database."""
        looks = self.watch_looks()
        scheduler = self.start()
        await deferLater(reactor, 0.1)
        await scheduler.stop()
        self.assertEqual(looks, [])


_PLUGIN = """
import os
from s2s.handlers.jobs import Job

class Tick(Job):
    schedule = "every:1s"

    def __init__(self, number):
        self.job_type = f"test.tick.{number}"

    def run(self, txn, run):
        txn.execute("insert into public.ticks values (%s, %s)", (run.key, os.getpid()))
        txn.execute("select pg_sleep(0.02)")

globals().update({f"tick_{number}": Tick(number) for number in range(10)})
"""


class EnginesTests(RoleTestCase):
    """Two real engines."""

    @inlineCallbacks
    def test_they_share_the_jobs(self) -> Iterator[Deferred[Any]]:
        """Both engines run jobs of a plug-in, and each due time of each job is run once in total."""
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        Path(plugins, "ticks.py").write_text(_PLUGIN)
        path = os.pathsep.join((str(self.directory), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep)
        self.execute("create table public.ticks (key text, pid int)")
        with mock.patch.dict(os.environ, PYTHONPATH=path):
            engines = [self.engine(free_port(), name=f"engine-{number}") for number in (1, 2)]
        for engine in engines:
            yield engine.start()
        yield poll(
            lambda: self.execute(
                "select 1 from s2s.jobs where job_type ~ '^test' having min(runs) >= 3"
                " and (select count(distinct pid) from public.ticks) = 2"
            ),
            "both have run some",
            timeout=30,
        )
        self.assertEqual(self.execute("select key from public.ticks group by key having count(*) > 1"), [])
        for engine in engines:
            engine.stop()
        self.assertEqual(
            self.execute("select sum(runs)::int from s2s.jobs where job_type ~ '^test'")[0][0], self.count("ticks")
        )
