"""Send outbox rows to the server (docs/protocol.rst, "Outbox and sweep").

Rows are leased, pushed with a window in flight, and settled in groups: accepted rows are deleted, rows that may succeed
later are sent again, and the others are set aside as dead. To the server a row that is sent twice is a duplicate, so in
every case of doubt the row is sent again.
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
from s2s.runtime.waiters import Waiters
from s2s.store.poll_loop import POLL_S, PollLoop
from s2s.store.pool import Database
from s2s.store.tables import outbox
from s2s.store.tables.outbox import OutboxRow, Settlement

#: The largest number of rows claimed at once, and so of rows that wait here for the window.
CLAIM_ROWS: Final = 256
#: Seconds until a push counts as unanswered: its frame may take 10 s to arrive, and the reply 10 s more.
PUSH_S: Final = 20.0
#: Seconds after which other engines may claim a row unless its lease is renewed; short because of dead processes.
LEASE_S: Final = 5.0
#: The age in seconds at which a lease is renewed; a renewal that fails can be retried once before the lease ends.
RENEW_S: Final = 1.5
#: Seconds between two counts of the waiting rows, since a count reads every row.
DEPTH_S: Final = 5.0
#: Seconds by which each row that cannot be deleted lengthens the pause until the next attempt to delete it, and the
#: longest pause in seconds.
UNDELETED_S: Final = 0.01
MOST_KEPT_S: Final = 60.0
#: The largest number of such rows that are remembered, some 10 MB. Further ones are sent again, and are duplicates.
MOST_UNDELETED: Final = 100_000
#: The longest pause in seconds before a row is sent again. The server may ask for it, and the pause of a row that the
#: server refuses with internal errors grows to it. The clock watch pulls back times that lie further ahead.
LONGEST_PAUSE_S: Final = 60.0
#: Codes of refusals that concern the link or the clock and not the command, whatever their ``retryable``.
_NOT_ITS_FAULT: Final = frozenset({"replay", "forbidden", "ts_skew"})


class Relay:
    """Sends the rows of the outbox over the current link.

    :ivar window_rows: the largest number of rows in flight, 1 to 1024; may be set at any time.
    :ivar depth: the number of waiting rows at the last count.
    """

    log = Logger()

    def __init__(self, database: Database, clock: Clock, rng: Callable[[], float] = random.random) -> None:
        self._database = database
        self._clock = clock
        self._rng = rng
        self._link: Link | None = None
        self._congestion = CongestionWindow()
        self._claiming = PollLoop("the relay", self._claim_once, clock.scheduler)
        # Leases are also renewed while a claim takes long.
        self._renewing = PollLoop("the renewal of leases", self._renew_once, clock.scheduler)
        self._is_claiming = False
        self._is_settling = False
        self._is_sending = False
        self._more = False
        self._is_dry = False
        #: The database refused the last claim, so the next one isolates the rows at fault.
        self._is_singly = False
        self._giving_up: Timer | None = None
        #: The times of the next claim that nothing wakes, and of the next count of the waiting rows.
        self._claim_at = self._depth_at = float("-inf")
        self._at_rest: Waiters[None] = Waiters()
        self._ready: deque[tuple[OutboxRow, dict[str, Any], int]] = deque()
        #: The time since when each row is leased.
        self._held: dict[int, float] = {}
        self._flying: set[Deferred[Any]] = set()
        self._flying_bytes = 0
        #: The average bytes of a row of the last claim; 1 before the first claim.
        self._row_bytes = 1
        self._next = Settlement()
        self._claims = outbox.Claims()
        #: Rows that the server has accepted and that the database refuses to delete: they are not sent again.
        self._undeleted: dict[int, None] = {}
        self._lines = LineQuota(clock.scheduler, self._tell_dead, MOST_TOLD)
        self._again_lines = LineQuota(clock.scheduler, self._tell_again, is_first_told=True)
        self.window_rows = number("relay.window")
        self.depth = 0
        self.accepted = self.duplicates = self.retried = self.dead = 0

    def start(self) -> None:
        """Start claiming rows whenever there is a link."""
        self._claiming.start()
        self._renewing.start()

    def flush(self) -> Deferred[None]:
        """Send until no row is due any more. A row in its pause before the next attempt is not due.

        :returns: fires when a claim has found no row, and no row is in flight or unsettled; or without a link.
        """
        flushed = self._at_rest.wait()
        self.wake()
        self._settle()
        return flushed

    def stop(self, patience_s: float = 3.0) -> Deferred[None]:
        """Stop claiming.

        :param patience_s: seconds after which rows still in flight are given up; the next process sends them again.
        :returns: fires when every row in flight is answered or given up, and settled.
        """
        for part in (self._claiming, self._renewing, self._lines, self._again_lines):
            part.stop()
        self._giving_up = self._clock.scheduler.callLater(patience_s, self._give_up)
        self._give_back()
        stopped = self._at_rest.wait()
        self._settle()
        return stopped

    def linked(self, link: Link | None) -> None:
        """Use a link that was proven; ``None``: the link was lost."""
        self._link = link
        self._congestion = CongestionWindow()
        self.wake()
        self._settle()

    def wake(self) -> None:
        """Claim rows now, because there may be some to send."""
        self._more = True
        self._claiming.wake()

    def _open_link(self) -> Link | None:
        """Return the link if it accepts requests. A closing link accepts none, and is lost up to 2 s later."""
        return self._link if self._link is not None and self._link.session.is_open else None

    # --- claim and send ---------------------------------------------------------------------------------------------

    async def _claim_once(self, _: int) -> float | None:
        """Claim rows, if some may be due and there is room for them.

        :returns: seconds to sleep, see :class:`s2s.store.poll_loop.PollLoop`.
        """
        now = self._clock.mono()
        if not self._more and now < self._claim_at:
            return self._claim_at - now
        # Claim only rows that will soon be sent: another engine could send a row that waits here, or an operator cancel
        # it.
        soon = 1 + 2 * self._congestion.bytes // self._row_bytes
        room = min(CLAIM_ROWS, self.window_rows - len(self._held), soon)
        link = self._open_link()
        if link is None or self._ready or room <= 0:
            self._more = True
            return None
        if now >= self._claim_at:
            self._claim_at = now + POLL_S
        self._more = self._is_dry = False
        self._is_claiming = True
        limits = room, LEASE_S, list(self._held), link.session.max_frame
        try:
            rows = await self._database.run(self._claims.claim, *limits, self._is_singly)
        except DatabaseError as error:
            # One row may be at fault: isolate it, so that it does not block the others.
            self._is_singly = self._more = not self._is_singly and outbox.is_refused(error)
            if not self._is_singly:
                self._unless_away(Failure(error))
        else:
            self._claimed(rows, room, now)
        finally:
            self._is_claiming = False
            self._settle()
        return 0.0

    async def _renew_once(self, _: int) -> None:
        """Renew the leases of rows that have been held for :data:`RENEW_S`, since they may still be in flight."""
        now = self._clock.mono()
        if now >= self._depth_at:
            self._depth_at = now + DEPTH_S
            self._database.run(self._claims.depth).addCallbacks(self._counted, self._unless_away)
        old = [outbox_id for outbox_id, since in self._held.items() if now >= since + RENEW_S]
        self._held.update(dict.fromkeys(old, now))
        self._next.renewed += old
        self._settle()

    def _counted(self, depth: int) -> None:
        self.depth = depth

    def _claimed(self, rows: list[OutboxRow], room: int, since: float) -> None:
        self._is_dry = not rows
        self._is_singly = False
        # A flush or stop claims until no row is found.
        self._more |= len(rows) == room or bool(rows and self._at_rest)
        for row in rows:
            self._held[row.outbox_id] = since
            if row.outbox_id in self._undeleted:
                self._next.accepted.append(row.outbox_id)
                continue
            try:
                self._ready.append((row, push := row.push(), outbox.frame_size_of(push)))
            except LocalError as error:  # s2s did not write this row
                self._set_aside(row, TooLarge.code if row.payload is None else BadPayload.code, str(error))
        if self._ready:
            self._row_bytes = sum(size for _, _, size in self._ready) // len(self._ready)
        if self._claiming.is_stopping:
            self._give_back()
        self._send()

    def _give_back(self) -> None:
        """Make rows that were claimed and not sent due at once, and not when their lease ends."""
        self._next.given_back += [row.outbox_id for row, _, _ in self._ready]
        self._ready.clear()

    def _give_up(self) -> None:
        for pushing in list(self._flying):
            pushing.cancel()

    def _unless_away(self, failure: Failure) -> None:
        # The pool has logged that the database is away.
        error = failure.value
        if isinstance(error, StatementRefused):
            told = outbox.told_as_kept(error)
            self._database.troubles.note(told.state, str(told))
        elif not isinstance(error, DatabaseError):
            self._unexpected(failure)

    def _send(self) -> None:
        # Guard against re-entry: a call on a lost link fails at once and calls this method again.
        if self._is_sending:
            return
        self._is_sending = True
        while self._ready and (self._flying_bytes + self._ready[0][2] <= self._congestion.bytes or not self._flying):
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
            # The error concerns only this row, and may last.
            longest_s = min(FAST[0] * 2.0 ** min(row.attempts + 1, 16), LONGEST_PAUSE_S)
            pause_s = max(pause_s, (0.5 + self._rng() / 2) * longest_s)
        message = storable(str(error)) or "it was given up before it was answered"
        self._next.retries.append((row.outbox_id, pause_s, code, message))
        # The link itself logs invalid replies and its own end; for passing errors the counter is enough.
        is_passing = isinstance(error, Refused) and code in BY_CODE and BY_CODE[code].passing
        is_worth_it = isinstance(error, (Refused, DeadlinePassed)) and not is_passing and not self._claiming.is_stopping
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
        self._congestion.answered(self._clock.mono() - sent_at, ahead, size, bool(self._ready))
        self._send()
        self._settle()
        if isinstance(outcome, Failure):
            self._unexpected(outcome)

    def _unexpected(self, failure: Failure) -> None:
        self.log.failure("internal error in the relay", failure)

    # --- settle -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Settle in one transaction all rows that were answered while the last one was in progress."""
        if self._is_settling:
            return
        settlement, self._next = self._next, Settlement()
        # Do not renew the leases of rows that the last settlement released: they may be in their pause.
        settlement.renewed = [outbox_id for outbox_id in settlement.renewed if outbox_id in self._held]
        if settlement != Settlement():
            self._is_settling = True
            kept_s = min(outbox.KEPT_S + len(self._undeleted) * UNDELETED_S, MOST_KEPT_S)
            settling = self._database.run(settlement.settle, LEASE_S, kept_s)
            settling.addErrback(self._settle_singly, settlement, kept_s)
            # If it fails, the leases end, the rows are sent again, and the server recognizes them as duplicates.
            settling.addErrback(self._unless_away)
            settling.addBoth(self._settled, settlement)
            settling.addErrback(self._unexpected)
        elif not self._flying and not self._is_claiming:
            self._rest()

    def _settle_singly(self, failure: Failure, settlement: Settlement, kept_s: float) -> Failure | Deferred[list[int]]:
        """Settle again and isolate the rows at fault: otherwise accepted rows would be sent again without end."""
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
        soonest_s = min((delay_s for _, delay_s, *_ in settlement.retries), default=POLL_S)
        self._claim_at = min(self._claim_at, self._clock.mono() + soonest_s)
        self._settle()
        self._claiming.wake()

    def _rest(self) -> None:
        """Fire the Deferreds of :meth:`flush` and :meth:`stop`, unless more rows may be due."""
        if self._claiming.is_stopping:
            cancel(self._giving_up)
        if self._claiming.is_stopping or self._open_link() is None or (self._is_dry and not self._more):
            self._at_rest.fire(None)


def final_code(error: BaseException | None) -> str | None:
    """Return the code of an error that concerns the request itself; ``None``: the request may be accepted later."""
    if isinstance(error, Refused):
        return None if error.retryable or error.code in _NOT_ITS_FAULT else error.code
    if isinstance(error, TooBigToSend):
        return TooLarge.code
    if isinstance(error, LocalError) and not isinstance(error, LineFull):
        return BadPayload.code
    return None


def why_again(error: BaseException | None) -> str:
    """Return the code to store in a row after an attempt that may succeed later."""
    match error:
        case Refused() | BadReply():
            return error.code
        case LinkLost():
            return "link_lost"
        case LineFull():
            return "not_sent"
        case _:
            return DeadlineExceeded.code
