"""From the outbox to the server (docs/protocol.rst, "The engine").

Rows are leased, pushed with a window in flight, and settled in groups: what was accepted is deleted, what may succeed
later is sent again, the rest is set aside. A row that is sent twice is a duplicate to the server, so every doubt is
settled by sending again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import (
    BY_CODE,
    BadPayload,
    BadReply,
    DatabaseError,
    DeadlineExceeded,
    DeadlinePassed,
    InternalError,
    LineFull,
    LinkLost,
    LocalError,
    Refused,
    StatementRefused,
    TooBigToSend,
    TooLarge,
    storable,
)
from s2s.link.backoff import FAST, retry_pause
from s2s.link.connection import Link
from s2s.protocol.catalogue import COMMAND_PUSH
from s2s.protocol.settings import number
from s2s.roles.engine.congestion_window import CongestionWindow
from s2s.runtime.clock import Clock, Timer, cancel
from s2s.runtime.line_quota import MOST_TOLD, LineQuota
from s2s.store.pool import Database
from s2s.store.tables import outbox
from s2s.store.tables.outbox import OutboxRow, Settlement

#: Rows claimed at once, and so the most that wait here for the window.
CLAIM_ROWS: Final = 256
#: Seconds until a push counts as unanswered: a frame may take 10 s to arrive, and its answer 10 s more.
PUSH_S: Final = 20.0
#: Rows are anybody's again after this many seconds, unless they are leased anew: short, for those of a dead process.
LEASE_S: Final = 5.0
#: The age, in seconds, at which a lease is renewed; a renewal that fails is tried once more in time.
RENEW_S: Final = 1.5
#: Beside the outbox's NOTIFY, which can be lost.
POLL_S: Final = 1.0
#: Between two counts of what waits, which look at every row.
DEPTH_S: Final = 5.0
#: By how much each row that cannot be removed lengthens the pause until it is tried again, in seconds, and the longest
#: pause.
UNDELETED_S: Final = 0.01
MOST_KEPT_S: Final = 60.0
#: Such rows that are remembered, some 10 MB. Others are sent again, and are duplicates.
MOST_UNDELETED: Final = 100_000
#: The longest pause, in seconds, before a row is sent again: the server may ask for it, and a row that it refuses with
#: an internal error comes to it. The watch of the clock pulls back what lies further ahead.
LONGEST_PAUSE_S: Final = 60.0
#: Refusals that are about the link or the clock, and say nothing against the command, whatever their ``retryable``.
_NOT_ITS_FAULT: Final = frozenset({"replay", "forbidden", "ts_skew"})


class Relay:
    """Sends what the outbox holds over whatever link there is.

    :ivar window_rows: how many rows are in flight at most, 1 to 1024; may be set at any time.
    :ivar depth: rows that wait, as counted last.
    """

    log = Logger()

    def __init__(self, database: Database, clock: Clock, rng: Callable[[], float] = random.random) -> None:
        self._database = database
        self._clock = clock
        self._rng = rng
        self._link: Link | None = None
        self._pace = CongestionWindow()
        self._is_stopping = True
        self._is_claiming = False
        self._is_settling = False
        self._is_sending = False
        self._more = False
        self._is_dry = False
        #: The database has refused the last claim.
        self._is_singly = False
        self._timer: Timer | None = None
        self._depth_at = float("-inf")
        self._at_rest: list[Deferred[None]] = []
        self._ready: deque[tuple[OutboxRow, dict[str, Any], int]] = deque()
        #: Since when each row is leased.
        self._held: dict[int, float] = {}
        self._flying: set[Deferred[Any]] = set()
        self._flying_bytes = 0
        #: What a row of the last claim took on average; of the first nothing is known.
        self._row_bytes = 1
        self._next = Settlement()
        self._claims = outbox.Claims()
        #: Rows that the server has and that the database does not let be removed: they are not sent again.
        self._undeleted: dict[int, None] = {}
        self._lines = LineQuota(clock.scheduler, self._tell_dead, MOST_TOLD)
        self._again_lines = LineQuota(clock.scheduler, self._tell_again, is_first_told=True)
        self.window_rows = number("relay.window")
        self.depth = 0
        self.accepted = self.duplicates = self.retried = self.dead = 0

    def start(self) -> None:
        """Claim rows whenever there is a link."""
        self._is_stopping = False
        self._claim()

    def flush(self) -> Deferred[None]:
        """Go on until nothing is due any more; what rests before it is sent again is not due.

        :returns: fires when a claim has found nothing, and nothing is in flight or unsettled; or without a link.
        """
        flushed: Deferred[None] = Deferred()
        self._at_rest.append(flushed)
        self.wake()
        self._settle()
        return flushed

    def stop(self, patience_s: float = 3.0) -> Deferred[None]:
        """Claim no more.

        :param patience_s: after so many seconds what is still in flight is given up, to be sent again by the next.
        :returns: fires when all that is in flight is answered, or given up, and settled.
        """
        self._is_stopping = True
        self._lines.stop()
        self._again_lines.stop()
        cancel(self._timer)
        self._timer = self._clock.scheduler.callLater(patience_s, self._give_up)
        self._give_back()
        stopped: Deferred[None] = Deferred()
        self._at_rest.append(stopped)
        self._settle()
        return stopped

    def linked(self, link: Link | None) -> None:
        """A link was proven, or lost."""
        self._link = link
        self._pace = CongestionWindow()
        self.wake()
        self._settle()

    def wake(self) -> None:
        """There may be something to send."""
        self._more = True
        self._claim()

    def _open_link(self) -> Link | None:
        """Give the link while it takes requests: one that is closing takes none, and is lost up to 2 s later."""
        return self._link if self._link is not None and self._link.session.is_open else None

    # --- claim and send ---------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        if self._is_stopping:
            return
        if self._timer is None or not self._timer.active():
            self._timer = self._clock.scheduler.callLater(POLL_S, self._poll)
        # No more than will soon be sent: what waits here another engine could send, and an operator cancel.
        soon = 1 + 2 * self._pace.bytes // self._row_bytes
        room = min(CLAIM_ROWS, self.window_rows - len(self._held), soon)
        link = self._open_link()
        if self._is_claiming or link is None or self._ready or room <= 0:
            return
        self._is_claiming = True
        self._more = self._is_dry = False
        limits = room, LEASE_S, list(self._held), link.session.max_frame
        claiming = self._database.run(self._claims.claim, *limits, self._is_singly)
        claiming.addCallbacks(self._claimed, self._claim_failed, callbackArgs=(room, self._clock.mono()))
        claiming.addErrback(self._unexpected)

    def _poll(self) -> None:
        now = self._clock.mono()
        if now >= self._depth_at + DEPTH_S:
            self._depth_at = now
            self._database.run(self._claims.depth).addCallbacks(self._counted, self._unless_away)
        self.wake()
        self._renew()
        self._settle()

    def _counted(self, depth: int) -> None:
        self.depth = depth

    def _claimed(self, rows: list[OutboxRow], room: int, since: float) -> None:
        self._is_claiming = False
        self._is_dry = not rows
        self._is_singly = False
        # Who flushes looks until there is nothing.
        self._more |= len(rows) == room or bool(rows and self._at_rest)
        for row in rows:
            self._held[row.outbox_id] = since
            if row.outbox_id in self._undeleted:
                self._next.accepted.append(row.outbox_id)
                continue
            try:
                self._ready.append((row, push := row.push(), outbox.frame_size_of(push)))
            except LocalError as error:  # put there by another hand than ours
                self._set_aside(row, TooLarge.code if row.payload is None else BadPayload.code, str(error))
        if self._ready:
            self._row_bytes = sum(size for _, _, size in self._ready) // len(self._ready)
        if self._is_stopping:
            self._give_back()
        self._send()
        self._settle()
        if self._more:
            self._claim()

    def _give_back(self) -> None:
        """Let what was claimed and not sent be due at once, and not when its lease ends."""
        self._next.given_back += [row.outbox_id for row, _, _ in self._ready]
        self._ready.clear()

    def _give_up(self) -> None:
        for pushing in list(self._flying):
            pushing.cancel()

    def _claim_failed(self, failure: Failure) -> None:
        self._is_claiming = False
        self._is_singly = not self._is_singly and outbox.is_refused(failure.value)
        if self._is_singly:
            # One row may be at fault, and keep all others back.
            self._claim()
        else:
            # The poll tries again.
            self._unless_away(failure)
        self._settle()

    def _unless_away(self, failure: Failure) -> None:
        # Of a database that is away the pool has told.
        error = failure.value
        if isinstance(error, StatementRefused):
            told = outbox.told_as_kept(error)
            self._database.troubles.note(told.state, str(told))
        elif not isinstance(error, DatabaseError):
            self._unexpected(failure)

    def _send(self) -> None:
        # A call on a link that is gone fails at once and comes back here.
        if self._is_sending:
            return
        self._is_sending = True
        while self._ready and (self._flying_bytes + self._ready[0][2] <= self._pace.bytes or not self._flying):
            link = self._open_link()
            if link is None:
                self._give_back()
                break
            row, push, size = self._ready.popleft()
            self._flying_bytes += size
            sent_at, ahead = self._clock.mono(), self._flying_bytes
            pushing: Deferred[Any] = link.call(COMMAND_PUSH, push, PUSH_S)
            self._flying.add(pushing)
            pushing.addCallbacks(self._pushed, self._refused, callbackArgs=(row,), errbackArgs=(row,))
            pushing.addBoth(self._landed, pushing, size, sent_at, ahead)
            pushing.addErrback(self._unexpected)
        self._is_sending = False

    def _pushed(self, ack: Mapping[str, Any], row: OutboxRow) -> None:
        if ack["duplicate"]:
            self.duplicates += 1
        else:
            self.accepted += 1
        self._next.accepted.append(row.outbox_id)

    def _refused(self, failure: Failure, row: OutboxRow) -> None:
        error = failure.value
        code = final_code(error)
        if code is None:
            self._send_again(row, error)
        else:
            self._set_aside(row, code, str(error))

    def _send_again(self, row: OutboxRow, error: BaseException | None) -> None:
        self.retried += 1
        code = why_again(error)
        asked_ms = error.retry_after_ms if isinstance(error, Refused) else None
        pause_s = retry_pause(asked_ms, row.attempts, self._rng, LONGEST_PAUSE_S)
        if code == InternalError.code:
            # It is about this row alone, and may last.
            longest_s = min(FAST[0] * 2.0 ** min(row.attempts + 1, 16), LONGEST_PAUSE_S)
            pause_s = max(pause_s, (0.5 + self._rng() / 2) * longest_s)
        message = storable(str(error)) or "it was given up before it was answered"
        self._next.retries.append((row.outbox_id, pause_s, code, message))
        # Of an answer that is not valid, as of its own end, the link tells; of what passes a count is enough.
        is_passing = isinstance(error, Refused) and code in BY_CODE and BY_CODE[code].passing
        is_worth_it = isinstance(error, (Refused, DeadlinePassed)) and not is_passing and not self._is_stopping
        if is_worth_it and self._again_lines.may_tell(code):
            self.log.warn(
                "outbox row {outbox_id} is sent again: {why}: see s2s outbox show {outbox_id}",
                outbox_id=row.outbox_id,
                why=str(error),
            )

    def _tell_again(self, untold: Mapping[str, int]) -> None:
        for code, count in untold.items():
            self.log.warn("{count} more outbox rows are sent again: {code!r}", count=count, code=code)

    def _set_aside(self, row: OutboxRow, code: str, message: str) -> None:
        self.dead += 1
        if self._lines.may_tell(code):
            self.log.error(
                "outbox row {outbox_id} is dead: {code!r}: see s2s outbox show {outbox_id}",
                outbox_id=row.outbox_id,
                code=code,
            )
        self._next.dead.append((row.outbox_id, code, storable(message)))

    def _tell_dead(self, untold: Mapping[str, int]) -> None:
        for code, count in untold.items():
            self.log.error("{count} more outbox rows are dead: {code!r}", count=count, code=code)

    def _landed(self, outcome: object, pushing: Deferred[Any], size: int, sent_at: float, ahead: int) -> None:
        self._flying.discard(pushing)
        self._flying_bytes -= size
        self._pace.answered(self._clock.mono() - sent_at, ahead, size, bool(self._ready))
        self._send()
        self._settle()
        if isinstance(outcome, Failure):
            self._unexpected(outcome)

    def _unexpected(self, failure: Failure) -> None:
        self.log.failure("the relay stumbled", failure)

    # --- settle -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Settle in one transaction all that was answered while the last one was under way."""
        if self._is_settling:
            return
        settlement, self._next = self._next, Settlement()
        # What the last one let go is not ours to lease, and may rest.
        settlement.renewed = [outbox_id for outbox_id in settlement.renewed if outbox_id in self._held]
        if settlement != Settlement():
            self._is_settling = True
            kept_s = min(outbox.KEPT_S + len(self._undeleted) * UNDELETED_S, MOST_KEPT_S)
            settling = self._database.run(settlement.settle, LEASE_S, kept_s)
            settling.addErrback(self._settle_singly, settlement, kept_s)
            # Where it fails their leases end, they are sent again, and the server knows them as duplicates.
            settling.addErrback(self._unless_away)
            settling.addBoth(self._settled, settlement)
            settling.addErrback(self._unexpected)
        elif not self._flying and not self._is_claiming:
            self._rest()

    def _settle_singly(self, failure: Failure, settlement: Settlement, kept_s: float) -> Failure | Deferred[list[int]]:
        """Settle again where one row may be at fault: what was accepted would be sent again without an end."""
        if not outbox.is_refused(failure.value):
            return failure
        return self._database.run(settlement.settle, LEASE_S, kept_s, True)

    def _settled(self, undeleted: list[int] | None, settlement: Settlement) -> None:
        self._is_settling = False
        if undeleted is not None and (undeleted or self._undeleted):
            for outbox_id in settlement.accepted:
                self._undeleted.pop(outbox_id, None)
            self._undeleted.update(dict.fromkeys(undeleted[: MOST_UNDELETED - len(self._undeleted)]))
        for outbox_id in settlement.let_go:
            self._held.pop(outbox_id, None)
        self._more |= bool(settlement.given_back)
        if self._timer is not None and self._timer.active() and not self._is_stopping:
            due_in_s = self._timer.getTime() - self._clock.mono()
            soonest_s = min((delay_s for _, delay_s, *_ in settlement.retries), default=POLL_S)
            self._timer.reset(min(due_in_s, soonest_s) if due_in_s > 0 else 0)
        self._settle()
        if self._more:
            self._claim()

    def _renew(self) -> None:
        """Keep what has been held for a while from others: it may still be on its way."""
        now = self._clock.mono()
        old = [outbox_id for outbox_id, since in self._held.items() if now >= since + RENEW_S]
        self._held.update(dict.fromkeys(old, now))
        self._next.renewed += old

    def _rest(self) -> None:
        """Nothing is under way: tell who waits for that, if it will stay so."""
        if self._is_stopping:
            cancel(self._timer)
        if self._is_stopping or self._open_link() is None or (self._is_dry and not self._more):
            waiters, self._at_rest = self._at_rest, []
            for waiter in waiters:
                waiter.callback(None)


def final_code(error: BaseException | None) -> str | None:
    """Return the code of an error that is about the request itself; ``None``: it may be accepted later."""
    if isinstance(error, Refused):
        return None if error.retryable or error.code in _NOT_ITS_FAULT else error.code
    if isinstance(error, TooBigToSend):
        return TooLarge.code
    if isinstance(error, LocalError) and not isinstance(error, LineFull):
        return BadPayload.code
    return None


def why_again(error: BaseException | None) -> str:
    """Return the code that a row has after an attempt whose error says nothing against the row."""
    match error:
        case Refused() | BadReply():
            return error.code
        case LinkLost():
            return "link_lost"
        case LineFull():
            return "not_sent"
        case _:
            return DeadlineExceeded.code
