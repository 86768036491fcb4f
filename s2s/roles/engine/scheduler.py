"""Run the jobs that are due (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.errors import DatabaseUnavailable, HandlerStuck, NoThread, RowRefused, StatementRefused, harmless, one_line
from s2s.handlers.jobs import Job, JobRun, Unfinished, parse_schedule, validate_outcome
from s2s.protocol.settings import Value
from s2s.roles.engine.state import EngineState
from s2s.runtime.clock import Clock
from s2s.runtime.status_log import status_log
from s2s.store import sqlstate
from s2s.store.cursor import check_readable
from s2s.store.driver import Cursor
from s2s.store.handler_pool import HandlerPool, call
from s2s.store.monitors import probe
from s2s.store.poll_loop import LeftOut, PollLoop
from s2s.store.pool import Database
from s2s.store.tables import config, jobs
from s2s.store.tables.jobs import DueJob, OtherSchedule
from s2s.store.tables.own_keys import database_id, own_key

#: The number of jobs that run at once in one engine: a job that hangs does not delay the others.
LINES: Final = 2
#: Seconds between two checks for jobs that the table lacks, or has with another schedule than this engine's.
DECLARE_S: Final = 30.0
#: Steps in a row that fail because of the database or the connection, at which the job itself counts as failed if the
#: database accepts other writes.
LOSSES: Final = 3


@dataclass(frozen=True)
class Report:
    """The outcome of a step.

    :param is_finished: the run is over.
    :param next: the attempt of the next step, if this engine does that step.
    """

    is_finished: bool
    result: Mapping[str, Any] | None = None
    next: DueJob | None = None


class _JobFailed(Exception):
    """A job raised an error, or its outcome cannot be stored."""


class Scheduler:
    """Runs jobs when they are due, step by step, while the engine is running.

    :param boot_id: the ``boot_id`` of this engine.
    :param handlers: the connections on which jobs run.
    :param jobs: the jobs by name.
    :param frame_size: the longest frame that the engine sends, in bytes.
    :param emitted: called when there may be new rows in the outbox.
    :param defaults: the default of each installed setting by key.

    :ivar runs: runs finished.
    :ivar failed: steps that failed.
    """

    log = Logger()

    def __init__(
        self,
        boot_id: str,
        database: Database,
        handlers: HandlerPool,
        clock: Clock,
        jobs: Mapping[str, Job],
        condition: EngineState,
        frame_size: int,
        emitted: Callable[[], object],
        defaults: Mapping[str, Value],
    ) -> None:
        self._boot_id = boot_id
        self._database = database
        self._handlers = handlers
        self._jobs = jobs
        self._schedules = {name: each.schedule for name, each in jobs.items()}
        self._condition = condition
        self._frame_size = frame_size
        self._emitted = emitted
        self._defaults = defaults
        self._clock = clock
        self._declare_at: float | None = None
        #: Only one worker declares at a time, so that no difference is logged twice.
        self._is_declaring = False
        #: The other schedules that the last check found.
        self._other_schedules: Mapping[str, OtherSchedule] = {}
        #: The jobs that could not be declared, with the reason.
        self._undeclared: Mapping[str, str] = {}
        #: The jobs with a step in progress here: the other worker does not begin a job again that hangs.
        self._in_hand: set[str] = set()
        #: The jobs that have run here, in the order of their last turn.
        self._had_turns: dict[str, None] = {}
        #: The number of steps in a row of each job that failed because of the database or the connection.
        self._losses: dict[str, int] = {}
        self._loop = PollLoop("the scheduler", self._poll_once, clock.scheduler, LINES if jobs else 0)
        self._left_out = LeftOut("job", self._loop, clock.mono)
        self.runs = self.failed = 0

    def start(self) -> None:
        """Declare the jobs, and start running the due ones."""
        self._loop.start()

    def stop(self) -> Deferred[Any]:
        """Begin no further step.

        :returns: fires when the steps in progress are finished.
        """
        return self._loop.stop()

    async def _poll_once(self, _: int) -> float | None:
        """Do the steps of one run for :data:`s2s.store.tables.jobs.SLICE_S`, and at least one step.

        :returns: seconds to sleep, see :class:`s2s.store.poll_loop.PollLoop`.
        """
        is_first = self._declare_at is None
        if is_first and self._is_declaring:
            # No job runs before the jobs are declared. The worker that declares them wakes this one.
            return None
        if not self._is_declaring and self._clock.mono() >= (self._declare_at or 0.0):
            self._is_declaring = True
            try:
                differing, undeclared = await self._database.run(
                    self._declare, is_first, self._other_schedules, list(self._undeclared)
                )
                self._tell_undeclared(undeclared)
                self._tell_schedules(differing)
            finally:
                self._is_declaring = False
            self._declare_at = self._clock.mono() + DECLARE_S
            if is_first:
                self._loop.wake()
        if self._condition.state != "running" or self._handlers.is_full:
            return None
        others = self._in_hand.union(self._left_out.keys())
        try:
            free = [each for each in self._jobs if each not in others]
            due, due_in_s = await self._database.run(self._attempt, free, list(self._had_turns))
        except RowRefused as refused:
            return self._left_out.add(refused.key, refused)
        if due is None:
            return due_in_s
        self._had_turns.pop(due.job_type, None)
        self._had_turns[due.job_type] = None
        until = self._clock.mono() + jobs.SLICE_S
        while due is not None:
            job_type = due.job_type
            # The engine was paused, or began to stop, during the query: from then on no step begins.
            if self._condition.state != "running" or self._loop.is_stopping:
                await self._database.run(jobs.release, due)
                return None
            try:
                due = await self._do(due, until)
            except StatementRefused as refused:
                return self._left_out.add(job_type, refused)
        return 0.0

    async def _do(self, due: DueJob, until: float) -> DueJob | None:
        """Do one step.

        :param until: the time at which the caller polls for other due jobs.
        :returns: the attempt of the next step, if this engine does that step.
        """
        self._in_hand.add(due.job_type)
        is_stuck = False
        try:
            with self._condition.job():
                report = await self._handlers.run(self._step, due, until)
        except HandlerStuck as stuck:
            is_stuck = True
            # The job does not begin here again while its thread lives. Other engines try it after a pause.
            stuck.task.on_return = lambda: self._in_hand.discard(due.job_type)
            await self._handlers.end(stuck.task)
            self._tell_failure(due, str(stuck))
            await self._database.run(jobs.fail, due, one_line(stuck))
            return None
        # StatementRefused is raised by the COMMIT, at which deferred constraints are checked.
        except (_JobFailed, StatementRefused) as error:
            self._tell_failure(due, str(error))
            self._losses.pop(due.job_type, None)
            await self._database.run(jobs.fail, due, str(error))
            return None
        except NoThread:
            raise
        except DatabaseUnavailable as lost:
            # Usually the job is not at fault. But it may end its own connection, or read a damaged table, each time.
            losses = self._losses[due.job_type] = self._losses.get(due.job_type, 0) + 1
            if losses < LOSSES or self._loop.is_stopping:
                raise
            # The probe raises if the database refuses other writes too: then the job does not count as failed.
            await self._database.run(probe.check)
            self._tell_failure(due, str(lost))
            await self._database.run(jobs.fail, due, one_line(lost))
            return None
        finally:
            if not is_stuck:
                self._in_hand.discard(due.job_type)
        self._losses.pop(due.job_type, None)
        if report is None:
            return None
        self._tell(due, report)
        return report.next

    def _tell_failure(self, due: DueJob, why: str) -> None:
        self.failed += 1
        self.log.error("job {job} failed, attempt {attempts}: {why}", job=due.job_type, attempts=due.attempts, why=why)

    def _tell(self, due: DueJob, report: Report) -> None:
        self._emitted()
        if report.is_finished:
            self.runs += 1
            told = harmless(", ".join(f"{name} {value}" for name, value in (report.result or {}).items()))
            status_log.info("job {job}: {told}", job=due.job_type, told=told or "done")

    def _tell_schedules(self, others: Mapping[str, OtherSchedule]) -> None:
        """Log each schedule that became another one, and each that is this engine's again."""
        before, self._other_schedules = self._other_schedules, others
        for job, (schedule, is_kept) in others.items():
            if job not in before or before[job].schedule != schedule:
                self.log.warn(
                    "job {job} has the schedule {schedule} of another release or plug-in, or set by hand; this engine"
                    " declares {own}: {cure}",
                    job=job,
                    schedule=harmless(schedule),
                    own=self._schedules[job],
                    cure="run one release on all engines: this one sets its own again when the other engine has ended"
                    if is_kept
                    else "no engine that lives keeps the other one, so this one sets its own again within a minute",
                )
        for job in before.keys() - others.keys():
            status_log.info("job {job} has the schedule {own} again", job=job, own=self._schedules[job])

    def _tell_undeclared(self, undeclared: Mapping[str, str]) -> None:
        """Log each job that cannot be declared, and each that is declared after all."""
        before, self._undeclared = self._undeclared, undeclared
        for job, why in undeclared.items():
            if before.get(job) != why:
                self.log.error(
                    "job {job} cannot be declared, which is tried again every {seconds:g} s: {why}",
                    job=job,
                    seconds=DECLARE_S,
                    why=why,
                )
        for job in before.keys() - undeclared.keys():
            status_log.info("job {job} is declared", job=job)

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _declare(
        self, txn: Cursor, is_first: bool, before: Mapping[str, OtherSchedule], undeclared: Sequence[str] = ()
    ) -> tuple[Mapping[str, OtherSchedule], Mapping[str, str]]:
        """Insert the jobs that the table lacks; at the first check, also replace schedules that differ.

        Later, another engine may have declared another schedule of the same job; that schedule stays while the other
        engine lives. An engine may live although one check finds no presence lock of it, as after a restart of the
        database, so a schedule is replaced only at the second check that finds it without a living engine.

        :param before: the other schedules that the previous check found.
        :param undeclared: the jobs that the previous check could not declare.
        :returns: the schedules that still differ, and the jobs that cannot be declared.
        """
        if is_first:
            names, others = list(self._jobs), {}
        else:
            others = jobs.other_schedules(txn, self._boot_id, self._schedules)
            orphaned = [job for job, other in others.items() if not other.is_kept and before.get(job) == other]
            names = [*jobs.missing(txn, self._jobs), *jobs.hold_idle(txn, orphaned), *undeclared]
        refused = jobs.declare(txn, self._boot_id, {name: self._schedules[name] for name in names}, _next_after)
        return {job: other for job, other in others.items() if job not in names}, refused

    def _attempt(self, txn: Cursor, job_types: list[str], turns: list[str]) -> tuple[DueJob | None, float | None]:
        due = jobs.attempt(txn, job_types, turns)
        return due, None if due else jobs.next_due_s(txn, job_types)

    def _step(self, txn: Cursor, due: DueJob, until: float) -> Report | None:
        """Do a step in the transaction that stores it.

        :param until: see :meth:`_do`.
        :returns: the outcome; ``None``: the attempt belongs to another engine by now.
        :raises _JobFailed: the job is at fault.
        """
        place = jobs.hold(txn, due)
        if place is None:
            return None
        settings = {**self._defaults, **config.read(txn).values}
        key = own_key(database_id(txn), due.job_type, due.due_at, due.runs)
        try:
            check_readable(due.state, "JSON of its state")
            # foreign() raises if the job has ended the transaction or has swallowed the error of a statement.
            with self._handlers.foreign(txn, f"job {due.job_type}") as cursor:
                run = JobRun(cursor, key, due.due_at, settings, self._frame_size, due.state)
                outcome = validate_outcome(call(self._jobs[due.job_type].run, cursor, run))
            if isinstance(outcome, Unfinished):
                is_next_ours = self._clock.mono() < until
                return Report(False, next=jobs.go_on(txn, due, place, outcome.state, is_next_ours))
            jobs.finish(txn, due, _next_after, outcome)
            return Report(True, outcome)
        # Catch BaseException: in this thread only the job can raise SystemExit. The pool converts the error of a lost
        # connection or a stopping process.
        except BaseException as error:
            if sqlstate.of(error).fault != "statement":
                raise
            raise _JobFailed(one_line(error)) from None


def _next_after(schedule: str, ts: int) -> int:
    return parse_schedule(schedule).next_after(ts)
