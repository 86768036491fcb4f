"""Verification and classification of frames (docs/protocol.rst, "Order of checks").

The checks are, in this order: JSON, key, MAC; the session's checks; the payload's schema. The keys of ``s2s_keys`` come
from a :class:`KeySource`, which reads them through the ``adbapi`` pool. The dispatcher writes nothing to the link: it
updates the session and returns an outcome, on which the link acts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from twisted.internet.defer import Deferred

from s2s.errors import AuthBad, BadReply, CallError, Refused, Unsigned, WireError, harmless
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import ERROR, ERROR_SCHEMA, MessageType
from s2s.protocol.envelope import Envelope
from s2s.protocol.session import Session, is_reply, is_unsigned_error
from s2s.protocol.signing import Key, Keyring, Sealed
from s2s.protocol.window import Call
from s2s.runtime.clock import Clock


class KeySource(Protocol):
    """The keys, held in memory and read again on request."""

    @property
    def keyring(self) -> Keyring:
        """The snapshot of the keys that was read last."""

    def refresh(self) -> Deferred[None]:
        """Read the keys again, at most once a second.

        :returns: fires after a read that began after this call, or after the attempt was given up.
        """


class Request(msgspec.Struct, frozen=True):
    """A request that passed every check.

    :param payload: the valid payload, with the defaults of its schema filled in.
    :param size: the size of the frame, in bytes.
    """

    envelope: Envelope
    message: MessageType
    payload: dict[str, Any]
    key_id: str
    size: int


#: Serves one type of request: returns the reply's payload or a Deferred of it, or raises a
#: :class:`~s2s.errors.WireError`.
Responder = Callable[[Request], "Mapping[str, Any] | Deferred[dict[str, Any]]"]


class Reply(msgspec.Struct, frozen=True):
    """A reply; ``call`` is ``None`` when no call awaits it."""

    envelope: Envelope
    call: Call | None

    def outcome(self) -> dict[str, Any] | CallError:
        """Return the outcome of the call: the reply's payload, or the error with which the call fails."""
        assert self.call is not None
        asked, got = self.call.message, self.envelope
        is_error = got.type == ERROR
        if not is_error and got.type != asked.reply:
            return BadReply(f"{asked.name} was answered by {harmless(got.type)} in place of {asked.reply}")
        schema = ERROR_SCHEMA if is_error else asked.reply_schema
        wrong = None if schema.is_valid(got.payload) else schema.explain(got.payload)
        if wrong is not None:
            # The peer chose the names of the members on the path.
            where = f"at {harmless(wrong[0])}: {wrong[1]}"
            return BadReply(f"{asked.name} was answered by {got.type} with a bad payload: {where}")
        if is_error:
            return Refused(got.payload["code"], got.payload["message"], got.payload["details"])
        return got.payload


@dataclass(frozen=True)
class Refusal:
    """A frame that was refused.

    :param ack_of: the ``id`` to name in the answer, if it is well formed and the answer is signed.
    :param is_answered: ``False`` for replies, which are never answered.
    :param key_id: the ``key_id`` of a frame that no key verified; it is for our log, and not for the answer.
    """

    error: WireError
    ack_of: str | None = None
    is_answered: bool = True
    key_id: str | None = None


@dataclass(frozen=True)
class UnsignedError:
    """An ``s2s.error`` without ``auth``, which answers no request."""

    payload: object


@dataclass(frozen=True)
class UnknownKey:
    """No key in memory with this ``key_id`` has begun its validity: read the keys again before refusing the frame.

    :param sealed: the data that the MAC needs. The parsed frame is not kept, as it may take 50 times the memory.
    """

    sealed: Sealed


class Dispatcher:
    """Verifies and classifies the frames of any number of links.

    :param responders: the responders of this process, by message type.
    :param refused: called with each refused request whose MAC and envelope are valid, the ``key_id`` and the error.
    """

    def __init__(
        self,
        keys: KeySource,
        responders: Mapping[str, Responder],
        clock: Clock,
        refused: Callable[[Envelope, str, WireError], object] = lambda *_: None,
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._refused = refused
        self.responders = responders

    def receive(
        self, frame: bytes, session: Session, unknown: UnknownKey | None = None
    ) -> Request | Reply | Refusal | UnsignedError | UnknownKey:
        """Verify and classify one frame.

        :param frame: the frame's body.
        :param unknown: the outcome for this frame before the keys were read again, if they were.
        """
        keyring, now, mono = self._keys.keyring, self._clock.now(), self._clock.mono()
        if unknown is not None and keyring.verify(unknown.sealed, now) is None:
            return Refusal(AuthBad(), key_id=unknown.sealed.key_id)
        # A canonical frame is parsed only after its MAC is verified. The MAC of any other frame covers its canonical
        # form, so that frame is parsed first.
        key = read = None
        plain = envelope.unseal_plainly(frame)
        if plain is not None:
            key = keyring.verify(plain, now)
            if key is not None:
                read = plain.read()
        if key is None or read is None:
            opened = _open_exactly(frame, keyring, now)
            if not isinstance(opened, tuple):
                return opened
            key, members = opened
            session.heard(key.key_id, mono)
            try:
                read = envelope.read(members)
            except WireError as error:
                is_answered = not is_reply(members.get("type"), "ack_of" in members)
                return Refusal(error, envelope.well_formed_id(members), is_answered)
        else:
            session.heard(key.key_id, mono)
        is_answered = not is_reply(read.type, read.ack_of is not None)
        try:
            session.check_way(read, key)
            if not is_answered:
                return Reply(read, session.calls.settle(read.ack_of))
            message = session.admit(read, key, self.responders, now, mono)
            message.request_schema.check(read.payload)
        except WireError as error:
            if is_answered:
                self._refused(read, key.key_id, error)
            return Refusal(error, read.id, is_answered)
        return Request(read, message, {**message.request_schema.defaults, **read.payload}, key.key_id, len(frame))


def _open_exactly(
    frame: bytes, keyring: Keyring, now: float
) -> tuple[Key, dict[str, Any]] | Refusal | UnsignedError | UnknownKey:
    """Return the key that verifies a frame's canonical form, and the frame's members, or the outcome of a refusal."""
    try:
        members, written = canonical.parse_and_write(frame)
        if is_unsigned_error(members):
            return UnsignedError(members.get("payload"))
        sealed = envelope.unseal_exactly(members, written)
        key = keyring.verify(sealed, now)
        if key is not None:
            return key, members
        if not keyring.has_begun(sealed.key_id, now):
            return UnknownKey(sealed)
        return Refusal(AuthBad(), key_id=sealed.key_id)
    except Unsigned as error:
        # The traceback refers to the parsed frame, which only the cyclic garbage collector would free.
        error.__traceback__ = error.__context__ = None
        return Refusal(error)
