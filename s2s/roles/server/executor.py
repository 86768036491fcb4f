"""Running commands: each with its effect and its end in one transaction (docs/protocol.rst, "Commands").

Every exception of a handler is charged, its own and those of its statements: a deadlock, a timeout or a full disk may
well be the command's fault, and a pause and nine further attempts lie behind it. A command that fails after others of
its batch ran in the same transaction runs alone first: they may have left something behind. Where the fault is the
database's, the charge cannot be written either. A failure because the connection broke or because we stop is never
charged. For a process that dies another one charges its commands; :mod:`s2s.store.tables.claims` says how it is told
from one that lives.
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
from s2s.store.driver import Cursor, is_broken, is_in_transaction, is_read_only
from s2s.store.handler_pool import MOST_STUCK, HandlerPool, call
from s2s.store.monitors import probe
from s2s.store.poll_loop import LeftOut, PollLoop
from s2s.store.pool import Database
from s2s.store.tables import claims, commands
from s2s.store.tables.ready import Ready

#: Seconds between two looks whether our presence lock is back.
ABSENT_S: Final = 0.25
#: A command that has lost its connection so often, and now alone, is charged for it.
LOSSES: Final = 3
#: Commands that are remembered because their connection was lost, and because they are to run alone.
_MOST_SUSPECTS: Final = 10_000
_MOST_LONE: Final = 10_000
#: Seconds after which a batch begins no further command: those that are left go to the next worker that looks, and the
#: locks and the snapshot of one transaction do not last for a whole batch of slow handlers.
BATCH_S: Final = 5.0
#: Handlers of one type that may be stuck in this process, before it takes no more commands of that type: the type may
#: be at fault, and the others go on. One bad command may take two, first in a batch and then alone.
STUCK_OF_TYPE: Final = 3
#: Seconds between two tries to write down that a handler is stuck, while the database is away.
_AGAIN_S: Final = 1.0


@dataclass
class Report:
    """What one batch came to."""

    done: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    #: Those that failed after others had run in the transaction.
    doubtful: list[int] = field(default_factory=list)
    dead: int = 0
    #: The id of the transaction.
    xid: int = 0
    #: Seconds to sleep then, see :class:`s2s.store.poll_loop.PollLoop`.
    pause_s: float | None = 0.0


class _Suspects(Container[int]):
    """The commands that run alone: those that are to, and those whose connection was lost twice.

    :param lone: the former.
    :param losses: by command, how often the connection was lost.
    """

    def __init__(self, lone: Container[int], losses: Mapping[int, int]) -> None:
        self._lone = lone
        self._losses = losses

    def __contains__(self, cmd_id: object) -> bool:
        return cmd_id in self._lone or (isinstance(cmd_id, int) and self._losses.get(cmd_id, 0) > 1)


class _Spoiled(Exception):
    """A handler left the transaction of its batch unusable.

    :param batch: the commands that the handler had.
    :param report: what the batch had come to before.
    """

    def __init__(self, batch: Sequence[Command], error: BaseException, report: Report) -> None:
        super().__init__(one_line(error))
        self.cmd_ids = [command.cmd_id for command in batch]
        self.report = report


class Executor:
    """Runs the commands that are due, in order of priority, ``due_at`` and ``cmd_id``.

    :param database: where the commands are.
    :param handlers: the connections on which their handlers run.
    :param registry: the command types by name.
    :param boot_id: this process's.
    :param is_present: whether its presence lock is held (:class:`s2s.store.listen.Listener`): without it nothing is
        claimed, since another process may take us for dead. It may be set before the start.
    :param workers: how many batches run at once; 0: none.
    :param batch_size: see below.
    :param clock: for tests.

    :ivar batch_size: commands in a batch at most; it may be set at any time.
    :ivar ran: commands done.
    :ivar failed: attempts charged.
    :ivar dead: commands given up.
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
        self._turns = PollLoop("a worker of the executor", self._poll_once, clock, workers)
        #: The worker of each line, by its number; a stuck one gives its line to the next.
        self._numbers = list(range(workers))
        self._next_number = itertools.count(workers)
        self._reaping: list[Deferred[None]] = []
        #: The charges of stuck commands under way.
        self._keeping: set[Deferred[None]] = set()
        self._ready = Ready(registry)
        self._reaper = Reaper(database, boot_id, self._charged, clock, lambda: self._ready.first_note)
        #: How often the connection was lost under each command, since it ran last.
        self._losses: Counter[int] = Counter()
        #: Commands that run alone before they are charged: those of batches whose transaction was refused, and doubtful
        #: ones.
        self._lone: set[int] = set()
        self._left_out = LeftOut("command", self._turns, clock.seconds)
        self._lines = LineQuota(clock, self._tell_failures, MOST_TOLD)
        self.ran = self.failed = self.dead = 0

    def start(self) -> None:
        """Start the workers."""
        if self._workers:
            self._turns.start()
            self._reaping = [self._reaper.start()]

    def stop(self) -> Deferred[None]:
        """Stop claiming.

        :returns: fires when the batches that run are finished and nothing is noted of us any more.
        """
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        await self._leave_off()
        if self._workers:
            # A batch that the database's absence ended is noted still.
            await self._strike_all()

    def abandon(self) -> Deferred[None]:
        """Leave what runs, once :meth:`s2s.store.pool.Database.cancel` has cancelled it: nobody is charged for it.

        :returns: fires in bounded time, when nothing is noted of us any more or the database does not answer.
        """
        self._leave_off()
        return Deferred.fromCoroutine(self._strike_all())

    def _leave_off(self) -> Deferred[Any]:
        self._reaper.stop()
        self._lines.stop()
        return gatherResults([self._turns.stop(), *self._reaping, *self._keeping])

    async def _strike_all(self) -> None:
        try:
            await self._database.run_at_shutdown(claims.release_all, self._boot_id)
        except DatabaseUnavailable as error:
            self.log.warn("what was in hand may be charged an attempt: {why}", why=str(error))

    @property
    def types(self) -> Collection[str]:
        """The command types that it runs."""
        return self._registry.keys()

    @property
    def condition(self) -> str:
        """``ok``, ``off`` where there are no workers, or why it takes nothing."""
        if not self._workers:
            return "off"
        if not self.is_present():
            return "the database does not know that this process lives"
        if trouble := self._turns.trouble:
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
        """Return the types of which too few handlers are stuck to leave them out."""
        stuck = Counter(task.subject[0].cmd_type for task in self._handlers.stuck)
        return [cmd_type for cmd_type in self._registry if stuck[cmd_type] < STUCK_OF_TYPE]

    def wake(self) -> None:
        """Look at the table now: something was committed."""
        self._turns.wake()

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
        suspects = _Suspects(self._lone, self._losses)
        cmd_ids, due_in_s = await self._database.run(_claim, self._boot_id, worker, size, suspects, self._ready)
        if not cmd_ids:
            return None if due_in_s is None else max(due_in_s, 0.0)
        if len(cmd_ids) == size:
            self.wake()
        try:
            report = await self._handlers.run(self._run, worker, cmd_ids)
        except HandlerStuck as stuck:
            self._numbers[line] = next(self._next_number)
            # Not awaited: a session that the database cannot end keeps its locks, and other commands run meanwhile.
            keeping = Deferred.fromCoroutine(self._keep_stuck(worker, stuck, cmd_ids))
            self._keeping.add(keeping)
            keeping.addBoth(self._kept, keeping)
            return 0.0
        except _Spoiled as spoiled:
            report = await self._charge_spoiled(worker, cmd_ids, spoiled)
        except NoThread:
            raise
        except DatabaseUnavailable as error:
            # Mostly nobody's fault. But a command that ends its own connection must not do so for ever: what has lost
            # it twice runs singly, uncharged, and one that loses it once more all the same is charged.
            self._losses.update(cmd_ids)
            while len(self._losses) > _MOST_SUSPECTS:
                # The oldest: its command may have run elsewhere since.
                del self._losses[next(iter(self._losses))]
            if self._turns.is_stopping or len(cmd_ids) > 1 or self._losses[cmd_ids[0]] < LOSSES:
                raise
            # Not while the database refuses other writes, too.
            await self._database.run(probe.check)
            report = await self._charge_alone(worker, cmd_ids, one_line(error))
        except Exception as error:
            # The failure of the transaction, such as a constraint that is checked at the COMMIT. The commands of a
            # batch run alone, uncharged, so that only the one at fault is charged.
            if len(cmd_ids) > 1:
                if self._lines.may_tell(one_line(error)):
                    self.log.warn(
                        "a batch of {size} commands was rolled back, and each runs alone: {why}",
                        size=len(cmd_ids),
                        why=one_line(error),
                    )
                self._run_alone(cmd_ids)
                return 0.0
            # Neither a deadline nor a refusal has a traceback that says more than the charge does.
            if not isinstance(error, (HandlerTimeout, StatementRefused)) and self._lines.may_tell(one_line(error)):
                self.log.failure("a batch of {size} commands was rolled back", size=len(cmd_ids))
            report = await self._charge_alone(worker, cmd_ids, one_line(error))
        self._finish(cmd_ids, report)
        return report.pause_s

    async def _charge_alone(self, worker: int, cmd_ids: Sequence[int], error: str) -> Report:
        """Charge a command that ran alone, or leave it out for a while where the database refuses that."""
        try:
            return await self._database.run(_charge, self._boot_id, worker, cmd_ids, error)
        except StatementRefused as refused:
            return self._leave_out(cmd_ids, refused)

    async def _charge_spoiled(self, worker: int, cmd_ids: Sequence[int], spoiled: _Spoiled) -> Report:
        try:
            return await self._database.run(_charge_spoiled, self._boot_id, worker, cmd_ids, spoiled)
        except StatementRefused as refused:
            report = self._leave_out(spoiled.cmd_ids, refused)
        # What was committed is done all the same.
        spoiled.cmd_ids = []
        try:
            done = await self._database.run(_charge_spoiled, self._boot_id, worker, cmd_ids, spoiled)
        except StatementRefused as refused:
            done = self._leave_out(spoiled.report.done, refused)
        return Report(done.done, doubtful=report.doubtful + done.doubtful, pause_s=report.pause_s)

    def _leave_out(self, cmd_ids: Sequence[int], refused: StatementRefused) -> Report:
        """Leave commands that the database does not let be changed out for a while; they run alone then."""
        pauses = [self._left_out.add(str(cmd_id), refused) for cmd_id in cmd_ids]
        return Report(doubtful=list(cmd_ids), pause_s=None if None in pauses else 0.0)

    def _run_alone(self, cmd_ids: Iterable[int]) -> None:
        if len(self._lone) > _MOST_LONE:
            self._lone.clear()
        self._lone.update(cmd_ids)

    def _finish(self, cmd_ids: Iterable[int], report: Report) -> None:
        """Forget what was remembered of a batch, and count it."""
        for cmd_id in cmd_ids:
            self._losses.pop(cmd_id, None)
        self._lone.difference_update(cmd_ids)
        self._run_alone(report.doubtful)
        self._count(report)

    async def _keep_stuck(self, worker: int, stuck: HandlerStuck, batch: Iterable[int]) -> None:
        """Charge the commands whose handler does not return, and free the others of their batch.

        A command that ran alone stays in the note, so that nothing takes it while the thread lives. Of several, it is
        not known which one is at fault: they are charged, and each runs alone then.
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
        # The note first: with the end of the session the commands lose their locks.
        await self._insist(claims.keep_stuck, self._boot_id, worker, cmd_ids)
        await self._handlers.end(stuck.task)
        report = await self._insist(_charge_stuck, self._boot_id, worker, cmd_ids, one_line(stuck), is_alone)
        self._finish(batch, report)
        self.wake()

    def _kept(self, outcome: object, keeping: Deferred[None]) -> None:
        self._keeping.discard(keeping)
        # While the process stops, the database may be away: who looks for dead processes charges them.
        if isinstance(outcome, Failure) and not outcome.check(DatabaseUnavailable):
            self.log.failure("a stuck command could not be charged", outcome)

    def _came_back(self, worker: int, stuck: HandlerStuck) -> None:
        self.log.warn("a handler that was stuck has returned: {name}", name=stuck.task.name)
        self._ready.serve(self._served())
        struck = Deferred.fromCoroutine(self._insist(claims.release, self._boot_id, worker))
        struck.addCallbacks(lambda _: self.wake(), lambda failure: failure.trap(DatabaseUnavailable))

    async def _insist(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run work in a transaction, again and again while the database is away."""
        while True:
            try:
                return await self._database.run(work, *args)
            except DatabaseUnavailable:
                if self._turns.is_stopping:
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
        for cmd_id, error in report.failed:
            if self._lines.may_tell(error):
                self.log.warn("command {cmd_id} failed: {error}", cmd_id=cmd_id, error=error)

    def _tell_failures(self, untold: Mapping[str, int]) -> None:
        for error, count in untold.items():
            self.log.warn("commands failed further, {count} times: {error}", count=count, error=error)

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _run(self, txn: Cursor, worker: int, cmd_ids: Sequence[int]) -> Report:
        """Run a batch that is noted, and strike the note, in one transaction."""
        report = Report()
        until = time.monotonic() + BATCH_S
        # Neighbours of one type make a group: the order of running stays.
        in_hand, report.xid = _in_hand(txn, self._boot_id, worker, cmd_ids, self._ready.notes[worker])
        for cmd_type, group in itertools.groupby(in_hand, lambda command: command.cmd_type):
            if (kind := self._registry.get(cmd_type)) is not None:  # or changed by hand since it was claimed
                self._run_group(txn, kind, list(group), report, until)
        if report.done:
            commands.finish(txn, report.done)
        if report.failed:
            report.dead = commands.charge(txn, report.failed)
        claims.release(txn, self._boot_id, worker, self._ready.notes[worker])
        return report

    def _run_group(self, txn: Cursor, kind: CommandHandler, batch: list[Command], report: Report, until: float) -> None:
        # BaseException: in this thread a SystemExit is a handler's own, and nobody else's.
        is_whole = kind.batched and len(batch) > 1 and not _is_late(report, until)
        if is_whole and not any(isinstance(command.payload, Unreadable) for command in batch):
            try:
                with self._handlers.foreign(txn, f"{kind.cmd_type}, {len(batch)} commands", batch) as cursor:
                    # A copy: the handler may change the list.
                    _check_nothing(call(kind.run_batch, cursor, list(batch)))
            except BaseException as error:
                self._check_usable(txn, batch, error, report)
                # The handler may have changed the payloads.
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
            except BaseException as error:
                self._check_usable(txn, [command], error, report)
                if report.done and not isinstance(error, HandlerTimeout):
                    report.doubtful.append(command.cmd_id)
                else:
                    report.failed.append((command.cmd_id, _why(error)))
            else:
                report.done.append(command.cmd_id)

    def _check_usable(self, txn: Cursor, batch: Sequence[Command], error: BaseException, report: Report) -> None:
        """Let a failure pass that is its handler's own, after which the batch goes on.

        :raises BaseException: the error itself, where it is the fault of the connection or of the database, or where
            the process stops.
        :raises _Spoiled: the transaction cannot be committed any more.
        """
        if is_broken(txn.connection) or self._handlers.is_cancelled:
            raise error
        if not is_in_transaction(txn):
            raise _Spoiled(batch, error, report) from None
        # A handler may have made the transaction read-only itself, and its savepoint has undone that.
        is_its_own = sqlstate.code(error) == "25006" and not is_read_only(txn)
        if sqlstate.of(error).fault != "statement" and not is_its_own:
            raise error


def _why(error: BaseException) -> str:
    """Say why a handler failed, with the cure where only our own tables can be the cause."""
    code = sqlstate.code(error)
    cure = sqlstate.meaning(code).cure if " " in code else ""
    return f"{one_line(error)}: {cure}" if cure else one_line(error)


def _check_nothing(returned: object) -> None:
    """Refuse what a handler returns that has not done its work yet.

    :raises TypeError: it is a coroutine, a generator or a Deferred.
    """
    if returned is None:
        return
    if isinstance(returned, Deferred) or inspect.isawaitable(returned) or inspect.isgenerator(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        name = type(returned).__name__
        raise TypeError(f"the handler returned a {name}, which never runs: write it as a plain function")


def _is_late(report: Report, until: float) -> bool:
    """Whether the batch has done something, and has no time left for more."""
    return bool(report.done or report.failed or report.doubtful) and time.monotonic() >= until


def _claim(
    txn: Cursor, boot_id: str, worker: int, limit: int, suspects: Container[int], ready: Ready
) -> tuple[list[int], float | None]:
    cmd_ids = claims.claim(txn, boot_id, worker, limit, suspects, ready)
    return cmd_ids, None if cmd_ids else ready.next_due_s(txn)


def _in_hand(
    txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], note_id: int = 0
) -> tuple[list[Command], int]:
    """Lock the commands of a worker's batch that are in its note still: what another has charged is not ours to run."""
    taken = commands.take(txn, cmd_ids)
    # After the locks, in a statement of its own: it shows what a reaper did before we had them.
    noted, xid = claims.claimed(txn, boot_id, worker, note_id)
    in_note = set(noted)
    return [command for command in taken if command.cmd_id in in_note], xid


def _charge(
    txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], error: str, guilty: Container[int] | None = None
) -> Report:
    """Charge a whole batch, or those of it that are guilty, and strike its note."""
    in_hand = [command.cmd_id for command in _in_hand(txn, boot_id, worker, cmd_ids)[0]]
    failed = [(cmd_id, error) for cmd_id in in_hand if guilty is None or cmd_id in guilty]
    dead = commands.charge(txn, failed) if failed else 0
    claims.release(txn, boot_id, worker)
    return Report(failed=failed, dead=dead)


def _charge_spoiled(txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], spoiled: _Spoiled) -> Report:
    """Charge the commands whose handler has ended the transaction of its batch.

    Where it has committed, what the batch had done before has taken effect, and is done.
    """
    done = spoiled.report.done if claims.is_committed(txn, spoiled.report.xid) else []
    if done:
        commands.finish(txn, done)
    report = _charge(txn, boot_id, worker, cmd_ids, f"it left the transaction unusable: {spoiled}", spoiled.cmd_ids)
    report.done = done
    return report


def _charge_stuck(txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int], error: str, is_kept: bool) -> Report:
    """Charge commands whose handler does not return.

    :param is_kept: their note stands until the thread returns.
    """
    failed = [(cmd_id, error) for cmd_id in cmd_ids]
    dead = commands.charge(txn, failed)
    if not is_kept:
        claims.release(txn, boot_id, worker)
    return Report(failed=failed, dead=dead)
