"""Tokens of the HTTP API: their format, and the access that they grant (docs/api.rst, "Tokens")."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final, Literal

Access = Literal["observer", "operator", "admin"]
#: The kinds of access, in ascending order: each kind includes the previous ones.
ACCESS: Final[tuple[Access, ...]] = ("observer", "operator", "admin")
NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: A token has a name, so that a check looks up and compares a single row, and 256 random bits, so that a fast hash is
#: safe.
_TOKEN: Final = re.compile(rf"s2s_({NAME.pattern})~[A-Za-z0-9_-]{{43}}")
#: Compared with the digest if the name is unknown, so that the check takes as long as for a known name.
_NOBODY: Final = secrets.token_bytes(32)


def make(name: str) -> str:
    """Make a new token of this name."""
    return f"s2s_{name}~{secrets.token_urlsafe(32)}"


def name_of(token: str) -> str | None:
    """Return the name in a token; ``None``: the text is not a token."""
    match = _TOKEN.fullmatch(token)
    return match and match[1]


def digest(token: str) -> bytes:
    """Return the digest of a token, which is stored in its place."""
    return hashlib.sha256(token.encode("utf-8")).digest()


def is_of(token: str, kept: bytes | None) -> bool:
    """Whether a token has this digest, compared in constant time.

    :param kept: the stored digest; ``None``: there is no token of this name.
    """
    return secrets.compare_digest(digest(token), kept or _NOBODY)


def allows(has: Access, wants: Access) -> bool:
    """Whether one kind of access includes another."""
    return ACCESS.index(has) >= ACCESS.index(wants)
