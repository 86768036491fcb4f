"""Tokens of the HTTP API: what one looks like, and what it allows (docs/api.rst, "Tokens")."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final, Literal

Access = Literal["observer", "operator", "admin"]
#: Whoever may do what stands later may do all that stands before.
ACCESS: Final[tuple[Access, ...]] = ("observer", "operator", "admin")
NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: A name, so that one row is looked for and compared, and 256 random bits, which nobody guesses: a fast hash serves.
_TOKEN: Final = re.compile(rf"s2s_({NAME.pattern})~[A-Za-z0-9_-]{{43}}")
#: Compared with where the name is unknown, so that this costs what a known one costs.
_NOBODY: Final = secrets.token_bytes(32)


def make(name: str) -> str:
    """Make a new token of this name."""
    return f"s2s_{name}~{secrets.token_urlsafe(32)}"


def name_of(token: str) -> str | None:
    """Give the name in a token; ``None``: it is no token."""
    match = _TOKEN.fullmatch(token)
    return match and match[1]


def digest(token: str) -> bytes:
    """Give what is kept of a token."""
    return hashlib.sha256(token.encode("utf-8")).digest()


def is_of(token: str, kept: bytes | None) -> bool:
    """Whether a token is the one of which this is kept, in constant time.

    :param kept: ``None``: there is none of this name.
    """
    return secrets.compare_digest(digest(token), kept or _NOBODY)


def allows(has: Access, wants: Access) -> bool:
    """Whether one kind of access includes another."""
    return ACCESS.index(has) >= ACCESS.index(wants)
