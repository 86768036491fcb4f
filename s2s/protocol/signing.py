"""Keys, signing and verifying (docs/protocol.rst, "Signature" and "Keys").

The caller passes the time, and this module reads no table.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import math
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Literal

import msgspec

from s2s.errors import NoSigningKey

Role = Literal["engine", "server"]
ROLES: Final[tuple[Role, ...]] = ("engine", "server")
#: The roles that a key may sign for: one role, or both.
KEY_ROLES: Final = (*ROLES, "any")
KEY_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MIN_SECRET: Final = 32


# The block size of SHA-256 in bytes, and the pads with which the padded key is XORed (RFC 2104, section 2).
_BLOCK: Final = 64
_INNER_PAD: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER_PAD: Final = bytes(byte ^ 0x5C for byte in range(256))


class Secret:
    """Secret bytes, which ``repr``, ``str`` and formatting do not show."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Return the bytes. Only the code that computes MACs needs them."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"


def decode_secret(key_b64: str) -> Secret:
    """Decode the ``key_b64`` column.

    :raises ValueError: the column is not base64, or the secret is shorter than 32 bytes; the error quotes neither.
    """
    try:
        value = base64.b64decode("".join(key_b64.split()), validate=True)
    except (binascii.Error, ValueError):
        # "from None", because the original error may quote the input.
        raise ValueError("the secret is not base64") from None
    if len(value) < MIN_SECRET:
        raise ValueError(f"the secret has {len(value)} bytes and needs at least {MIN_SECRET}")
    return Secret(value)


def random_secret() -> str:
    """Return a new secret of 32 bytes, as base64 for the ``key_b64`` column."""
    return base64.b64encode(secrets.token_bytes(MIN_SECRET)).decode("ascii")


@dataclass(frozen=True)
class Key:
    """One row of ``s2s_keys``.

    :param role: ``engine``, ``server`` or ``any``: the ``src`` that may sign with this key.
    :param active_from: Unix seconds.
    :param active_to: Unix seconds, or ``None`` for no end.
    :param is_default_tx: whether the key is preferred for signing.
    """

    key_id: str
    secret: Secret = field(repr=False)
    role: str
    active_from: float
    active_to: float | None = None
    is_default_tx: bool = False

    def __post_init__(self) -> None:
        # The padded key blocks are hashed once; each MAC then copies both hash states (RFC 2104, section 4).
        secret = self.secret.reveal()
        block = (sha256(secret).digest() if len(secret) > _BLOCK else secret).ljust(_BLOCK, b"\0")
        object.__setattr__(self, "_inner", sha256(block.translate(_INNER_PAD)))
        object.__setattr__(self, "_outer", sha256(block.translate(_OUTER_PAD)))

    def sign(self, message: bytes) -> str:
        """Return the HMAC-SHA256 of a message as 64 lowercase hex digits (RFC 2104)."""
        # Computed here and not by a library, because the libraries' HMAC runs so much more code that a call after a
        # pause takes twice as long.
        inner, outer = self._inner.copy(), self._outer.copy()  # type: ignore[attr-defined]
        inner.update(message)
        outer.update(inner.digest())
        mac: str = outer.hexdigest()
        return mac

    def verifies(self, message: bytes, signature: str) -> bool:
        """Whether a signature is the MAC of a message, compared in constant time."""
        return signature.isascii() and hmac.compare_digest(self.sign(message), signature)

    def is_active(self, now: float) -> bool:
        """Whether the key is valid at ``now`` (Unix seconds)."""
        return self.active_from <= now and (self.active_to is None or now < self.active_to)

    def why_inactive(self, now: float) -> str | None:
        """Return why the key is not valid at ``now``, as a predicate to follow its name, or ``None`` if it is valid."""
        if self.is_active(now):
            return None
        if self.active_to is not None and self.active_to <= max(now, self.active_from):
            return "is no longer valid"
        return f"is not active yet, but in {self.active_from - now:.0f} s: see whether the database's clock is behind"

    def may_sign_for(self, role: str) -> bool:
        """Whether this key may sign an envelope with this ``src``."""
        return self.role in (role, "any")


#: The key that is used when the key_id is unknown, so that an unknown key takes as much time as a known one.
_NOBODY: Final = Key("", Secret(secrets.token_bytes(MIN_SECRET)), "", 0.0)


class Sealed(msgspec.Struct, frozen=True):
    """A frame whose MAC is not checked yet.

    :param signed: the bytes that the signature covers: the canonical envelope without ``auth.sig``.
    """

    key_id: str
    sig: str
    signed: bytes


class Keyring:
    """An immutable snapshot of the keys that were read last."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = {key.key_id: key for key in keys}
        # The signer cannot change between two of these moments, so it is looked up once and not for every frame.
        ends = {end for key in self._keys.values() for end in (key.active_from, key.active_to) if end is not None}
        self._moments = [-math.inf, *sorted(ends), math.inf]
        self._signers: dict[tuple[str, int], Key] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def has_begun(self, key_id: str, now: float) -> bool:
        """Whether the key is known and its validity has begun, even if it has ended.

        The start of a key that is not valid yet may be moved to now, so such a key must be read again.

        :param now: Unix seconds.
        """
        return key_id in self._keys and self._keys[key_id].active_from <= now

    def why_inactive(self, key_id: str, now: float) -> str | None:
        """Return why no signature of this key is accepted, as a predicate to follow its name, or ``None``.

        :param now: Unix seconds.
        """
        return self._keys[key_id].why_inactive(now) if key_id in self._keys else "is not known here"

    def signer(self, role: Role, now: float) -> Key:
        """Return the key that signs for ``role``: the active default of the role, else of ``any``, else the newest.

        :param now: Unix seconds.
        :raises NoSigningKey: no active key may sign for the role.
        """
        span = (role, bisect_right(self._moments, now))
        if span not in self._signers:
            self._signers[span] = self._find_signer(role, now)
        return self._signers[span]

    def _find_signer(self, role: Role, now: float) -> Key:
        keys = [key for key in self._keys.values() if key.may_sign_for(role)]
        usable = [key for key in keys if key.is_active(now)]
        if not usable:
            cure = f"make one with: s2s keys add --role {role} --key-id ID"
            coming = [key for key in keys if key.active_from > now and key.active_to is None]
            if coming:
                first = min(coming, key=lambda key: key.active_from)
                cure = (
                    f"the key {first.key_id} {first.why_inactive(now)}; to use it now: s2s keys activate {first.key_id}"
                )
            raise NoSigningKey(f"no active key may sign for {role}: {cure}")
        return max(
            usable,
            key=lambda key: (key.is_default_tx and key.role == role, key.is_default_tx, key.active_from, key.key_id),
        )

    def verify(self, sealed: Sealed, now: float) -> Key | None:
        """Find the key and check the MAC.

        :param now: Unix seconds.
        :returns: the key, or ``None`` when the key is unknown or not active, or the MAC is wrong. All take equal time.
        """
        key = self._keys.get(sealed.key_id, _NOBODY)
        right = key.verifies(sealed.signed, sealed.sig)
        return key if right and key is not _NOBODY and key.is_active(now) else None
