"""From a frame to a responder (docs/protocol.rst, "Order of checks").

Parse, key, MAC; then the session's checks; then the payload's schema; then ``{type: responder}``. The dispatcher
verifies with the keys of ``s2s_keys``, which a :class:`KeySource` reads through the ``adbapi`` pool. It writes nothing:
it says what is to be done with the frame, and the link does it.
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
    """The keys, held in memory and read again when need be."""

    @property
    def keyring(self) -> Keyring:
        """The keys as they were read last."""

    def refresh(self) -> Deferred[None]:
        """Read them again, once a second at most; fires after a read that began after this call, or after giving up."""


class Request(msgspec.Struct, frozen=True):
    """A request that passed every check.

    :param payload: valid, with the defaults of its schema filled in.
    :param size: the frame's, in bytes.
    """

    envelope: Envelope
    message: MessageType
    payload: dict[str, Any]
    key_id: str
    size: int


#: Serves one type of request: gives the reply's payload, now or later, or raises a
#: :class:`~s2s.errors.WireError`.
Responder = Callable[[Request], "Mapping[str, Any] | Deferred[dict[str, Any]]"]


class Reply(msgspec.Struct, frozen=True):
    """An answer; ``call`` is ``None`` when nobody awaits it."""

    envelope: Envelope
    call: Call | None

    def outcome(self) -> dict[str, Any] | CallError:
        """Say what the reply means for its call: the payload, or why it failed."""
        assert self.call is not None
        asked, got = self.call.message, self.envelope
        is_error = got.type == ERROR
        if not is_error and got.type != asked.reply:
            return BadReply(f"{asked.name} was answered by {harmless(got.type)} in place of {asked.reply}")
        schema = ERROR_SCHEMA if is_error else asked.reply_schema
        wrong = None if schema.is_valid(got.payload) else schema.explain(got.payload)
        if wrong is not None:
            # The names of members on the path are the peer's.
            where = f"at {harmless(wrong[0])}: {wrong[1]}"
            return BadReply(f"{asked.name} was answered by {got.type} with a bad payload: {where}")
        if is_error:
            return Refused(got.payload["code"], got.payload["message"], got.payload["details"])
        return got.payload


@dataclass(frozen=True)
class Refusal:
    """A frame that was refused.

    :param ack_of: the ``id`` to name in the answer, if it is well formed and the answer is signed.
    :param is_answered: ``False`` for replies: they are never answered.
    :param key_id: which the frame names, where no key of ours verifies it: for our log, and not for the answer.
    """

    error: WireError
    ack_of: str | None = None
    is_answered: bool = True
    key_id: str | None = None


@dataclass(frozen=True)
class UnsignedError:
    """An ``s2s.error`` without ``auth``: to be logged and counted, no more."""

    payload: object


@dataclass(frozen=True)
class UnknownKey:
    """Of the keys in memory none of this ``key_id`` has begun: read them again before the frame is refused.

    :param sealed: what its MAC needs, and not the parsed frame, which may take 50 times the memory.
    """

    sealed: Sealed


class Dispatcher:
    """Judges the frames of any number of links.

    :param responders: what this process serves, by message type.
    :param refused: told of each request that is refused though its MAC and its shape are right: it, the ``key_id``, and
        why.
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
        """Judge one frame.

        :param frame: the frame's body.
        :param unknown: what was made of this frame before the keys were read again.
        """
        keyring, now, mono = self._keys.keyring, self._clock.now(), self._clock.mono()
        if unknown is not None and keyring.verify(unknown.sealed, now) is None:
            return Refusal(AuthBad(), key_id=unknown.sealed.key_id)
        # The usual frame is parsed only once its MAC holds. Of any other the MAC covers the canonical form.
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
    """Return the key whose MAC holds over a frame's canonical form, and the frame's members."""
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
        # The frames of its traceback hold all that was parsed, and would be freed by the cyclic collector only.
        error.__traceback__ = error.__context__ = None
        return Refusal(error)
