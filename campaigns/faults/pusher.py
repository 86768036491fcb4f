"""Engines that push continuously."""

from __future__ import annotations

import random
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from campaigns.faults.checker import CMD_TYPE
from campaigns.faults.history import History
from campaigns.faults.operator_workload import OperatorWorkload
from tests.support.flood import Linked
from tests.support.peer import PUSH, Frame, Peer

_WINDOW: Final = 64
#: Of this many pushes, on average one is a duplicate, one a conflict, one scheduled, and one fails at first.
_ODD: Final = 20
#: Longest delay of a scheduled push, in seconds. One of _MUCH_LATER scheduled pushes is delayed for an hour instead;
#: the operator workload cancels it.
_LATER_S: Final = 6
_MUCH_LATER: Final = 10
_MUCH_LATER_S: Final = 3600


class Pusher(Linked):
    """An engine that pushes new keys at a rate, and repeats each push until it has a final answer.

    The seed determines the content of the n-th push, but not its time.

    :param workload: cancels the commands that are delayed for an hour.
    :ivar is_reading: whether it reads its link; a campaign may turn this off.
    """

    def __init__(
        self,
        name: str,
        history: History,
        connect: Callable[[], Peer],
        rate: float,
        seed: int,
        workload: OperatorWorkload,
    ) -> None:
        super().__init__(connect, name)
        self._history = history
        self._workload = workload
        self._rate = rate
        self._rng = random.Random(seed)
        self._again: deque[Frame] = deque()
        #: By the frame's id: the payload of the push, and the number of its operation.
        self._flying: dict[str, tuple[Frame, int]] = {}
        self._contents: list[Frame] = []
        self._taken_back: set[str] = set()
        self._made = 0
        self.is_reading = True
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Push until every push has a final answer."""
        try:
            super().run()
        except BaseException as error:
            self.failure = error

    @property
    def is_done(self) -> bool:
        """Whether no new push is to be made, and every push has a final answer."""
        return self._is_over.is_set() and not self._again and not self._flying

    def _lost(self) -> None:
        for push, number in self._flying.values():
            self._history.end(number, self.name, "push", "unknown")
            self._again.append(push)
        self._flying.clear()
        time.sleep(random.uniform(0.05, 0.2))

    def _poll_once(self, peer: Peer) -> None:
        frames = []
        while len(self._flying) < _WINDOW and (push := self._next()) is not None:
            frame = peer.envelope(PUSH, push)
            asked = {"key": push["idem_key"], "content": push["payload"], "due_at": push.get("due_at")}
            number = self._history.invoke(self.name, "push", **asked)
            self._flying[frame["id"]] = (push, number)
            frames.append(frame)
        peer.write_all(frames)
        if not self.is_reading:
            time.sleep(0.05)
            return
        while peer.has_more or select.select([peer.link], [], [], 0.02)[0]:
            frame = peer.read()
            assert frame is not None, "the link ended"
            if frame.get("ack_of") in self._flying:
                self._take(*self._flying.pop(frame["ack_of"]), frame["payload"])

    def _next(self) -> Frame | None:
        """Return the payload of the next push; ``None`` if no push is due."""
        if self._again:
            return self._again.popleft()
        if self._is_over.is_set() or self._made >= (time.monotonic() - self._began) * self._rate:
            return None
        self._made += 1
        odd = self._rng.randrange(_ODD)
        if odd < 2 and self._contents:
            before = self._rng.choice(self._contents[-1000:])
            content = dict(before["payload"])
            if odd == 1:
                content["other"] = True
            return {**before, "payload": content}
        content = {"n": self._made, "fails": 1 if odd == 2 else 0}
        push: Frame = {"cmd_type": CMD_TYPE, "idem_key": f"{self.name}-{self._made}", "payload": content}
        if odd == 3:
            is_much = self._rng.randrange(_MUCH_LATER) == 0
            push["due_at"] = int(time.time()) + (_MUCH_LATER_S if is_much else self._rng.randint(1, _LATER_S))
        push["priority"] = self._rng.choice((50, 100, 150))
        self._contents.append(push)
        return push

    def _take(self, push: Frame, number: int, answer: Frame) -> None:
        if answer.get("accepted") is True:
            self._history.end(number, self.name, "push", "ok", cmd_id=answer["cmd_id"], duplicate=answer["duplicate"])
            if push.get("due_at", 0) > time.time() + _LATER_S and push["idem_key"] not in self._taken_back:
                self._taken_back.add(push["idem_key"])
                self._workload.take_back(answer["cmd_id"])
            return
        code, details = answer["code"], answer["details"]
        told = {"code": code, "retry_after_ms": details.get("retry_after_ms")}
        self._history.end(number, self.name, "push", "fail", **told)
        # A conflict is final.
        if code != "idem_conflict":
            self._again.append(push)
            time.sleep(0.01)
