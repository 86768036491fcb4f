"""What a frame turns out to be: the outcomes of :meth:`s2s.protocol.session.Session.receive`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from s2s.errors import BadReply, CallError, Refused, WireError, harmless
from s2s.protocol.catalogue import ERROR, ERROR_SCHEMA, MessageType
from s2s.protocol.envelope import Envelope
from s2s.protocol.signing import Sealed
from s2s.protocol.window import Call


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
    :param request: the request that was refused, if its MAC and its envelope are valid.
    """

    error: WireError
    ack_of: str | None = None
    is_answered: bool = True
    key_id: str | None = None
    request: Envelope | None = None


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


#: The outcome of a frame.
Received = Request | Reply | Refusal | UnsignedError | UnknownKey
