"""Table ``api_tokens`` (docs/api.rst, "Tokens"). Its triggers notify channel ``s2s_tokens`` and write the audit."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from s2s.errors import OperatorError
from s2s.store.access import Access, digest, make
from s2s.store.driver import Cursor
from s2s.store.kept_rows import check_written, refusal

CHANNEL: Final = "s2s_tokens"


@dataclass(frozen=True)
class TokenRow:
    """A token as it is compared with the token of a request.

    :param token_sha256: the SHA-256 of the token, which itself is not stored.
    :param left_s: seconds for which it is valid after the read; ``None``: it does not expire.
    """

    name: str
    role: Access
    token_sha256: bytes = field(repr=False)
    left_s: float | None


@dataclass(frozen=True)
class PublicTokenRow:
    """A token as it is shown to operators.

    :param is_expired: whether it has expired, by the database's clock.
    """

    name: str
    role: Access
    note: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    is_expired: bool


def read(txn: Cursor) -> list[TokenRow]:
    """Return every valid token."""
    txn.execute(
        "select name, role, token_sha256, extract(epoch from expires_at - clock_timestamp())::float8 from"
        " s2s.api_tokens"
        " where expires_at is null or expires_at > clock_timestamp()"
    )
    return [TokenRow(name, role, bytes(kept), left_s) for name, role, kept, left_s in txn]


def list_public(txn: Cursor) -> list[PublicTokenRow]:
    """Return the tokens in the order of their names."""
    txn.execute(
        "select name, role, note, created_at, created_by, expires_at, coalesce(expires_at <= now(), false)"
        " from s2s.api_tokens order by name"
    )
    return [PublicTokenRow(*row) for row in txn]


def add(txn: Cursor, name: str, role: Access, note: str = "", days: int | None = None) -> str:
    """Create a token.

    :param name: a name that matches :data:`s2s.store.access.NAME`.
    :param days: the days until it expires; ``None``: it does not expire.
    :returns: the token, which is stored nowhere.
    :raises OperatorError: a token of this name exists.
    """
    token = make(name)
    txn.execute(
        "insert into s2s.api_tokens (name, role, token_sha256, note, expires_at)"
        " values (%s, %s, %s, %s, now() + make_interval(days => %s)) on conflict do nothing",
        (name, role, digest(token), note, days),
    )
    if txn.rowcount == 0:
        txn.execute("select from s2s.api_tokens where name = %s", (name,))
        check_written(txn, "insert", "s2s.api_tokens")
        raise OperatorError(f"there is a token {name!r} already: choose another name, or s2s tokens revoke {name}")
    return token


def revoke(txn: Cursor, name: str) -> bool:
    """Remove a token.

    :returns: whether there was a token of this name.
    """
    txn.execute("delete from s2s.api_tokens where name = %s", (name,))
    is_gone = txn.rowcount > 0
    if not is_gone:
        txn.execute("select from s2s.api_tokens where name = %s", (name,))
        if txn.rowcount:
            raise refusal(txn, "delete", "s2s.api_tokens")
    return is_gone
