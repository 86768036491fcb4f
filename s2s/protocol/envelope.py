"""Reading, sealing and signing envelopes (docs/protocol.rst, "Envelope" and "Signature")."""

from __future__ import annotations

import re
import secrets
from typing import Any, Final, NoReturn

import msgspec
from ulid_transform import bytes_to_ulid

from s2s.errors import AuthBad, AuthRequired, BadEnvelope, UnsupportedVersion
from s2s.protocol import canonical
from s2s.protocol.signing import KEY_ID, ROLES, Key, Sealed

VERSION: Final = 1
ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
SIGNATURE: Final = re.compile(r"[0-9a-f]{64}")
#: The depth of a payload in its envelope, which is depth 1.
PAYLOAD_DEPTH: Final = 2
#: The only signature scheme. A peer may omit the member ``scheme`` but may not name another scheme.
SCHEME: Final = "hmac-sha256"

# The members of an envelope in their canonical order. If the payload, from its first brace to its last, is canonical
# JSON, the members after it are exactly those in this pattern.
_CANONICAL: Final = re.compile(
    rb'(\{(?:"ack_of":"([A-Za-z0-9_-]{1,64})",)?"auth":\{"key_id":"([A-Za-z0-9_.-]{1,64})"),"sig":"([0-9a-f]{64})"'
    rb'(\},"dst":"([a-z]{1,64})","id":"([A-Za-z0-9_-]{1,64})","payload":(\{.*\}),"src":"([a-z]{1,64})"'
    rb',"ts":(0|[1-9][0-9]{0,14}),"type":"([a-z0-9_.]{1,64})","v":1\})',
    re.DOTALL,
)


class Envelope(msgspec.Struct, frozen=True):
    """One well-formed message.

    :param id: unique for every transmission.
    :param ts: Unix seconds at sending.
    :param ack_of: in a reply, the ``id`` of the request.
    :param payload: not yet validated against its schema.
    """

    id: str
    ts: int
    src: str
    dst: str
    type: str
    payload: dict[str, Any]
    ack_of: str | None = None


class PlainlySealed(Sealed, frozen=True):
    """A frame that is canonical outside its payload. The payload is parsed only after the MAC is checked.

    :param signed: as of :class:`Sealed`, if the payload is canonical too.
    :param rest: the members ``dst``, ``id``, ``payload``, ``src``, ``ts`` and ``type``.
    """

    ack_of: bytes | None
    rest: list[bytes]

    def read(self) -> Envelope | None:
        """Read the envelope.

        :returns: ``None`` if the payload is not canonical: then ``signed`` is not the text that the signature must
            cover.
        """
        dst, message_id, body, src, ts, type = self.rest
        payload = canonical.parse_plainly(body, PAYLOAD_DEPTH)
        if payload is None:
            return None
        return Envelope(
            message_id.decode(),
            int(ts),
            src.decode(),
            dst.decode(),
            type.decode(),
            payload,
            None if self.ack_of is None else self.ack_of.decode(),
        )


def unseal_plainly(frame: bytes) -> PlainlySealed | None:
    """Split a frame that is in its canonical form and has the members of an envelope and no others.

    :returns: ``None`` for any other frame: parse it and pass it to :func:`unseal_exactly` and :func:`read`.
    """
    match = _CANONICAL.fullmatch(frame)
    if match is None:
        return None
    head, ack_of, key_id, sig, covered, *rest = match.groups()
    return PlainlySealed(key_id.decode(), sig.decode(), head + covered, ack_of, rest)


def unseal_exactly(members: dict[str, Any], written: bytes) -> Sealed:
    """Split a parsed frame, canonical or not.

    :param written: the frame's canonical form.
    :raises AuthRequired: there is no ``auth``.
    :raises AuthBad: ``auth`` is malformed.
    """
    if "auth" not in members:
        raise AuthRequired()
    auth = members["auth"]
    if type(auth) is not dict or auth.get("scheme", SCHEME) != SCHEME:
        raise AuthBad()
    key_id, sig = auth.get("key_id"), auth.get("sig")
    if type(key_id) is not str or type(sig) is not str or not KEY_ID.fullmatch(key_id) or not SIGNATURE.fullmatch(sig):
        raise AuthBad()
    unsigned = {name: value for name, value in auth.items() if name != "sig"}
    before = canonical.rewrite({name: value for name, value in members.items() if name < "auth"})
    start = len(before) + len('"auth":') + (before != b"{}") - 1
    end = start + len(canonical.rewrite(auth))
    return Sealed(key_id, sig, written[:start] + canonical.rewrite(unsigned) + written[end:])


def read(members: dict[str, Any]) -> Envelope:
    """Check the shape of an envelope whose MAC is valid.

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
    """Return the ``id`` that an error may name in ``ack_of``, or ``None`` if the ``id`` is not well formed."""
    message_id = members.get("id")
    return message_id if type(message_id) is str and ID.fullmatch(message_id) else None


# --- writing -------------------------------------------------------------------------------------------------------


def size(message_type: str, body: bytes, key_id_length: int = 64) -> int:
    """Return the largest possible size in bytes of a frame with this payload, before its id and its key are known.

    :param body: the payload's canonical bytes.
    """
    return _OVERHEAD + key_id_length + len(message_type) + len(body)


def seal(
    *, id: str, ts: int, src: str, dst: str, type: str, body: bytes, key: Key | None, ack_of: str | None = None
) -> bytes:
    """Write one frame, signed by ``key``. Without a key, write the unsigned answer to a frame that was not verified.

    The payload is encoded already, and no other member holds a character that JSON escapes. The canonical form is
    therefore concatenated and not sorted; ``tests/protocol/test_envelope.py`` compares the result with
    :func:`s2s.protocol.canonical.dumps_exactly`.

    :param body: the payload's canonical bytes.
    """
    # Everything except the body is ASCII, so each run of members is encoded at once.
    reply = "" if ack_of is None else f'"ack_of":"{ack_of}",'
    to = f'"dst":"{dst}","id":"{id}","payload":'.encode("ascii")
    rest = f',"src":"{src}","ts":{ts},"type":"{type}","v":{VERSION}}}'.encode("ascii")
    if key is None:
        return b"".join((b"{", reply.encode("ascii"), to, body, rest))
    head = f'{{{reply}"auth":{{"key_id":"{key.key_id}"'.encode("ascii")
    covered = b"".join((b"},", to, body, rest))
    sig = key.sign(head + covered)
    return b"".join((head, b',"sig":"', sig.encode("ascii"), b'"', covered))


def unguessable_id(ms: int) -> str:
    """Return a ULID whose 80 random bits cannot be predicted from other ids; an ordinary ULID is faster to generate.

    :param ms: Unix milliseconds.
    """
    return bytes_to_ulid(ms.to_bytes(6, "big") + secrets.token_bytes(10))


def other(role: str) -> str:
    """Return the role of the peer."""
    return ROLES[1 - ROLES.index(role)]


# Maximum bytes of a frame without its key_id, type and payload: 64 each for id, ack_of and sig, and 17 digits of ts.
_OVERHEAD: Final = len(
    '{"ack_of":"","auth":{"key_id":"","sig":""},"dst":"server","id":"","payload":,"src":"engine","ts":,"type":"","v":1}'
) + (64 + 64 + 64 + 17)
