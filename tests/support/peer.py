"""A peer of s2s, written from docs/protocol.rst only: blocking sockets and the standard library.

It uses nothing of :mod:`s2s`, so that a test with it checks the wire and does not compare our code with itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

CHECK, ACK, ERROR, BUMP = "s2s.health.check", "s2s.ack", "s2s.error", "s2s.config.bump"
HEALTH_ACK, PUSH, SWEEP = "s2s.health.ack", "s2s.command.push", "s2s.broadcast.sweep"
#: Seconds without the expected frame after which the test fails.
PATIENCE_S = 60.0

_numbers = itertools.count(1)

Frame = dict[str, Any]


class Key(NamedTuple):
    """A shared secret and its name."""

    key_id: str
    key_b64: str

    def mac(self, message: bytes) -> str:
        """Return the signature of a message."""
        return hmac.new(base64.b64decode(self.key_b64), message, hashlib.sha256).hexdigest()


#: The key of the protocol's worked examples and of the vectors.
K1 = Key("k1", base64.b64encode(bytes(range(32))).decode())


def canonical(value: Any) -> bytes:
    """Write a value in canonical form: Python sorts by code point and escapes as the protocol requires."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def framed(body: bytes) -> bytes:
    """Put the length in front."""
    return struct.pack("!I", len(body)) + body


def sign(envelope: Frame, key: Key = K1) -> bytes:
    """Return the body of the signed envelope."""
    unsigned = {**envelope, "auth": {"key_id": key.key_id}}
    return canonical({**envelope, "auth": {"key_id": key.key_id, "sig": key.mac(canonical(unsigned))}})


def notice(message: str = "hello", **more: Any) -> Frame:
    """Return the payload of a ``notice.publish`` with the scope ``global``."""
    return {"scope": "global", "message": message, "severity": "info", **more}


def command(idem_key: str, payload: Frame | None = None, **more: Any) -> Frame:
    """Return the payload of a push of a notice; ``more`` adds members or replaces them."""
    return {"cmd_type": "notice.publish", "idem_key": idem_key, "payload": payload or notice(idem_key), **more}


class Peer:
    """One end of a link.

    :param role: ours, ``engine`` or ``server``.
    :param key: signs our frames; this key and :data:`K1` verify received frames.
    :param now: our clock in Unix seconds; the real clock if left out.
    :param name: our name in health replies: a server treats two engines of the same name as one.
    :ivar last: the unchanged body of the frame that was read last.
    :ivar serves: for each type of request that is answered automatically during a read, a function from the request's
        payload to the reply's.
    """

    def __init__(
        self, link: socket.socket, role: str = "engine", key: Key = K1, now: float | None = None, name: str = ""
    ) -> None:
        link.settimeout(PATIENCE_S)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.link = link
        self.role, self.other = ("engine", "server") if role == "engine" else ("server", "engine")
        self.key = key
        #: Further keys that verify received frames, by name.
        self.known_keys: Mapping[str, Key] = {}
        self.last = b""
        name = name or f"outsider-{next(_numbers)}"
        self.serves: dict[str, Callable[[Frame], Frame]] = {
            CHECK: lambda _: {"role": role, "version": "9", "uptime_s": 1, "name": name},
            SWEEP: lambda payload: {"ok": True, "since_ts": payload["since_ts"], "queued": 0},
        }
        self._now = now
        self._ids = (f"{secrets.token_hex(8)}-{number}" for number in itertools.count(1))
        self._buffer = b""
        self.may_be_cut = False

    def close(self) -> None:
        """Close the connection."""
        self.link.close()

    # --- out ------------------------------------------------------------------------------------------------------

    def envelope(self, type: str, payload: Any, **members: Any) -> Frame:
        """Make an unsigned envelope; ``members`` adds members or replaces them."""
        now = int(time.time() if self._now is None else self._now)
        ours = {"v": 1, "id": next(self._ids), "ts": now, "src": self.role, "dst": self.other}
        return {**ours, "type": type, "payload": payload, **members}

    def frame(self, type: str, payload: Any, **members: Any) -> bytes:
        """Make a signed frame with its length."""
        return framed(sign(self.envelope(type, payload, **members), self.key))

    def write(self, data: bytes) -> None:
        """Write bytes unchanged."""
        self.link.sendall(data)

    def send(self, type: str, payload: Any, **members: Any) -> str:
        """Send an envelope, and return its ``id``."""
        envelope = self.envelope(type, payload, **members)
        self.write(framed(sign(envelope, self.key)))
        return str(envelope["id"])

    def write_all(self, envelopes: list[Frame]) -> None:
        """Sign many envelopes, and write them together."""
        self.write(b"".join(framed(sign(envelope, self.key)) for envelope in envelopes))

    def reply(self, request: Frame, type: str, payload: Any) -> None:
        """Answer a request."""
        self.send(type, payload, ack_of=request["id"])

    def refuse(self, request: Frame, code: str, **details: Any) -> None:
        """Answer a request with an error."""
        self.reply(request, ERROR, {"code": code, "message": code, "details": details})

    # --- in -------------------------------------------------------------------------------------------------------

    def read(self) -> Frame | None:
        """Read the next frame, verify it if it is signed, and answer it if its type is in ``serves``.

        :returns: ``None`` at the end of the link.
        """
        head = self._take(4)
        body = None if head is None else self._take(struct.unpack("!I", head)[0])
        if body is None:
            return None
        frame: Frame = json.loads(body)
        self.last = body
        if "auth" in frame:
            sig = frame["auth"].pop("sig")
            key_id = frame["auth"]["key_id"]
            key = self.key if key_id == self.key.key_id else self.known_keys.get(key_id, K1)
            assert sig == key.mac(canonical(frame)), f"a wrong signature: {frame}"
        if "ack_of" not in frame and frame["type"] in self.serves:
            reply = self.serves[frame["type"]](frame["payload"])
            # The other side may have closed the link after this frame; the rest of its frames is still to be read.
            with suppress(ConnectionError):
                self.reply(frame, HEALTH_ACK if frame["type"] == CHECK else ACK, reply)
        return frame

    @property
    def has_more(self) -> bool:
        """Whether the buffer holds a whole frame."""
        return len(self._buffer) >= 4 and len(self._buffer) >= 4 + struct.unpack("!I", self._buffer[:4])[0]

    def _take(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            try:
                more = self.link.recv(1 << 16)
            except ConnectionResetError:
                more = b""
            if not more:
                assert self.may_be_cut or not self._buffer, f"the link ended within a frame: {self._buffer!r}"
                return None
            self._buffer += more
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def until(self, wanted: Callable[[Frame], bool]) -> Frame:
        """Read up to the first frame for which ``wanted`` is true, and return it."""
        deadline = time.monotonic() + PATIENCE_S
        while (frame := self.read()) is not None:
            if wanted(frame):
                return frame
            assert time.monotonic() < deadline, "what is wanted does not come"
        raise AssertionError("the link ended before what is wanted came")

    def request(self, type: str) -> Frame:
        """Read up to a request of this type, and return it."""
        return self.until(lambda frame: frame["type"] == type and "ack_of" not in frame)

    def answer(self, message_id: str) -> Frame:
        """Read up to the reply to our request, and return it."""
        return self.until(lambda frame: frame.get("ack_of") == message_id)

    def answers(self, ids: list[str]) -> dict[str, Frame]:
        """Read the replies to all these requests, in any order, and return their payloads by ``id``."""
        missing, found = set(ids), {}
        while missing:
            frame = self.until(lambda frame: frame.get("ack_of") in missing)
            missing.discard(frame["ack_of"])
            found[frame["ack_of"]] = frame["payload"]
        return found

    def call(self, type: str, payload: Any, **members: Any) -> Frame:
        """Send a request, and return the payload of its reply."""
        payload_back: Frame = self.answer(self.send(type, payload, **members))["payload"]
        return payload_back

    def refusal(self) -> Frame:
        """Read up to an error, and return it."""
        return self.until(lambda frame: frame["type"] == ERROR)

    def rest(self, *, is_killed: bool = False) -> list[Frame]:
        """Read all frames until the link ends, and return them.

        :param is_killed: the link may end within a frame, since the other process was killed.
        """
        self.may_be_cut = is_killed
        return list(iter(self.read, None))

    def greet(self) -> Mapping[str, Any]:
        """Challenge the other side, answer its challenge, and return the payload of its health reply."""
        ours = self.send(CHECK, {})
        answered = asked = False
        said: Mapping[str, Any] = {}
        while not (answered and asked):
            frame = self.until(lambda _: True)
            asked = asked or (frame["type"] == CHECK and "ack_of" not in frame)
            if frame.get("ack_of") == ours:
                answered, said = True, frame["payload"]
        return said


def connect(port: int, source: str = "127.0.0.1", **how: Any) -> Peer:
    """Connect as an engine from an address of this machine; ``how`` is as for :class:`Peer`."""
    return Peer(socket.create_connection(("127.0.0.1", port), PATIENCE_S, (source, 0)), **how)


class ListeningPeer:
    """Listens for an engine, as its server."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(PATIENCE_S)
        self.port: int = self._socket.getsockname()[1]

    def accept(self, **how: Any) -> Peer:
        """Wait for the engine's connection, and return a peer for it."""
        return Peer(self._socket.accept()[0], role="server", **how)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
