"""Accept commands by group commit (docs/protocol.rst, "Commands").

The pushes that arrive while a transaction is in flight form the next batch. There is no timer. Pushes that arrive one
by one do not wait; after a batch of several pushes, a small batch waits until the end of the reactor iteration. The
more pushes arrive, the more of them share a COMMIT, however fast the disk is.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import (
    DatabaseError,
    DatabaseUnavailable,
    DbUnavailable,
    IdemConflict,
    InternalError,
    NotReady,
    Overloaded,
    ShuttingDown,
    StatementRefused,
    UnknownCommand,
    WireError,
    one_line,
)
from s2s.handlers.commands import CommandHandler
from s2s.protocol import canonical
from s2s.protocol.catalogue.schema import Schema
from s2s.protocol.limits import Counters
from s2s.roles.server.served_types import ServedTypes
from s2s.runtime.line_quota import LineQuota
from s2s.store.pool import Database
from s2s.store.tables import commands
from s2s.store.tables.commands import Outcome, Push

#: The largest number of pushes in one transaction, and of bytes of their payloads (one push always fits).
BATCH_PUSHES: Final = 1024
BATCH_BYTES: Final = 4 * 1024 * 1024
#: Start a transaction immediately when at least this many pushes are waiting. Smaller batches wait until the end of the
#: reactor iteration, because a transaction costs about as much as five pushes.
ENOUGH_PUSHES: Final = 64
#: The numbers of pushes, and of bytes of payloads, that may wait before further pushes are refused as ``overloaded``.
WAITING_PUSHES: Final = 16_384
WAITING_BYTES: Final = 32 * 1024 * 1024
#: The same limits for pushes whose type is being looked up. Their payloads wait as Python objects, which are twenty
#: times as large.
UNKNOWN_PUSHES: Final = 1024
UNKNOWN_BYTES: Final = 4 * 1024 * 1024
RETRY_AFTER_MS: Final = 1000
#: Seconds for which :attr:`Inbox.condition` reports a refusal by the database, unless a COMMIT clears it earlier.
TROUBLE_S: Final = 10.0
#: The SQLSTATEs of a statement that waited too long, mostly for a lock of another session: one push of its batch is at
#: fault.
_HELD_STATES: Final = ("55P03", "57014")
#: The largest number of keys that are kept out of the batches.
MOST_HELD: Final = 1000


class _Waiter(msgspec.Struct, frozen=True):
    push: Push
    size: int
    answer: Deferred[dict[str, Any]]


class Inbox:
    """Accepts the payloads of ``s2s.command.push``.

    :param database: the database where the commands are committed.
    :param registry: the command handlers by type name.
    :param on_commit: called after each COMMIT that may have added a command, when its pushes have been answered.
    :param counters: counts the pushes refused for lack of room.
    :param reactor: for tests.
    :param types: the command types that are accepted; by default those of the registry.

    :ivar accepted: new commands committed.
    :ivar duplicates: pushes answered with the first command of their key.
    :ivar conflicts: pushes refused because their key was used before with other content.
    :ivar refused: pushes refused for any other reason.
    :ivar batches: transactions committed.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        registry: Mapping[str, CommandHandler],
        on_commit: Callable[[], object] = lambda: None,
        counters: Counters | None = None,
        reactor: Any = None,
        types: ServedTypes | None = None,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it
        self._reactor = reactor
        self._database = database
        self._types = types or ServedTypes(registry)
        self._on_commit = on_commit
        self._counters = counters or Counters()
        self._waiters: deque[_Waiter] = deque()
        self._bytes = 0
        self._is_busy = False
        #: The last transaction had one push.
        self._is_quiet = True
        self._is_turn_awaited = False
        #: The number of pushes whose type is being looked up, and of the bytes of their payloads.
        self._unknown = self._unknown_bytes = 0
        self._unanswered = 0
        self._drained: Deferred[None] | None = None
        #: The reason and the time of the last refusal of pushes by the database; a COMMIT clears the reason.
        self._trouble = ""
        self._trouble_at = float("-inf")
        #: The keys of pushes that waited too long for another session, the oldest first. Their pushes stay out of the
        #: batches.
        self._held: dict[str, None] = {}
        self._is_apart = False
        self._lines = LineQuota(reactor, self._tell_incidents)
        self.accepted = self.duplicates = self.conflicts = self.refused = self.batches = 0

    @property
    def waiting(self) -> int:
        """The number of pushes that wait for a transaction to begin."""
        return len(self._waiters)

    @property
    def condition(self) -> str:
        """``ok``, or why the database has recently refused pushes."""
        is_recent = self._reactor.seconds() < self._trouble_at + TROUBLE_S
        return f"the database refuses them: {self._trouble}" if self._trouble and is_recent else "ok"

    def push(self, payload: Mapping[str, Any]) -> Deferred[dict[str, Any]]:
        """Accept one command.

        :param payload: the parsed payload, which is valid by the catalogue's schema.
        :returns: fires with the payload of its ``s2s.ack`` after the COMMIT, or fails with a :class:`WireError`.
        """
        if self._drained is not None:
            return self._refused(ShuttingDown("the server is draining", retry_after_ms=RETRY_AFTER_MS))
        schema = self._types.schemas.get(payload["cmd_type"])
        if schema is None:
            return self._look_up(payload)
        try:
            waiter = self._checked(payload, schema)
        except WireError as error:
            return self._refused(error)
        self._unanswered += 1
        if waiter.push.idem_key in self._held:
            self._push_apart(waiter)
            return waiter.answer
        self._waiters.append(waiter)
        self._bytes += waiter.size
        self._go_on()
        return waiter.answer

    def _refused(self, error: WireError) -> Deferred[dict[str, Any]]:
        self.refused += 1
        return fail(error)

    def _look_up(self, payload: Mapping[str, Any]) -> Deferred[dict[str, Any]]:
        """Read the command types again before refusing a push: a refusal is final, and another server may serve it."""
        cmd_type = payload["cmd_type"]
        if cmd_type in self._types.unusable:
            text = f"the schema of {cmd_type} cannot be used by this server"
            return self._refused(NotReady(text, retry_after_ms=RETRY_AFTER_MS))
        size = len(canonical.rewrite(payload["payload"]))
        if self._unknown and (self._unknown >= UNKNOWN_PUSHES or self._unknown_bytes + size > UNKNOWN_BYTES):
            self._counters.meet("inbox")
            text = f"{self._unknown} commands of unknown types wait"
            return self._refused(Overloaded(text, limit=UNKNOWN_PUSHES, retry_after_ms=RETRY_AFTER_MS))
        self._unanswered += 1
        self._unknown += 1
        self._unknown_bytes += size
        return self._types.read_now(cmd_type).addBoth(self._looked_up, payload, size)

    def _looked_up(self, outcome: object, payload: Mapping[str, Any], size: int) -> Any:
        self._unknown -= 1
        self._unknown_bytes -= size
        cmd_type = payload["cmd_type"]
        answer: object
        if isinstance(outcome, Failure):
            is_away = outcome.check(DatabaseError)
            answer = self._refused(DbUnavailable(retry_after_ms=RETRY_AFTER_MS)) if is_away else outcome
        elif self._drained is None and cmd_type not in {*self._types.schemas, *self._types.unusable}:
            supported = sorted(self._types.schemas)
            answer = self._refused(UnknownCommand(f"no server serves {cmd_type}", supported=supported))
        else:
            answer = self.push(payload)
        self._leave()
        return answer

    def drain(self) -> Deferred[None]:
        """Refuse new pushes, and finish the waiting ones.

        :returns: fires when every push is answered.
        """
        self._lines.stop()
        self._drained = Deferred() if self._unanswered else succeed(None)
        return self._drained

    def _checked(self, payload: Mapping[str, Any], schema: Schema) -> _Waiter:
        cmd_type, content = payload["cmd_type"], payload["payload"]
        schema.check(content, "/payload/payload")
        written = canonical.rewrite(content)
        if self._waiters and (len(self._waiters) >= WAITING_PUSHES or self._bytes + len(written) > WAITING_BYTES):
            self._counters.meet("inbox")
            raise Overloaded(
                f"{len(self._waiters)} commands wait to be committed",
                limit=WAITING_PUSHES,
                retry_after_ms=RETRY_AFTER_MS,
            )
        # This is the canonical form of {cmd_type, payload}, without serializing the payload twice. A cmd_type needs no
        # escaping.
        fingerprint = hashlib.sha256(b'{"cmd_type":"%b","payload":%b}' % (cmd_type.encode(), written)).digest()
        push = Push(
            cmd_type,
            payload["idem_key"],
            fingerprint,
            written.decode(),
            payload.get("priority", 100),
            payload.get("due_at"),
        )
        return _Waiter(push, len(written), Deferred())

    # --- one transaction after the other -------------------------------------------------------------------------

    def _go_on(self, at_once: bool = False) -> None:
        """Begin the next transaction if none is in flight, now or at the end of the reactor iteration.

        :param at_once: begin it now, however few pushes wait.
        """
        if self._is_busy or not self._waiters:
            return
        if at_once or self._is_quiet or len(self._waiters) >= ENOUGH_PUSHES:
            self._begin()
        elif not self._is_turn_awaited:
            self._is_turn_awaited = True
            self._reactor.callLater(0, self._turned)

    def _turned(self) -> None:
        self._is_turn_awaited = False
        self._go_on(at_once=True)

    def _begin(self) -> None:
        self._is_busy = True
        batch: list[_Waiter] = []
        size = 0
        while self._waiters and len(batch) < BATCH_PUSHES:
            size += self._waiters[0].size
            if batch and size > BATCH_BYTES:
                break
            waiter = self._waiters.popleft()
            self._bytes -= waiter.size
            if self._held and waiter.push.idem_key in self._held:
                # This push was queued before the other push of its key turned out to wait for another session.
                size -= waiter.size
                self._push_apart(waiter)
            else:
                batch.append(waiter)
        if not batch:
            self._is_busy = False
            return
        self._is_quiet = len(batch) == 1
        if self._is_quiet:
            self._database.query(commands.push_one(batch[0].push), lambda rows: self._asked(rows, batch))
        else:
            self._run(batch)

    def _run(self, batch: list[_Waiter]) -> None:
        writing = self._database.run_steps(commands.push_batch, [waiter.push for waiter in batch])
        writing.addCallbacks(self._committed, self._failed, callbackArgs=(batch,), errbackArgs=(batch,))

    def _asked(self, rows: list[Any] | Failure, batch: list[_Waiter]) -> None:
        if isinstance(rows, Failure):
            self._failed(rows, batch)
        elif (outcome := commands.pushed_one(rows)) is not None:
            self._committed([outcome], batch)
        else:
            # The key is known: the statements for batches find its command.
            self._run(batch)

    def _singly_committed(self, outcomes: Sequence[Outcome | DatabaseError], batch: list[_Waiter]) -> None:
        refused = next((outcome for outcome in outcomes if isinstance(outcome, DatabaseError)), None)
        answers = [self._of_one(outcome, waiter) for outcome, waiter in zip(outcomes, batch, strict=True)]
        self._committed(answers, batch, refused)

    def _of_one(self, outcome: Outcome | DatabaseError, waiter: _Waiter) -> Outcome | WireError:
        """Return the answer to a push that was tried in a savepoint of its own."""
        key = waiter.push.idem_key
        self._held.pop(key, None)
        if not isinstance(outcome, DatabaseError):
            return outcome
        if isinstance(outcome, StatementRefused):
            return self._refuse(outcome)
        if state := getattr(outcome, "state", ""):
            self._database.troubles.note(state, str(outcome))
            self._held[key] = None
            if len(self._held) > MOST_HELD:
                del self._held[next(iter(self._held))]
        return DbUnavailable(retry_after_ms=RETRY_AFTER_MS)

    def _push_apart(self, waiter: _Waiter) -> None:
        """Try a push of a key that waits for another session: outside the batches, and one such push at a time."""
        if self._is_apart:
            self._answer(waiter, DbUnavailable(retry_after_ms=RETRY_AFTER_MS))
            return
        self._is_apart = True

        def done(outcome: list[Outcome | DatabaseError] | Failure) -> None:
            self._is_apart = False
            if isinstance(outcome, Failure):
                self._answer(waiter, self._wire_error(outcome, 1))
            else:
                self._answer(waiter, self._of_one(outcome[0], waiter))
            # The command may have been committed: notify the executor.
            self._tell()

        self._database.run(commands.push_singly, [waiter.push]).addBoth(done)

    def _committed(
        self, outcomes: Sequence[Outcome | WireError], batch: list[_Waiter], refused: DatabaseError | None = None
    ) -> None:
        self.batches += 1
        self._trouble = ""
        if refused is not None:
            self._note(refused)
        accepted = self.accepted
        self._is_busy = False
        # Begin the next transaction first, so that the database works on it while these pushes are answered.
        self._go_on(at_once=len(batch) >= ENOUGH_PUSHES)
        for waiter, outcome in zip(batch, outcomes, strict=True):
            self._answer(waiter, outcome)
        # Notify the executor last, since it begins at once.
        if self.accepted > accepted:
            self._tell()

    def _failed(self, failure: Failure, batch: list[_Waiter]) -> None:
        if failure.check(StatementRefused) or getattr(failure.value, "state", "") in _HELD_STATES:
            singly = self._database.run(commands.push_singly, [waiter.push for waiter in batch])
            singly.addCallbacks(self._singly_committed, self._given_up, callbackArgs=(batch,), errbackArgs=(batch,))
        else:
            self._given_up(failure, batch)

    def _wire_error(self, failure: Failure, pushes: int) -> WireError:
        """Return the answer to pushes that failed together."""
        self._note(failure.value)
        if failure.check(DatabaseUnavailable):
            # The pool has logged this once.
            return DbUnavailable(retry_after_ms=RETRY_AFTER_MS)
        if isinstance(failure.value, StatementRefused):
            return self._refuse(failure.value)
        incident = secrets.token_hex(8)
        if self._lines.may_tell(self._trouble):
            text = "incident {incident}: a batch of {pushes} pushes failed"
            self.log.failure(text, failure, incident=incident, pushes=pushes)
        return InternalError(incident=incident)

    def _given_up(self, failure: Failure, batch: list[_Waiter]) -> None:
        error = self._wire_error(failure, len(batch))
        for waiter in batch:
            self._answer(waiter, error)
        self._is_busy = False
        self._go_on()
        # Some commands may have been committed all the same: notify the executor.
        self._tell()

    def _tell_incidents(self, untold: Mapping[str, int]) -> None:
        for why, count in untold.items():
            self.log.error("{count} more batches of pushes failed: {why}", count=count, why=why)

    def _note(self, error: BaseException | None) -> None:
        assert error is not None
        self._trouble, self._trouble_at = one_line(error), self._reactor.seconds()

    def _tell(self) -> None:
        try:
            self._on_commit()
        except Exception:
            self.log.failure("internal error: the executor was not notified of new commands")

    def _refuse(self, reason: StatementRefused) -> InternalError:
        """Return the answer to a push that the database refused. The reason is logged at most once a minute."""
        return InternalError(incident=self._database.troubles.note(reason.state, str(reason)))

    def _answer(self, waiter: _Waiter, outcome: Outcome | WireError) -> None:
        if isinstance(outcome, WireError):
            self.refused += 1
            waiter.answer.errback(outcome)
        elif outcome.is_conflict:
            self.conflicts += 1
            waiter.answer.errback(
                IdemConflict("the idem_key was used before with another content", cmd_id=outcome.cmd_id)
            )
        else:
            self.accepted += outcome.is_new
            self.duplicates += not outcome.is_new
            waiter.answer.callback(
                {
                    "accepted": True,
                    "duplicate": not outcome.is_new,
                    "cmd_id": outcome.cmd_id,
                    "status": outcome.status,
                }
            )
        self._leave()

    def _leave(self) -> None:
        self._unanswered -= 1
        if self._drained is not None and not self._unanswered:
            self._drained.callback(None)
