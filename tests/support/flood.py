"""An engine that pushes continuously and records the answers, and clients without a key that flood the server."""

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

#: Most unanswered pushes of a flood.
_WINDOW = 512


class Linked(threading.Thread, ABC):
    """A thread that works on a link until its work is done, and connects again when the link is lost.

    :param connect: makes a link.
    :ivar links: number of links so far.
    """

    def __init__(self, connect: Callable[[], Peer], name: str | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self._connect = connect
        self._is_over = threading.Event()
        self.links = 0

    def finish(self) -> None:
        """Begin nothing new; the thread ends when all work that it has begun is done."""
        self._is_over.set()

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def _poll_once(self, peer: Peer) -> None:
        """Do one step of the work."""

    @abstractmethod
    def _lost(self) -> None:
        """Handle the loss of the link: nothing more is received on it."""

    def run(self) -> None:
        """Connect and work until the work is done."""
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
    """Pushes commands with new keys over its own link, and connects again when the link is lost.

    A push that was not accepted is sent again with the same key, so that in the end every key is accepted.

    :param connect: makes a link.
    :param rate: new keys a second.
    :ivar made: number of keys made so far.
    :ivar accepted: the ``cmd_id`` of each accepted key.
    :ivar refused: number of refusals by error code.
    :ivar wrong: descriptions of wrong answers: another ``cmd_id`` for the same key, or a refusal that is not retryable.
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
        """Push the commands that are due, and read the available answers."""
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
    """A client without a key, which connects repeatedly and sends a large frame that does not verify.

    :param port: the server's port.
    :param rate: frames a second, each over a link of its own.
    :param seconds: longest duration; see :meth:`finish`.
    :ivar sent: number of frames sent in full.
    """

    #: Most links that the client leaves open: as many as a server keeps without a valid frame.
    MOST_OPEN = 100

    def __init__(self, port: int, rate: float = 40.0, seconds: float = 60.0) -> None:
        super().__init__(daemon=True)
        self._port, self._rate, self._seconds = port, rate, seconds
        self._is_over = threading.Event()
        self.sent = 0

    def finish(self) -> None:
        """Stop sending."""
        self._is_over.set()

    def _frames(self) -> list[bytes]:
        return [framed(frame) for frame in hostile.dearest(65536)]

    def _leave(self, link: socket.socket) -> None:
        link.close()

    def run(self) -> None:
        """Send the frames that are due, and read no answer."""
        shapes = itertools.cycle(self._frames())
        links: deque[socket.socket] = deque()
        tried = 0
        began = time.monotonic()
        while (passed := time.monotonic() - began) < self._seconds and not self._is_over.wait(1 / self._rate):
            while tried < passed * self._rate:
                tried += 1
                links.append(socket.socket())
                # The send buffer holds the whole frame, so that the send does not depend on the server's reading.
                links[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
                frame = next(shapes)
                with contextlib.suppress(OSError):  # not accepted now, or cut
                    links[-1].settimeout(0.2)
                    links[-1].connect(("127.0.0.1", self._port))
                    self.sent += links[-1].send(frame) == len(frame)
                while len(links) > self.MOST_OPEN:
                    self._leave(links.popleft())
        for link in links:
            self._leave(link)


class HelloFlood(StrangersFlood):
    """A client that begins a TLS handshake on each of its connections, and never goes on.

    :ivar answered: number of connections on which the server went on with the handshake.
    """

    MOST_OPEN = 300
    answered = 0

    def _frames(self) -> list[bytes]:
        return [hostile.client_hello()]

    def _leave(self, link: socket.socket) -> None:
        link.setblocking(False)
        with contextlib.suppress(OSError):  # nothing came, or the connection was closed
            self.answered += bool(link.recv(1))
        link.close()
