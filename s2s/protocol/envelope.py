"""The envelope: read, sealed and signed (docs/protocol.rst, "Envelope" and "Signature")."""

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
#: How deep a payload lies in its envelope.
PAYLOAD_DEPTH: Final = 2
#: The one scheme; a peer may name it and may not name another.
SCHEME: Final = "hmac-sha256"

# In a canonical frame the members of an envelope stand in this order. A payload that is canonical JSON itself, from its
# first brace to its last, is then followed by what follows it here and by nothing else.
_CANONICAL: Final = re.compile(
    rb'(\{(?:"ack_of":"([A-Za-z0-9_-]{1,64})",)?"auth":\{"key_id":"([A-Za-z0-9_.-]{1,64})"),"sig":"([0-9a-f]{64})"'
    rb'(\},"dst":"([a-z]{1,64})","id":"([A-Za-z0-9_-]{1,64})","payload":(\{.*\}),"src":"([a-z]{1,64})"'
    rb',"ts":(0|[1-9][0-9]{0,14}),"type":"([a-z0-9_.]{1,64})","v":1\})',
    re.DOTALL,
)


class Envelope(msgspec.Struct, frozen=True):
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


class PlainlySealed(Sealed, frozen=True):
    """A frame that looks canonical around its payload, which is not parsed yet: without a MAC it is not worth it.

    :param signed: as of :class:`Sealed`, if the payload is canonical too.
    :param rest: the members ``dst``, ``id``, ``payload``, ``src``, ``ts`` and ``type``.
    """

    ack_of: bytes | None
    rest: list[bytes]

    def read(self) -> Envelope | None:
        """Read the envelope.

        :returns: ``None`` if the payload is not canonical: then ``signed`` is not what the signature must cover.
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
    """Take a frame apart that is written in its canonical form and has the members of an envelope and no others.

    :returns: ``None`` for any other: parsed, it is for :func:`unseal_exactly` and :func:`read`.
    """
    match = _CANONICAL.fullmatch(frame)
    if match is None:
        return None
    head, ack_of, key_id, sig, covered, *rest = match.groups()
    return PlainlySealed(key_id.decode(), sig.decode(), head + covered, ack_of, rest)


def unseal_exactly(members: dict[str, Any], written: bytes) -> Sealed:
    """Take a parsed frame apart, whatever it looked like.

    :param written: its canonical form.
    :raises AuthRequired: there is no ``auth``.
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
    unsigned = {name: value for name, value in auth.items() if name != "sig"}
    before = canonical.rewrite({name: value for name, value in members.items() if name < "auth"})
    start = len(before) + len('"auth":') + (before != b"{}") - 1
    end = start + len(canonical.rewrite(auth))
    return Sealed(key_id, sig, written[:start] + canonical.rewrite(unsigned) + written[end:])


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
    together and not sorted; ``tests/protocol/test_envelope.py`` holds it against
    :func:`s2s.protocol.canonical.dumps_exactly`.

    :param body: the payload's canonical bytes.
    """
    # Everything but the body is ASCII, and is encoded at one go.
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
    """Make a ULID whose 80 random bits nobody can tell from others that he has seen; a common one is drawn faster.

    :param ms: Unix milliseconds.
    """
    return bytes_to_ulid(ms.to_bytes(6, "big") + secrets.token_bytes(10))


def other(role: str) -> str:
    """Give the role at the other end."""
    return ROLES[1 - ROLES.index(role)]


# The longest of everything that is not counted by name: 64 characters of id and ack_of, 17 digits of ts.
_OVERHEAD: Final = len(
    '{"ack_of":"","auth":{"key_id":"","sig":""},"dst":"server","id":"","payload":,"src":"engine","ts":,"type":"","v":1}'
) + (64 + 64 + 64 + 17)
