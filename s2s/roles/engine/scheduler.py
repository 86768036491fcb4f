"""Running the jobs that are due (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.errors import DatabaseUnavailable, HandlerStuck, NoThread, RowRefused, StatementRefused, harmless, one_line
from s2s.handlers.jobs import Job, JobRun, Unfinished, parse_schedule, validate_outcome
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

#: Jobs that run at once in one engine: one that hangs does not hold up the others.
LINES: Final = 2
#: Seconds between two looks for jobs that the table lacks, or has with a schedule that is not ours.
DECLARE_S: Final = 30.0
#: Steps in a row that fail by a fault of the database, or of the connection, before the job itself counts as failed
#: where the database serves others.
LOSSES: Final = 3


@dataclass(frozen=True)
class Report:
    """What a step came to.

    :param is_finished: the run is over.
    :param next: the attempt of the next step, where it is ours.
    """

    is_finished: bool
    result: Mapping[str, Any] | None = None
    next: DueJob | None = None


class _JobFailed(Exception):
    """A job raised, or came to what cannot be stored."""


class Scheduler:
    """Runs jobs when they are due, step by step, while the engine is running.

    :param boot_id: of this engine.
    :param handlers: the connections on which jobs run.
    :param jobs: by name.
    :param frame_size: the longest frame that the engine sends, in bytes.
    :param emitted: called when there may be something new in the outbox.

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
    ) -> None:
        self._boot_id = boot_id
        self._database = database
        self._handlers = handlers
        self._jobs = jobs
        self._schedules = {name: each.schedule for name, each in jobs.items()}
        self._condition = condition
        self._frame_size = frame_size
        self._emitted = emitted
        self._clock = clock
        self._declare_at: float | None = None
        #: One worker declares, so that no difference is logged twice.
        self._is_declaring = False
        #: As the last look found them.
        self._other_schedules: Mapping[str, OtherSchedule] = {}
        #: Jobs that could not be declared, and why.
        self._undeclared: Mapping[str, str] = {}
        #: What is under way here: one that hangs is not begun again by the other line.
        self._in_hand: set[str] = set()
        #: The jobs that have had a turn here, in the order of their last one.
        self._had_turns: dict[str, None] = {}
        #: Steps in a row of each job that the database, or the connection, was at fault for.
        self._losses: dict[str, int] = {}
        self._turns = PollLoop("the scheduler", self._poll_once, clock.scheduler, LINES if jobs else 0)
        self._left_out = LeftOut("job", self._turns, clock.mono)
        self.runs = self.failed = 0

    def start(self) -> None:
        """Declare the jobs, and run what is due from now on."""
        self._turns.start()

    def stop(self) -> Deferred[Any]:
        """Begin no further step.

        :returns: fires when those under way are finished.
        """
        return self._turns.stop()

    async def _poll_once(self, _: int) -> float | None:
        """Do the steps of one run for :data:`s2s.store.tables.jobs.SLICE_S`, and at least one step.

        :returns: seconds to sleep, see :class:`s2s.store.poll_loop.PollLoop`.
        """
        is_first = self._declare_at is None
        if is_first and self._is_declaring:
            # Nothing runs before the jobs are declared. The worker that declares them wakes this one.
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
                self._turns.wake()
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
            # Paused while we looked: from then on no job begins.
            if self._condition.state != "running" or self._turns.is_stopping:
                await self._database.run(jobs.release, due)
                return None
            try:
                due = await self._do(due, until)
            except StatementRefused as refused:
                return self._left_out.add(job_type, refused)
        return 0.0

    async def _do(self, due: DueJob, until: float) -> DueJob | None:
        """Do one step.

        :param until: when the caller looks at what else is due.
        :returns: the attempt of the next step, where it is ours.
        """
        self._in_hand.add(due.job_type)
        is_stuck = False
        try:
            with self._condition.job():
                report = await self._handlers.run(self._step, due, until)
        except HandlerStuck as stuck:
            is_stuck = True
            # It begins here no more while its thread lives. Other engines try it after a pause.
            stuck.task.on_return = lambda: self._in_hand.discard(due.job_type)
            await self._handlers.end(stuck.task)
            self._tell_failure(due, str(stuck))
            await self._database.run(jobs.fail, due, one_line(stuck))
            return None
        # Refused: by the COMMIT, at which deferred constraints are checked.
        except (_JobFailed, StatementRefused) as error:
            self._tell_failure(due, str(error))
            self._losses.pop(due.job_type, None)
            await self._database.run(jobs.fail, due, str(error))
            return None
        except NoThread:
            raise
        except DatabaseUnavailable as lost:
            # Mostly nobody's fault. But a job may end its own connection, or read a damaged table, each time.
            losses = self._losses[due.job_type] = self._losses.get(due.job_type, 0) + 1
            if losses < LOSSES or self._turns.is_stopping:
                raise
            # Not while the database refuses other writes, too.
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
        """Log each schedule that became another one, and each that is ours again."""
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
        """Put into the table what it lacks, at the first look also what differs.

        Later another engine may have declared another schedule of the same job, and keeps it while it lives. It may
        live though one look finds no presence lock, as after a restart of the database.

        :param before: what the look before found.
        :param undeclared: what the look before could not declare.
        :returns: what differs still, and what cannot be declared.
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
        :returns: what it came to; ``None``: it is another engine's by now.
        :raises _JobFailed: the job is to blame.
        """
        place = jobs.hold(txn, due)
        if place is None:
            return None
        settings = config.read(txn).values
        key = own_key(database_id(txn), due.job_type, due.due_at, due.runs)
        try:
            check_readable(due.state, "JSON of its state")
            # It tells when the job has ended the transaction, or has swallowed the error of a statement.
            with self._handlers.foreign(txn, f"job {due.job_type}") as cursor:
                run = JobRun(cursor, key, due.due_at, settings, self._frame_size, due.state)
                outcome = validate_outcome(call(self._jobs[due.job_type].run, cursor, run))
            if isinstance(outcome, Unfinished):
                is_next_ours = self._clock.mono() < until
                return Report(False, next=jobs.go_on(txn, due, place, outcome.state, is_next_ours))
            jobs.finish(txn, due, _next_after, outcome)
            return Report(True, outcome)
        # BaseException: in this thread a SystemExit is the job's own, and nobody else's. A connection that is lost, or
        # a process that stops, is made something else of by the pool.
        except BaseException as error:
            if sqlstate.of(error).fault != "statement":
                raise
            raise _JobFailed(one_line(error)) from None


def _next_after(schedule: str, ts: int) -> int:
    return parse_schedule(schedule).next_after(ts)
