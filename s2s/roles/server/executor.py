"""Run commands. One transaction contains a command's effect and its new status (docs/protocol.rst, "Commands").

Every handler exception counts as a failed attempt, including SQL errors: a deadlock, a timeout or a full disk may well
be the command's fault, and a pause and nine further attempts follow. A command that fails after other commands of its
batch ran in the same transaction first runs again, uncharged, since the other commands may have caused the failure. If
the database is at fault, the charge cannot be written either. A lost connection is not charged before the third loss
of a command (:data:`LOSSES`), and a failure because the process stops is not charged before the fourth stop
(:data:`s2s.store.tables.commands.MOST_STOPS`). If a process dies, another process charges its commands;
:mod:`s2s.store.tables.claims` describes how a dead process is told from a living one.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import DatabaseUnavailable, HandlerStuck, HandlerTimeout, NoThread, StatementRefused, one_line
from s2s.handlers.commands import Command, CommandHandler
from s2s.roles.server.reaper import Reaper
from s2s.runtime.line_quota import MOST_TOLD, LineQuota
from s2s.store import sqlstate
from s2s.store.cursor import Unreadable, check_readable
from s2s.store.driver import Cursor, check_constraints, is_broken, is_in_transaction, is_read_only
from s2s.store.handler_pool import MOST_STUCK, HandlerPool, call
from s2s.store.monitors import probe
from s2s.store.poll_loop import LeftOut, PollLoop
from s2s.store.pool import Database
from s2s.store.tables import claims, commands
from s2s.store.tables.ready import Ready

#: Seconds between two checks whether this process holds its presence lock again.
ABSENT_S: Final = 0.25
#: A command is charged for a lost connection from the third loss on, if it ran alone at that loss.
LOSSES: Final = 3
#: The numbers of commands remembered because their connection was lost, and because they run apart from others.
_MOST_SUSPECTS: Final = 10_000
_MOST_APART: Final = 10_000
#: Seconds after which a batch begins no further command. The remaining commands go to the next worker that polls, so
#: that the locks and the snapshot of one transaction do not last for a whole batch of slow handlers.
BATCH_S: Final = 5.0
#: Number of stuck handlers of one type at which this process takes no more commands of that type: the type may be at
#: fault, and commands of other types go on. One bad command may account for two, first in a batch and then alone.
STUCK_OF_TYPE: Final = 3
#: Seconds between two attempts to write the claim or the charge of a stuck handler while the database is away.
_AGAIN_S: Final = 1.0


@dataclass
class Report:
    """The outcome of one batch."""

    done: list[int] = field(default_factory=list)
    failed: list[commands.Charge] = field(default_factory=list)
    #: Commands to run again uncharged, with others that failed: they failed after others had run in the transaction.
    doubtful: list[int] = field(default_factory=list)
    #: Commands to run alone next, uncharged: the database refused to change them.
    lone: list[int] = field(default_factory=list)
    dead: int = 0
    #: The id of the transaction.
    xid: int = 0
    #: Seconds to sleep afterwards, see :class:`s2s.store.poll_loop.PollLoop`.
    pause_s: float | None = 0.0


class _Lone(Container[int]):
    """The commands that run alone: those in ``lone``, and those whose connection was lost at least twice.

    :param losses: the number of lost connections by command.
    """

    def __init__(self, lone: Container[int], losses: Mapping[int, int]) -> None:
        self._lone = lone
        self._losses = losses

    def __contains__(self, cmd_id: object) -> bool:
        return cmd_id in self._lone or (isinstance(cmd_id, int) and self._losses.get(cmd_id, 0) > 1)


class _Spoiled(Exception):
    """A handler left the transaction of its batch unusable.

    :param batch: the commands that the handler was called with.
    :param report: the outcome of the batch until then.
    """

    def __init__(self, batch: Sequence[Command], error: BaseException, report: Report) -> None:
        super().__init__(one_line(error))
        self.cmd_ids = [command.cmd_id for command in batch]
        self.report = report


class Executor:
    """Runs the commands that are due, in order of priority, ``due_at`` and ``cmd_id``.

    :param database: the database that contains the commands.
    :param handlers: the connections on which their handlers run.
    :param registry: the command handlers by type name.
    :param boot_id: the ``boot_id`` of this process.
    :param is_present: returns whether this process holds its presence lock (:class:`s2s.store.listen.Listener`).
        Without the lock nothing is claimed, since another process may consider this one dead. The attribute may be set
        before the start.
    :param workers: the number of batches that run at once; 0: no commands run.
    :param batch_size: see the attribute below.
    :param clock: for tests.

    :ivar batch_size: the largest number of commands in a batch; may be set at any time.
    :ivar ran: commands done.
    :ivar failed: attempts charged.
    :ivar dead: commands that became dead.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        handlers: HandlerPool,
        registry: Mapping[str, CommandHandler],
        boot_id: str,
        *,
        is_present: Callable[[], bool] = lambda: True,
        workers: int = 2,
        batch_size: int = 256,
        clock: Any = None,
    ) -> None:
        if clock is None:
            from twisted.internet import reactor as clock  # noqa: PLC0415 - importing it installs it
        self._database = database
        self._handlers = handlers
        self._clock = clock
        self._registry = registry
        self._boot_id = boot_id
        self.is_present = is_present
        self._workers = workers
        self.batch_size = batch_size
        self._loop = PollLoop("a worker of the executor", self._poll_once, clock, workers)
        #: The number of the worker that runs in each line of the poll loop. A new worker replaces a stuck one.
        self._numbers = list(range(workers))
        self._next_number = itertools.count(workers)
        self._reaping: list[Deferred[None]] = []
        #: The charges of stuck commands that are in progress.
        self._keeping: set[Deferred[None]] = set()
        self._ready = Ready(registry)
        self._reaper = Reaper(database, boot_id, self._charged, clock, lambda: self._ready.first_note)
        #: The number of lost connections of each command since its last outcome.
        self._losses: Counter[int] = Counter()
        #: Commands that run alone before they are charged: those in :attr:`Report.lone`, and those of batches that were
        #: rolled back although each command's constraints had been checked.
        self._lone: set[int] = set()
        #: Commands that run with others that failed: those in :attr:`Report.doubtful`, and those of batches that were
        #: rolled back.
        self._doubtful: set[int] = set()
        self._left_out = LeftOut("command", self._loop, clock.seconds)
        self._lines = LineQuota(clock, self._tell_failures, MOST_TOLD)
        self.ran = self.failed = self.dead = 0

    def start(self) -> None:
        """Start the workers."""
        if self._workers:
            self._loop.start()
            self._reaping = [self._reaper.start()]

    def stop(self) -> Deferred[None]:
        """Stop claiming.

        :returns: fires when the running batches are finished and this process has no claim any more.
        """
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await self._leave_off()
        if self._workers:
            # A batch that ended because the database was away still has its claim.
            await self._strike_all()

    def abandon(self) -> Deferred[None]:
        """Release the claims of the running batches, uncharged, after :meth:`s2s.store.pool.Database.cancel`.

        :returns: fires in bounded time: this process has no claim any more, or the database does not answer.
        """
        self._leave_off()
        return Deferred.fromCoroutine(self._strike_all())

    def _leave_off(self) -> Deferred[Any]:
        self._reaper.stop()
        self._lines.stop()
        return gatherResults([self._loop.stop(), *self._reaping, *self._keeping])

    async def _strike_all(self) -> None:
        try:
            await self._database.run_at_shutdown(claims.release_all, self._boot_id)
        except DatabaseUnavailable as error:
            self.log.warn(
                "the claims of this process were not released: its unfinished commands may lose an attempt: {why}",
                why=str(error),
            )

    @property
    def types(self) -> Collection[str]:
        """The command types that this process runs."""
        return self._registry.keys()

    @property
    def condition(self) -> str:
        """``ok``, ``ok, but`` with restrictions, ``off`` without workers, or why no command is taken."""
        if not self._workers:
            return "off"
        if not self.is_present():
            return "the database does not know that this process lives"
        if trouble := self._loop.trouble:
            return f"no command can be taken: {trouble}"
        names = "; ".join(task.name for task in self._handlers.stuck)
        if self._handlers.is_full:
            return f"{MOST_STUCK} handlers do not return, start this process again: {names}"
        buts = [f"{len(self._handlers.stuck)} handlers do not return: {names}"] if names else []
        if left_out := sorted(set(self._registry) - set(self._served())):
            buts.append(f"no more commands are taken of {', '.join(left_out)}")
        if refused := len(self._left_out.keys()):
            buts.append(f"the database refuses to change {refused} commands, which the log names")
        return f"ok, but {'; '.join(buts)}" if buts else "ok"

    def _served(self) -> list[str]:
        """Return the types with fewer than :data:`STUCK_OF_TYPE` stuck handlers."""
        stuck = Counter(task.subject[0].cmd_type for task in self._handlers.stuck)
        return [cmd_type for cmd_type in self._registry if stuck[cmd_type] < STUCK_OF_TYPE]

    def wake(self) -> None:
        """Poll the table now, because new commands may have been committed."""
        self._loop.wake()

    # --- a worker ------------------------------------------------------------------------------------------------

    async def _poll_once(self, line: int) -> float | None:
        """Claim and run one batch.

        :returns: seconds to sleep, see :class:`s2s.store.poll_loop.PollLoop`.
        """
        if not self.is_present():
            return ABSENT_S
        if self._handlers.is_full:
            return None
        worker = self._numbers[line]
        size = self.batch_size
        self._ready.leave_out(map(int, self._left_out.keys()))
        lone = _Lone(self._lone, self._losses)
        params = self._boot_id, worker, size, lone, self._doubtful, self._ready
        cmd_ids, due_in_s = await self._database.run(_claim, *params)
        if not cmd_ids:
            return None if due_in_s is None else max(due_in_s, 0.0)
        if len(cmd_ids) == size:
            self.wake()
        try:
            report = await self._handlers.run(self._run, worker, cmd_ids)
        except HandlerStuck as stuck:
            self._numbers[line] = next(self._next_number)
            # Not awaited, so that other commands run meanwhile: a session that the database cannot end keeps its locks.
            keeping = Deferred.fromCoroutine(self._keep_stuck(worker, stuck, cmd_ids))
            self._keeping.add(keeping)
            keeping.addBoth(self._kept, keeping)
            return 0.0
        except _Spoiled as spoiled:
            report = await self._charge_spoiled(worker, cmd_ids, spoiled)
        except NoThread:
            raise
        except DatabaseUnavailable as error:
            # Usually no command is at fault. But a command that ends its own connection must not do so for ever: after
            # two losses a command runs alone, uncharged, and it is charged if it then loses the connection again.
            self._losses.update(cmd_ids)
            while len(self._losses) > _MOST_SUSPECTS:
                # Forget the oldest entry: its command may have run in another process since.
                del self._losses[next(iter(self._losses))]
            if self._loop.is_stopping or len(cmd_ids) > 1 or self._losses[cmd_ids[0]] < LOSSES:
                raise
            # The probe raises if the database refuses other writes too: then nothing is charged.
            await self._database.run(probe.check)
            report = await self._charge_alone(worker, cmd_ids, one_line(error))
        except Exception as error:
            # The transaction failed, for example by a constraint that is checked at the COMMIT. The commands of a batch
            # run once more, uncharged, so that only the command at fault is charged: first with a check of the
            # constraints after each of them, then each alone.
            if len(cmd_ids) > 1:
                if self._lines.may_tell(one_line(error)):
                    self.log.warn(
                        "a batch of {size} commands was rolled back and runs again: {why}",
                        size=len(cmd_ids),
                        why=one_line(error),
                    )
                _remember(self._lone if self._doubtful.issuperset(cmd_ids) else self._doubtful, cmd_ids)
                return 0.0
            # The traceback of a timeout or a refusal adds nothing to the text of the charge.
            if not isinstance(error, (HandlerTimeout, StatementRefused)) and self._lines.may_tell(one_line(error)):
                self.log.failure("a batch of {size} commands was rolled back", size=len(cmd_ids))
            report = await self._charge_alone(worker, cmd_ids, one_line(error))
        self._finish(cmd_ids, report)
        return report.pause_s

    async def _charge_alone(self, worker: int, cmd_ids: Sequence[int], error: str) -> Report:
        """Charge a command that ran alone, or leave it out for a while if the database refuses the charge."""
        try:
            return await self._database.run(_charge, self._boot_id, worker, cmd_ids, error)
        except StatementRefused as refused:
            return self._leave_out(cmd_ids, refused)

    async def _charge_spoiled(self, worker: int, cmd_ids: Sequence[int], spoiled: _Spoiled) -> Report:
        try:
            return await self._database.run(_charge_spoiled, self._boot_id, worker, cmd_ids, spoiled)
        except StatementRefused as refused:
            report = self._leave_out(spoiled.cmd_ids, refused)
        # The commands whose effect was committed are still marked as done.
        spoiled.cmd_ids = []
        try:
            done = await self._database.run(_charge_spoiled, self._boot_id, worker, cmd_ids, spoiled)
        except StatementRefused as refused:
            done = self._leave_out(spoiled.report.done, refused)
        return Report(done.done, lone=report.lone + done.lone, pause_s=report.pause_s)

    def _leave_out(self, cmd_ids: Sequence[int], refused: StatementRefused) -> Report:
        """Leave out for a while commands that the database refuses to change; they run alone afterwards."""
        pauses = [self._left_out.add(str(cmd_id), refused) for cmd_id in cmd_ids]
        return Report(lone=list(cmd_ids), pause_s=None if None in pauses else 0.0)

    def _finish(self, cmd_ids: Iterable[int], report: Report) -> None:
        """Forget the losses of a batch, update the commands that run apart from others, and count the outcome."""
        for cmd_id in cmd_ids:
            self._losses.pop(cmd_id, None)
        for apart, added in ((self._lone, report.lone), (self._doubtful, report.doubtful)):
            apart.difference_update(cmd_ids)
            _remember(apart, added)
        self._count(report)

    async def _keep_stuck(self, worker: int, stuck: HandlerStuck, batch: Iterable[int]) -> None:
        """Charge the commands whose handler does not return, and release the other commands of their batch.

        A command that ran alone stays in the claim, so that no worker takes it while the thread lives. If the handler
        had several commands, the one at fault is unknown: all are charged, and each runs alone afterwards.
        """
        cmd_ids = [command.cmd_id for command in stuck.subject]
        is_alone = len(cmd_ids) == 1
        stuck.task.on_return = lambda: self._came_back(worker, stuck)
        self._ready.serve(self._served())
        self.log.error(
            "a handler is stuck: {name}: {why}; a new worker takes its place, and only the end of this process frees"
            " the thread",
            name=stuck.task.name,
            why=str(stuck),
        )
        # Write the claim before the session ends, since the commands then lose their locks.
        await self._insist(claims.keep_stuck, self._boot_id, worker, cmd_ids)
        await self._handlers.end(stuck.task)
        report = await self._insist(_charge_stuck, self._boot_id, worker, cmd_ids, one_line(stuck), is_alone)
        self._finish(batch, report)
        self.wake()

    def _kept(self, outcome: object, keeping: Deferred[None]) -> None:
        self._keeping.discard(keeping)
        # While the process stops, the database may be away. The reaper of another process then handles the claim.
        if isinstance(outcome, Failure) and not outcome.check(DatabaseUnavailable):
            self.log.failure("the failed attempt of a stuck command could not be stored", outcome)

    def _came_back(self, worker: int, stuck: HandlerStuck) -> None:
        self.log.warn("a handler that was stuck has returned: {name}", name=stuck.task.name)
        self._ready.serve(self._served())
        struck = Deferred.fromCoroutine(self._insist(claims.release, self._boot_id, worker))
        struck.addCallbacks(lambda _: self.wake(), lambda failure: failure.trap(DatabaseUnavailable))

    async def _insist(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run work in a transaction, and retry it while the database is away."""
        while True:
            try:
                return await self._database.run(work, *args)
            except DatabaseUnavailable:
                if self._loop.is_stopping:
                    raise
                await deferLater(self._clock, _AGAIN_S)

    def _charged(self, charged: int, dead: int) -> None:
        self.failed += charged
        self.dead += dead
        self.wake()

    def _count(self, report: Report) -> None:
        self.ran += len(report.done)
        self.failed += len(report.failed)
        self.dead += report.dead
        for charge in report.failed:
            if self._lines.may_tell(charge.error):
                self.log.warn("command {cmd_id} failed: {error}", cmd_id=charge.cmd_id, error=charge.error)

    def _tell_failures(self, untold: Mapping[str, int]) -> None:
        for error, count in untold.items():
            self.log.warn("commands failed further, {count} times: {error}", count=count, error=error)

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _run(self, txn: Cursor, worker: int, cmd_ids: Sequence[int]) -> Report:
        """Run a claimed batch and release its claim in one transaction."""
        report = Report()
        until = time.monotonic() + BATCH_S
        # Only adjacent commands of one type form a group, so that the run order is kept.
        in_hand, report.xid = _in_hand(txn, self._boot_id, worker, cmd_ids, self._ready.notes[worker])
        for cmd_type, group in itertools.groupby(in_hand, lambda command: command.cmd_type):
            if (kind := self._registry.get(cmd_type)) is not None:  # else the row was changed by hand after the claim
                self._run_group(txn, kind, list(group), report, until)
        if report.done:
            commands.finish(txn, report.done)
        if report.failed:
            report.dead = commands.charge(txn, report.failed)
        claims.release(txn, self._boot_id, worker, self._ready.notes[worker])
        return report

    def _run_group(self, txn: Cursor, kind: CommandHandler, batch: list[Command], report: Report, until: float) -> None:
        # Catch BaseException: in this thread only a handler can raise SystemExit.
        is_whole = kind.batched and len(batch) > 1 and not _is_late(report, until)
        is_checked = any(command.attempts or command.cmd_id in self._doubtful for command in batch)
        if is_whole and not any(isinstance(command.payload, Unreadable) for command in batch):
            try:
                with self._handlers.foreign(txn, f"{kind.cmd_type}, {len(batch)} commands", batch) as cursor:
                    # Pass a copy, since the handler may change the list.
                    _check_nothing(call(kind.run_batch, cursor, list(batch)))
                    if is_checked:
                        check_constraints(txn)
            except BaseException as error:
                self._check_usable(txn, batch, error, report)
                # Read the commands again, since the handler may have changed the payloads.
                batch = commands.take(txn, [command.cmd_id for command in batch])
            else:
                report.done += [command.cmd_id for command in batch]
                return
        for command in batch:
            if _is_late(report, until):
                return
            try:
                check_readable(command.payload, "payload")
                with self._handlers.foreign(txn, f"{kind.cmd_type}, command {command.cmd_id}", [command]) as cursor:
                    _check_nothing(call(kind.run, cursor, command))
                    if is_checked:
                        check_constraints(txn)
            except BaseException as error:
                self._check_usable(txn, [command], error, report)
                if report.done and not isinstance(error, HandlerTimeout):
                    report.doubtful.append(command.cmd_id)
                else:
                    is_late = isinstance(error, HandlerTimeout)
                    report.failed.append(commands.Charge(command.cmd_id, _why(error), runs_alone=is_late))
            else:
                report.done.append(command.cmd_id)

    def _check_usable(self, txn: Cursor, batch: Sequence[Command], error: BaseException, report: Report) -> None:
        """Return if the handler itself failed and the batch can go on.

        :raises BaseException: the error itself, if the connection or the database is at fault or the process stops.
        :raises _Spoiled: the transaction can no longer be committed.
        """
        if is_broken(txn.connection) or self._handlers.is_cancelled:
            raise error
        if not is_in_transaction(txn):
            raise _Spoiled(batch, error, report) from None
        # The handler may have made the transaction read-only itself; the rollback to its savepoint has undone that.
        is_its_own = sqlstate.code(error) == "25006" and not is_read_only(txn)
        if sqlstate.of(error).fault != "statement" and not is_its_own:
            raise error


def _remember(numbers: set[int], more: Collection[int]) -> None:
    if len(numbers) > _MOST_APART:
        numbers.clear()
    numbers.update(more)


def _why(error: BaseException) -> str:
    """Return why a handler failed, with the cure if only tables of s2s can be the cause."""
    code = sqlstate.code(error)
    cure = sqlstate.meaning(code).cure if " " in code else ""
    return f"{one_line(error)}: {cure}" if cure else one_line(error)


def _check_nothing(returned: object) -> None:
    """Refuse a return value that shows that the handler has not done its work yet.

    :raises TypeError: the value is an awaitable, a generator or a Deferred.
    """
    if returned is None:
        return
    if isinstance(returned, Deferred) or inspect.isawaitable(returned) or inspect.isgenerator(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        name = type(returned).__name__
        raise TypeError(f"the handler returned a {name}, which never runs: write it as a plain function")


def _is_late(report: Report, until: float) -> bool:
    """Return whether the batch has an outcome for some command and no time left for more."""
    return bool(report.done or report.failed or report.doubtful) and time.monotonic() >= until


def _claim(
    txn: Cursor,
    boot_id: str,
    worker: int,
    limit: int,
    lone: Container[int],
    doubtful: Container[int],
    ready: Ready,
) -> tuple[list[int], float | None]:
    cmd_ids = claims.claim(txn, boot_id, worker, limit, lone, doubtful, ready)
    return cmd_ids, None if cmd_ids else ready.next_due_s(txn)


def _in_hand(
    txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], note_id: int = 0
) -> tuple[list[Command], int]:
    """Lock the commands of a worker's batch that are still in its claim; return them and the transaction's id.

    A command that left the claim was charged by another process and must not run here.
    """
    taken = commands.take(txn, cmd_ids)
    # A separate statement after the locks, so that it shows the changes of a reaper that had the locks before.
    noted, xid = claims.claimed(txn, boot_id, worker, note_id)
    in_note = set(noted)
    return [command for command in taken if command.cmd_id in in_note], xid


def _charge(
    txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], error: str, guilty: Container[int] | None = None
) -> Report:
    """Charge the commands of a batch that are in ``guilty``, by default all, and release its claim."""
    in_hand = [command.cmd_id for command in _in_hand(txn, boot_id, worker, cmd_ids)[0]]
    failed = [commands.Charge(cmd_id, error) for cmd_id in in_hand if guilty is None or cmd_id in guilty]
    dead = commands.charge(txn, failed) if failed else 0
    claims.release(txn, boot_id, worker)
    return Report(failed=failed, dead=dead)


def _charge_spoiled(txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], spoiled: _Spoiled) -> Report:
    """Charge the commands whose handler left the transaction of its batch unusable.

    If the handler committed it, the commands that the batch had run before have taken effect and are marked as done.
    """
    done = spoiled.report.done if claims.is_committed(txn, spoiled.report.xid) else []
    if done:
        commands.finish(txn, done)
    report = _charge(txn, boot_id, worker, cmd_ids, f"it left the transaction unusable: {spoiled}", spoiled.cmd_ids)
    report.done = done
    return report


def _charge_stuck(txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], error: str, is_kept: bool) -> Report:
    """Charge commands whose handler does not return.

    :param is_kept: keep their claim until the thread returns.
    """
    failed = [commands.Charge(cmd_id, error) for cmd_id in cmd_ids]
    dead = commands.charge(txn, failed)
    if not is_kept:
        claims.release(txn, boot_id, worker)
    return Report(failed=failed, dead=dead)
