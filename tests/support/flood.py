"""An engine that pushes and pushes and writes down what it was answered, and strangers who want to be in its way."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from tests.support import hostile
from tests.support.peer import PUSH, Frame, Peer, command, framed

#: Pushes that it keeps unanswered at most.
_WINDOW = 512


class Linked(threading.Thread, ABC):
    """Takes turns on a link until it is done, and makes another one when it is lost.

    :param connect: makes a link.
    :ivar links: how many it had.
    """

    def __init__(self, connect: Callable[[], Peer], name: str | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self._connect = connect
        self._is_over = threading.Event()
        self.links = 0

    def finish(self) -> None:
        """Begin nothing new; it ends when all that was begun is done."""
        self._is_over.set()

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def _poll_once(self, peer: Peer) -> None:
        """Do a little."""

    @abstractmethod
    def _lost(self) -> None:
        """Take note that nothing more comes over the link that there was."""

    def run(self) -> None:
        """Do everything."""
        self._began = time.monotonic()
        while not self.is_done:
            try:
                peer = self._connect()
            except OSError:
                time.sleep(0.05)
                continue
            self.links += 1
            try:
                peer.greet()
                while not self.is_done:
                    self._poll_once(peer)
            except (OSError, AssertionError):  # the link ended, perhaps within a frame
                pass
            self._lost()
            peer.close()


class Flood(Linked):
    """Pushes commands of new keys over a link of its own, and connects again when it is lost.

    What was not accepted is pushed again with the same key until it is, so that in the end every key is accepted.

    :param connect: makes a link.
    :param rate: new keys in a second.
    :ivar accepted: the ``cmd_id`` of each key that was accepted.
    :ivar refused: how often each code came.
    :ivar wrong: what must not be: an answer that contradicts another.
    """

    def __init__(self, connect: Callable[[], Peer], rate: float) -> None:
        super().__init__(connect)
        self._rate = rate
        self._again: deque[str] = deque()
        self._flying: dict[str, str] = {}
        self.made = 0
        self.accepted: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.wrong: list[str] = []

    @property
    def is_done(self) -> bool:
        """Whether every key that was made is accepted."""
        return self._is_over.is_set() and len(self.accepted) == self.made

    def _lost(self) -> None:
        self._again.extend(self._flying.values())
        self._flying.clear()

    def _poll_once(self, peer: Peer) -> None:
        """Push what is due, and take the answers that there are."""
        wanted = int((time.monotonic() - self._began) * self._rate)
        fresh = range(self.made, self.made if self._is_over.is_set() else max(self.made, wanted))
        frames = []
        for _ in range(_WINDOW - len(self._flying)):
            if self._again:
                key = self._again.popleft()
            elif self.made < fresh.stop:
                key = f"flood-{self.made}"
                self.made += 1
            else:
                break
            frame = peer.envelope(PUSH, command(key))
            self._flying[frame["id"]] = key
            frames.append(frame)
        peer.write_all(frames)
        while peer.has_more or select.select([peer.link], [], [], 0.01)[0]:
            frame = peer.read()
            assert frame is not None, "the link ended"
            if frame.get("ack_of") in self._flying:
                self._take(self._flying.pop(frame["ack_of"]), frame["payload"])
            if len(self._flying) < _WINDOW // 2:
                break

    def _take(self, key: str, answer: Frame) -> None:
        if answer.get("accepted") is True:
            if self.accepted.setdefault(key, answer["cmd_id"]) != answer["cmd_id"]:
                self.wrong.append(f"{key} was {self.accepted[key]} and is {answer['cmd_id']}")
            return
        code = answer["code"]
        self.refused[code] = self.refused.get(code, 0) + 1
        self._again.append(key)
        if not answer["details"]["retryable"]:
            self.wrong.append(f"{key}: {code}")


class StrangersFlood(threading.Thread):
    """Somebody without a key, who connects again and again and sends a large frame that does not verify.

    :param port: the server's.
    :param rate: frames in a second, each over a link of its own.
    :param seconds: how long at most; see :meth:`finish`.
    :ivar sent: how many whole frames it sent.
    """

    #: Links that it leaves open at most: as many as a server keeps without a valid frame.
    MOST_OPEN = 100

    def __init__(self, port: int, rate: float = 40.0, seconds: float = 60.0) -> None:
        super().__init__(daemon=True)
        self._port, self._rate, self._seconds = port, rate, seconds
        self._is_over = threading.Event()
        self.sent = 0

    def finish(self) -> None:
        """Send no more."""
        self._is_over.set()

    def run(self) -> None:
        """Send what is due, and read nothing that comes back."""
        shapes = itertools.cycle([framed(frame) for frame in hostile.dearest(65536)])
        links: deque[socket.socket] = deque()
        tried = 0
        began = time.monotonic()
        while (passed := time.monotonic() - began) < self._seconds and not self._is_over.wait(1 / self._rate):
            while tried < passed * self._rate:
                tried += 1
                links.append(socket.socket())
                # So that the whole frame is on its way at once, whether it is read or not.
                links[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
                frame = next(shapes)
                with contextlib.suppress(OSError):  # not accepted now, or cut
                    links[-1].settimeout(0.2)
                    links[-1].connect(("127.0.0.1", self._port))
                    self.sent += links[-1].send(frame) == len(frame)
                while len(links) > self.MOST_OPEN:
                    links.popleft().close()
        for link in links:
            link.close()
