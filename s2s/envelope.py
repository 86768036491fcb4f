"""The envelope: read, sealed and signed (docs/protocol.rst, "Envelope" and "Signature")."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from s2s import canonical
from s2s.errors import AuthBad, AuthRequired, BadEnvelope, UnsupportedVersion
from s2s.signing import KEY_ID, ROLES, Key

VERSION: Final = 1
ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
SIGNATURE: Final = re.compile(r"[0-9a-f]{64}")
#: The one scheme; a peer may name it and may not name another.
SCHEME: Final = "hmac-sha256"

# In a canonical frame ack_of and auth sort first, so that sig has a fixed place.
_HEAD: Final = re.compile(
    rb'\{(?:"ack_of":"[A-Za-z0-9_-]{1,64}",)?"auth":\{"key_id":"[A-Za-z0-9_.-]{1,64}"(,"sig":"[0-9a-f]{64}")\},'
)


@dataclass(frozen=True)
class Envelope:
    """One message, read and found well formed.

    :param id: unique for every transmission.
    :param ts: Unix seconds at sending.
    :param ack_of: of a reply, the ``id`` of the request.
    :param payload: not yet held against its schema.
    """

    id: str
    ts: int
    src: str
    dst: str
    type: str
    payload: dict[str, Any]
    ack_of: str | None = None


@dataclass(frozen=True)
class Auth:
    """The ``auth`` member."""

    key_id: str
    sig: str


def read_auth(members: dict[str, Any]) -> Auth:
    """Take ``auth`` out of a parsed frame.

    :raises AuthRequired: there is none.
    :raises AuthBad: it is malformed.
    """
    if "auth" not in members:
        raise AuthRequired()
    auth = members["auth"]
    if type(auth) is not dict or auth.get("scheme", SCHEME) != SCHEME:
        raise AuthBad()
    key_id, sig = auth.get("key_id"), auth.get("sig")
    if type(key_id) is not str or type(sig) is not str or not KEY_ID.fullmatch(key_id) or not SIGNATURE.fullmatch(sig):
        raise AuthBad()
    return Auth(key_id, sig)


def signed_bytes(frame: bytes, members: dict[str, Any], is_canonical: bool) -> bytes:
    """Give the bytes that the signature covers: the canonical envelope without ``auth.sig``.

    :param members: the parsed frame; :func:`read_auth` has passed it.
    :param is_canonical: the frame is its own canonical form, so that ``sig`` can be cut out of it.
    """
    head = _HEAD.match(frame) if is_canonical else None
    if head is not None:
        return frame[: head.start(1)] + frame[head.end(1) :]
    return signed_bytes_exactly(members)


def signed_bytes_exactly(members: dict[str, Any]) -> bytes:
    """Like :func:`signed_bytes`, written anew from the parsed members."""
    auth = {name: value for name, value in members["auth"].items() if name != "sig"}
    return canonical.dumps_exactly({**members, "auth": auth})


def read(members: dict[str, Any]) -> Envelope:
    """Check the shape of an envelope whose MAC holds.

    :raises UnsupportedVersion: ``v`` is an integer and not 1.
    :raises BadEnvelope: a member is missing or ill-formed.
    """
    version = members.get("v")
    if type(version) is not int:
        _bad("v", "an integer")
    if version != VERSION:
        raise UnsupportedVersion(f"the version {version} is not supported", path="/v", supported=[VERSION])
    message_id, ts, ack_of = members.get("id"), members.get("ts"), members.get("ack_of")
    if type(message_id) is not str or not ID.fullmatch(message_id):
        _bad("id", "1 to 64 of A-Z a-z 0-9 _ -")
    if type(ts) is not int:
        _bad("ts", "an integer, Unix seconds")
    for name in ("src", "dst", "type"):
        if type(members.get(name)) is not str:
            _bad(name, "a string")
    if "ack_of" in members and (type(ack_of) is not str or not ID.fullmatch(ack_of)):
        _bad("ack_of", "the id of a request")
    if type(members.get("payload")) is not dict:
        _bad("payload", "an object")
    return Envelope(
        id=message_id,
        ts=ts,
        src=members["src"],
        dst=members["dst"],
        type=members["type"],
        payload=members["payload"],
        ack_of=ack_of,
    )


def _bad(name: str, wanted: str) -> NoReturn:
    raise BadEnvelope(f"the member {name} must be there and be {wanted}", path=f"/{name}")


def well_formed_id(members: dict[str, Any]) -> str | None:
    """Give the ``id`` that an error may name in ``ack_of``, if it is well formed."""
    message_id = members.get("id")
    return message_id if type(message_id) is str and ID.fullmatch(message_id) else None


# --- out -----------------------------------------------------------------------------------------------------------


def size(message_type: str, body: bytes, key_id_length: int = 64) -> int:
    """Give the largest size of a frame with this payload, before it has an id and a key.

    :param body: the payload's canonical bytes.
    """
    return _OVERHEAD + key_id_length + len(message_type) + len(body)


def seal(
    *, id: str, ts: int, src: str, dst: str, type: str, body: bytes, key: Key | None, ack_of: str | None = None
) -> bytes:
    """Write one frame, signed by ``key``; without a key it is the unsigned answer to a frame whose MAC did not hold.

    The payload comes encoded, and the rest holds no character that JSON escapes, so that the canonical form is put
    together and not sorted; ``tests/test_envelope.py`` holds it against :func:`s2s.canonical.dumps_exactly`.

    :param body: the payload's canonical bytes.
    """
    reply = b'"ack_of":"%b",' % ack_of.encode("ascii") if ack_of is not None else b""
    rest = b'"dst":"%b","id":"%b","payload":%b,"src":"%b","ts":%d,"type":"%b","v":%d}' % (
        dst.encode("ascii"),
        id.encode("ascii"),
        body,
        src.encode("ascii"),
        ts,
        type.encode("ascii"),
        VERSION,
    )
    if key is None:
        return b"{%b%b" % (reply, rest)
    head = b'{%b"auth":{"key_id":"%b"' % (reply, key.key_id.encode("ascii"))
    sig = key.sign(b"%b},%b" % (head, rest)).encode("ascii")
    return b'%b,"sig":"%b"},%b' % (head, sig, rest)


def other(role: str) -> str:
    """Give the role at the other end."""
    return ROLES[1 - ROLES.index(role)]


# The longest of everything that is not counted by name: 64 characters of id and ack_of, 17 digits of ts.
_OVERHEAD: Final = len(
    '{"ack_of":"","auth":{"key_id":"","sig":""},"dst":"server","id":"","payload":,"src":"engine","ts":,"type":"","v":1}'
) + (64 + 64 + 64 + 17)
