"""Table ``s2s_keys`` (docs/protocol.rst, "Keys"). Its trigger notifies channel ``s2s_keys`` of every change."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from s2s.errors import OperatorError
from s2s.signing import random_secret
from s2s.store.driver import Cursor
from s2s.store.migrations import LOCK

CHANNEL: Final = "s2s_keys"


@dataclass(frozen=True)
class KeyRow:
    """A key as the table has it.

    :param active_from: Unix seconds.
    :param active_to: Unix seconds, or ``None`` while open.
    """

    key_id: str
    key_b64: str = field(repr=False)
    role: str
    active_from: float
    active_to: float | None
    is_default_tx: bool


@dataclass(frozen=True)
class PublicKeyRow:
    """What may be shown of a key."""

    key_id: str
    role: str
    active_from: datetime
    active_to: datetime | None
    is_default_tx: bool
    note: str
    created_at: datetime
    created_by: str


def read(txn: Cursor) -> list[KeyRow]:
    """Read every key with its secret."""
    txn.execute(
        "select key_id, key_b64, role, extract(epoch from active_from)::float8, extract(epoch from active_to)::float8,"
        " is_default_tx from s2s_keys order by key_id"
    )
    return [KeyRow(*row) for row in txn]


def clock(txn: Cursor) -> float:
    """Give the database's time in Unix seconds: ``active_from`` and ``active_to`` are written by it."""
    txn.execute("select extract(epoch from clock_timestamp())::float8")
    return float((txn.fetchone() or ())[0])


def list_public(txn: Cursor) -> list[PublicKeyRow]:
    """List the keys; the secrets stay in the database."""
    txn.execute(
        "select key_id, role, active_from, active_to, is_default_tx, note, created_at, created_by"
        " from s2s_keys order by created_at, key_id"
    )
    return [PublicKeyRow(*row) for row in txn]


def add(txn: Cursor, key_id: str, key_b64: str, role: str, note: str = "") -> None:
    """Add a key that verifies from now on. It signs only where no other key was chosen to before.

    The caller has checked the values: a statement that fails is written to the database's log, secret and all.

    :param key_b64: at least 32 bytes, in base64.
    :raises OperatorError: there is a key of this name.
    """
    txn.execute(
        "insert into s2s_keys (key_id, key_b64, role, note, is_default_tx) values (%s, %s, %s, %s,"
        # Without a default the newest key signs, and a key that was only added would sign at once.
        " not exists (select from s2s_keys where is_default_tx and role in (%s, 'any')))"
        " on conflict (key_id) do nothing",
        (key_id, key_b64, role, note, role),
    )
    if txn.rowcount == 0:
        raise OperatorError(f"there is a key {key_id!r} already: choose another --key-id")


def add_first_random(txn: Cursor) -> str | None:
    """Make one random key for either role, only where there is none at all. Two processes at once make one.

    :returns: its ``key_id``, or ``None``: there is a key already.
    """
    txn.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
    txn.execute("select from s2s_keys limit 1")
    if txn.rowcount:
        return None
    add(txn, "k1", random_secret(), "any", "made when the database was first used")
    return "k1"
