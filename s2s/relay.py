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

from s2s import canonical, envelope
from s2s.catalogue import COMMAND_PUSH
from s2s.clock import Clock, Timer
from s2s.errors import BadPayload, CanonicalError, DatabaseError, LineFull, LocalError, Refused, TooBigToSend, TooLarge
from s2s.protocol import Link
from s2s.store import outbox
from s2s.store.outbox import OutboxRow
from s2s.store.pool import Database

#: Pushes and bytes in flight; half of what a link allows, so that a push never waits in the link's own line.
WINDOW_ROWS: Final = 512
WINDOW_BYTES: Final = 2 << 20
#: Rows claimed at once, and so the most that wait here for the window.
CLAIM_ROWS: Final = 256
#: Rows are anybody's again after this many seconds.
LEASE_S: Final = 5.0
#: Beside the outbox's NOTIFY, which can be lost.
POLL_S: Final = 1.0
#: Between two counts of what waits, which look at every row.
DEPTH_S: Final = 5.0
#: Least and longest pause before a row is sent again.
RETRY_S: Final = (0.1, 5.0)
#: Refusals that are about the link or the clock, and say nothing against the command, whatever their ``retryable``.
_NOT_ITS_FAULT: Final = frozenset({"replay", "forbidden", "ts_skew"})


def fits(frame_size: int) -> Callable[[Mapping[str, Any]], str | None]:
    """Make the check that a command passes when it is put into the outbox.

    :param frame_size: the longest frame, in bytes.
    :returns: says of a command's payload why it cannot be sent, or ``None``.
    """
    around = {"cmd_type": "x" * 64, "idem_key": "x" * 200, "payload": {}, "priority": 1000, "due_at": 4102444800}
    overhead = envelope.size(COMMAND_PUSH, canonical.dumps(around))

    def check(payload: Mapping[str, Any]) -> str | None:
        try:
            size = overhead + len(canonical.dumps(payload))
        except CanonicalError as error:
            return str(error)
        return None if size <= frame_size else str(TooBigToSend(size, frame_size))

    return check


class Relay:
    """Sends what the outbox holds over whatever link there is.

    :ivar depth: rows that wait, as counted last.
    """

    log = Logger()

    def __init__(self, database: Database, clock: Clock, rng: Callable[[], float] = random.random) -> None:
        self._database = database
        self._clock = clock
        self._rng = rng
        self._link: Link | None = None
        self._is_stopping = True
        self._is_claiming = False
        self._is_settling = False
        self._is_sending = False
        self._more = False
        self._timer: Timer | None = None
        self._depth_at = float("-inf")
        self._idle: Deferred[None] | None = None
        self._ready: deque[tuple[OutboxRow, int]] = deque()
        self._held: set[int] = set()
        self._flying = 0
        self._flying_bytes = 0
        self._accepted: list[int] = []
        self._retries: list[tuple[int, float]] = []
        self._dead: list[tuple[int, str, str]] = []
        self.depth = 0
        self.accepted = self.duplicates = self.retried = self.dead = 0

    def start(self) -> None:
        """Claim rows whenever there is a link."""
        self._is_stopping = False
        self._claim()

    def stop(self) -> Deferred[None]:
        """Claim no more.

        :returns: fires when all that is in flight is answered, or given up, and settled.
        """
        self._is_stopping = True
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._give_back()
        self._idle = Deferred()
        idle = self._idle
        self._settle()
        return idle

    def linked(self, link: Link | None) -> None:
        """A link was proven, or lost."""
        self._link = link
        self.wake()

    def wake(self) -> None:
        """There may be something to send."""
        self._more = True
        self._claim()

    # --- claim and send ---------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        if self._is_stopping:
            return
        if self._timer is None or not self._timer.active():
            self._timer = self._clock.scheduler.callLater(POLL_S, self._poll)
        room = min(CLAIM_ROWS, WINDOW_ROWS - len(self._held))
        if self._is_claiming or self._link is None or self._ready or room <= 0:
            return
        self._is_claiming = True
        self._more = False
        claiming = self._database.run(outbox.claim, room, LEASE_S, list(self._held))
        claiming.addCallbacks(self._claimed, self._claim_failed, callbackArgs=(room,))
        claiming.addErrback(self._unexpected)

    def _poll(self) -> None:
        if self._clock.mono() >= self._depth_at + DEPTH_S:
            self._depth_at = self._clock.mono()
            self._database.run(outbox.depth).addCallbacks(self._counted, self._unless_away)
        self.wake()

    def _counted(self, depth: int) -> None:
        self.depth = depth

    def _claimed(self, rows: list[OutboxRow], room: int) -> None:
        self._is_claiming = False
        self._more |= len(rows) == room
        for row in rows:
            self._held.add(row.outbox_id)
            try:
                self._ready.append((row, len(canonical.dumps(row.payload))))
            except CanonicalError as error:  # put there by another hand than ours
                self._set_aside(row, BadPayload.code, str(error))
        if self._is_stopping:
            self._give_back()
        self._send()
        self._settle()
        if self._more:
            self._claim()

    def _give_back(self) -> None:
        """Let what was claimed and not sent be due at once, and not when its lease ends."""
        self._retries += [(row.outbox_id, 0.0) for row, _ in self._ready]
        self._ready.clear()

    def _claim_failed(self, failure: Failure) -> None:
        # The poll tries again.
        self._is_claiming = False
        self._unless_away(failure)
        self._settle()

    def _unless_away(self, failure: Failure) -> None:
        # Of a database that is away the pool has told.
        if not failure.check(DatabaseError):
            self._unexpected(failure)

    def _send(self) -> None:
        # A call on a link that is gone fails at once and comes back here.
        if self._is_sending:
            return
        self._is_sending = True
        while self._ready and (self._flying_bytes < WINDOW_BYTES or not self._flying):
            if self._link is None:
                self._give_back()
                break
            row, size = self._ready.popleft()
            self._flying += 1
            self._flying_bytes += size
            pushing = self._link.call(COMMAND_PUSH, row.push())
            pushing.addCallbacks(self._pushed, self._refused, callbackArgs=(row,), errbackArgs=(row,))
            pushing.addBoth(self._landed, size)
            pushing.addErrback(self._unexpected)
        self._is_sending = False

    def _pushed(self, ack: Mapping[str, Any], row: OutboxRow) -> None:
        if ack["duplicate"]:
            self.duplicates += 1
        else:
            self.accepted += 1
        self._accepted.append(row.outbox_id)

    def _refused(self, failure: Failure, row: OutboxRow) -> None:
        error = failure.value
        code = _final_code(error)
        if code is None:
            self.retried += 1
            self._retries.append((row.outbox_id, self._pause(error, row.attempts)))
        else:
            self._set_aside(row, code, str(error))

    def _set_aside(self, row: OutboxRow, code: str, message: str) -> None:
        self.dead += 1
        self.log.error("outbox row {outbox_id} is dead: {code!r}", outbox_id=row.outbox_id, code=code)
        self._dead.append((row.outbox_id, code, message[:500]))

    def _pause(self, error: BaseException | None, attempts: int) -> float:
        if isinstance(error, Refused) and error.retry_after_ms is not None:
            return min(error.retry_after_ms, 60_000) / 1000
        least, longest = RETRY_S
        return least + self._rng() * (min(longest, least * 2.0 ** min(attempts + 1, 10)) - least)

    def _landed(self, outcome: object, size: int) -> None:
        self._flying -= 1
        self._flying_bytes -= size
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
        accepted, self._accepted = self._accepted, []
        retries, self._retries = self._retries, []
        dead, self._dead = self._dead, []
        if accepted or retries or dead:
            self._is_settling = True
            settling = self._database.run(_settle, accepted, retries, dead)
            ids = [*accepted, *(each[0] for each in retries), *(each[0] for each in dead)]
            # Where it fails their leases end, they are sent again, and the server knows them as duplicates.
            settling.addErrback(self._unless_away)
            settling.addBoth(self._settled, ids, min((delay_s for _, delay_s in retries), default=POLL_S))
            settling.addErrback(self._unexpected)
        elif self._idle is not None and not self._flying and not self._is_claiming:
            idle, self._idle = self._idle, None
            idle.callback(None)

    def _settled(self, _: object, ids: list[int], soonest_s: float) -> None:
        self._is_settling = False
        self._held.difference_update(ids)
        if self._timer is not None and self._timer.active():
            due_in_s = self._timer.getTime() - self._clock.mono()
            self._timer.reset(min(due_in_s, soonest_s) if due_in_s > 0 else 0)
        self._settle()
        if self._more:
            self._claim()


def _final_code(error: BaseException | None) -> str | None:
    """Give the code under which a row is set aside, or ``None`` where it may be accepted later."""
    if isinstance(error, Refused):
        return None if error.retryable or error.code in _NOT_ITS_FAULT else error.code
    if isinstance(error, TooBigToSend):
        return TooLarge.code
    if isinstance(error, LocalError) and not isinstance(error, LineFull):
        return BadPayload.code
    return None


def _settle(txn: Any, accepted: list[int], retries: list[tuple[int, float]], dead: list[tuple[int, str, str]]) -> None:
    if accepted:
        outbox.delete(txn, accepted)
    if retries:
        outbox.retry(txn, retries)
    if dead:
        outbox.kill(txn, dead)
