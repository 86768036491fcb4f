"""The declaration of a job, and its schedule."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.plugin import IPlugin
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from s2s.errors import CanonicalError, OperatorError
from s2s.handlers.jobs import IJob, Job, JobRun, Schedule, parse_schedule, registry
from s2s.protocol import canonical
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.store.tables import outbox
from s2s.store.tables.own_keys import digest
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase

_SECONDS = st.integers(-(2**40), 2**40)


class _Tick(Job):
    job_type = "test.tick"
    schedule = "every:5s"

    def run(self, txn: Cursor, run: JobRun) -> None:
        """Report the time at which the run was due."""
        run.emit("notice.publish", run.key, {"at": run.due_at}, priority=7, due_at=run.due_at + 60)


class ScheduleTests(SynchronousTestCase):
    """:func:`parse_schedule` and :class:`Schedule`."""

    def test_every(self) -> None:
        """``every:Ns`` is due at the multiples of N seconds, and the next time is strictly after the given one."""
        ten = parse_schedule("every:10s")
        self.assertEqual([ten.next_after(ts) for ts in (-1, 0, 1, 9, 10, 11)], [0, 10, 10, 10, 20, 20])
        self.assertEqual(parse_schedule("every:1s").next_after(1737990000), 1737990001)
        self.assertEqual(parse_schedule("every:86400s").next_after(86399), 86400)

    def test_daily(self) -> None:
        """``daily@HH:MMZ`` is due at that minute of every day in UTC."""
        at = parse_schedule("daily@23:59Z").next_after
        noon = int(datetime(2028, 2, 28, 12, tzinfo=timezone.utc).timestamp())
        first = at(noon)
        days = [first, at(first), at(at(first))]
        told = [datetime.fromtimestamp(day, timezone.utc).isoformat() for day in days]
        self.assertEqual(told, [f"2028-{day}T23:59:00+00:00" for day in ("02-28", "02-29", "03-01")])
        self.assertEqual(at(first - 1), first)
        self.assertEqual(parse_schedule("daily@00:00Z"), parse_schedule("every:86400s"))

    @given(_SECONDS, st.integers(1, 86400), st.integers(0, 86399))
    def test_next_is_the_first(self, ts: int, every_s: int, offset_s: int) -> None:
        """The next time is on the schedule, after the given one, and at most one period after it."""
        due = Schedule(every_s, offset_s).next_after(ts)
        self.assertEqual((due - offset_s) % every_s, 0)
        self.assertTrue(ts < due <= ts + every_s)

    @given(st.integers(0, 2**33), st.times())
    def test_daily_agrees_with_the_calendar(self, ts: int, time: Any) -> None:
        """A daily time is the one that the calendar shows."""
        now = datetime.fromtimestamp(ts, timezone.utc)
        due = now.replace(hour=time.hour, minute=time.minute, second=0)
        due += timedelta(days=due <= now)
        said = parse_schedule(f"daily@{time.hour:02}:{time.minute:02}Z").next_after(ts)
        self.assertEqual(said, due.timestamp())

    def test_refusals(self) -> None:
        """An ill-formed schedule is refused in one line that describes the format."""
        bad = ["", "every:0s", "every:86401s", "every:99999s", "every:05s", "every:5", "every:-5s", "every:5s\n"]
        bad += ["every:\u0665s", "daily@24:00Z", "daily@12:60Z", "daily@1:00Z", "daily@12:00", "Daily@12:00Z", "hourly"]
        for text in bad:
            with self.subTest(text=text):
                said = str(self.assertRaises(OperatorError, parse_schedule, text))
                self.assertIn("daily@HH:MMZ", said)
                self.assertNotIn("\n", said)


class RegistryTests(SynchronousTestCase):
    """:func:`registry`, and the base class."""

    def test_it_provides_the_interfaces(self) -> None:
        """Instances of the base class provide the interfaces of a plug-in and of a job."""
        for kind in (_Tick(), *FOUND.jobs.values()):
            verifyObject(IJob, kind)
            verifyObject(IPlugin, kind)

    def test_by_name(self) -> None:
        """Jobs are found by their names."""
        tick = _Tick()
        self.assertEqual(registry([*FOUND.jobs.values(), tick])["test.tick"], tick)

    def test_refusals(self) -> None:
        """An ill-formed or repeated name, or an ill-formed schedule, is refused with the name of the class."""
        for change in ({"job_type": "Upper"}, {"job_type": "a" * 65}, {"job_type": ""}, {"schedule": "hourly"}):
            tick = type("_Tock", (_Tick,), change)()
            with self.subTest(change=change):
                self.assertIn("_Tock", str(self.assertRaises(OperatorError, registry, [tick])))
        self.assertIn("_Tick", str(self.assertRaises(OperatorError, registry, [_Tick(), _Tick()])))


class JobRunTests(DatabaseTestCase):
    """:class:`JobRun` on a real transaction."""

    def test_emit(self) -> None:
        """An emitted command is in the outbox, with its content, after the transaction is committed."""
        with blocking(self.url, "test") as txn:
            _Tick().run(txn, JobRun(txn, "test.tick:60", 60, {}, 65536))
            self.assertEqual(self.execute("select count(*) from s2s.outbox"), [(0,)])
        with blocking(self.url, "test") as txn:
            [row] = outbox.Claims().claim(txn, 10, 1.0)
        self.assertEqual(
            row.push(),
            {
                "cmd_type": "notice.publish",
                "idem_key": f"test.tick:60:{digest('notice.publish', canonical.dumps({'at': 60}))}",
                "payload": {"at": 60},
                "priority": 7,
                "due_at": 120,
            },
        )

    def test_emit_is_undone(self) -> None:
        """A run that fails has emitted nothing."""
        with self.assertRaises(CanonicalError), blocking(self.url, "test") as txn:
            run = JobRun(txn, "test.tick:60", 60, {}, 65536)
            _Tick().run(txn, run)
            run.emit("notice.publish", "k", {"price": 1.5})
        self.assertEqual(self.execute("select count(*) from s2s.outbox"), [(0,)])

    def test_setting(self) -> None:
        """A job reads a setting by its key, and an unknown key is the job's error."""
        with blocking(self.url, "test") as txn:
            run = JobRun(txn, "test.tick:60", 60, {"job.decay.rate_permille": 11}, 65536)
        self.assertEqual(run.setting("job.decay.rate_permille"), 11)
        self.assertRaises(KeyError, run.setting, "job.decay.rate")
