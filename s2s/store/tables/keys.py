"""Table ``s2s_keys`` (docs/protocol.rst, "Keys"). Its trigger notifies channel ``s2s_keys`` of every change.

Who signs is decided by :class:`~s2s.protocol.signing.Keyring` alone, and by the database's clock, which dates the keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Final

from s2s.errors import NoSigningKey, OperatorError
from s2s.protocol.signing import ROLES, Key, Keyring, Role, decode_secret, random_secret
from s2s.store.driver import Cursor, lock_key
from s2s.store.kept_rows import check_written, refusal

CHANNEL: Final = "s2s_keys"
#: Held while the first key is made.
_LOCK: Final = lock_key("keys")
#: The end of the year 9999, in Unix seconds.
_LAST: Final = 253402300799.0


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

    @property
    def roles(self) -> list[Role]:
        """Whose messages it may sign."""
        return [role for role in ROLES if self.role in (role, "any")]

    def has_ended(self, now: float) -> bool:
        """Whether it will never be active again, unless somebody changes the row.

        :param now: Unix seconds.
        """
        return self.active_to is not None and self.active_to <= max(now, self.active_from)


@dataclass(frozen=True)
class KeyTable:
    """Every key, and when that was.

    :param now: what the database's clock showed, in Unix seconds.
    """

    rows: list[KeyRow]
    now: float

    def by_clock(self, now: float) -> list[KeyRow]:
        """Give the rows with their windows told by another clock.

        :param now: what that clock shows, in Unix seconds, after the rows have come: what had begun or ended when they
            were read has then begun or ended by that clock too.
        """
        # This order of terms lets no rounding move what is past into the future.
        return [
            replace(
                row,
                active_from=now + (row.active_from - self.now),
                active_to=None if row.active_to is None else now + (row.active_to - self.now),
            )
            for row in self.rows
        ]

    def row(self, key_id: str) -> KeyRow:
        """Find one key.

        :raises OperatorError: there is none of this name.
        """
        for row in self.rows:
            if row.key_id == key_id:
                return row
        raise OperatorError(f"there is no key {key_id!r}: see them with: s2s keys list")

    def signers(self, at: float | None = None) -> dict[Role, str]:
        """Say which key signs for each role; a role for which none can is left out.

        :param at: Unix seconds of the database's clock; when the table was read, if left out.
        """
        keyring, _ = make_keyring(self.rows)
        found: dict[Role, str] = {}
        for role in ROLES:
            try:
                found[role] = keyring.signer(role, self.now if at is None else at).key_id
            except NoSigningKey:
                continue
        return found


@dataclass(frozen=True)
class PublicKeyRow:
    """What may be shown of a key.

    :param status: what it does now, for people.
    """

    key_id: str
    role: str
    status: str
    active_from: datetime
    active_to: datetime | None
    is_default_tx: bool
    note: str
    created_at: datetime
    created_by: str


def make_keyring(rows: Iterable[KeyRow]) -> tuple[Keyring, dict[str, str]]:
    """Make a keyring of the table's rows.

    :returns: the keyring, and for every row that cannot be used its ``key_id`` and why.
    """
    usable, complaints = [], {}
    for row in rows:
        try:
            secret = decode_secret(row.key_b64)
        except ValueError as error:
            complaints[row.key_id] = str(error)
        else:
            usable.append(Key(row.key_id, secret, row.role, row.active_from, row.active_to, row.is_default_tx))
    return Keyring(usable), complaints


def read(txn: Cursor) -> KeyTable:
    """Read every key with its secret, and the database's clock."""
    txn.execute(
        "select key_id, key_b64, role, extract(epoch from active_from)::float8,"
        " extract(epoch from nullif(active_to, 'infinity'))::float8, is_default_tx from s2s.s2s_keys order by key_id"
    )
    rows = [KeyRow(*row) for row in txn]
    # After the rows, and not now(), which is when this transaction began: what they call now is then past.
    txn.execute("select extract(epoch from clock_timestamp())::float8")
    return KeyTable(rows, float((txn.fetchone() or ())[0]))


def list_public(txn: Cursor) -> list[PublicKeyRow]:
    """List the keys with what each does now, and without their secrets."""
    table = read(txn)
    status = _status(table)
    txn.execute(
        # Within the years that a datetime has; what is open stays null, which least and greatest would pass over.
        "select key_id, role, least(greatest(active_from, '0001-01-02'), '9999-12-30'),"
        " case when active_to < 'infinity' then least(greatest(active_to, '0001-01-02'), '9999-12-30') end,"
        " is_default_tx, note, created_at,"
        " created_by"
        " from s2s.s2s_keys where key_id = any(%s::text[]) order by created_at, key_id",
        (list(status),),
    )
    return [PublicKeyRow(key_id, role, status[key_id], *rest) for key_id, role, *rest in txn]


def _status(table: KeyTable) -> dict[str, str]:
    signers, (_, complaints) = table.signers(), make_keyring(table.rows)
    found = {}
    for row in table.rows:
        signs = [role for role in ROLES if signers.get(role) == row.key_id]
        until = "" if row.active_to is None else f" until {utc(row.active_to)}"
        if row.has_ended(table.now):
            found[row.key_id] = "ended"
        elif row.key_id in complaints:
            found[row.key_id] = f"unusable: {complaints[row.key_id]}"
        elif row.active_from > table.now:
            found[row.key_id] = "not yet"
        elif signs:
            found[row.key_id] = f"signs for {'both' if len(signs) > 1 else signs[0]}{until}"
        else:
            found[row.key_id] = f"retiring{until}" if until else "verifies"
    return found


def utc(seconds: float) -> str:
    """Write a moment for people; one that no calendar of ours reaches is its nearest."""
    return datetime.fromtimestamp(min(max(seconds, 0.0), _LAST), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def lock(txn: Cursor) -> None:
    """Let nobody else write to the table until this transaction ends; plain SQL waits too, and readers do not."""
    txn.execute("lock table s2s.s2s_keys in share row exclusive mode")


def prefer(txn: Cursor, key_ids: Collection[str]) -> None:
    """Make keys the defaults of their roles. Two statements: the index of defaults is checked row by row."""
    chosen = sorted(key_ids)
    txn.execute(
        "update s2s.s2s_keys set is_default_tx = false where is_default_tx and key_id <> all(%s)"
        " and role in (select role from s2s.s2s_keys where key_id = any(%s))",
        (chosen, chosen),
    )
    txn.execute("update s2s.s2s_keys set is_default_tx = true where key_id = any(%s) and not is_default_tx", (chosen,))
    # The table is locked, so that nobody else has changed it in between.
    txn.execute(
        "select from s2s.s2s_keys where is_default_tx <> (key_id = any(%s))"
        " and role in (select role from s2s.s2s_keys where key_id = any(%s))",
        (chosen, chosen),
    )
    if txn.rowcount:
        raise refusal(txn, "update", "s2s.s2s_keys")


def add(txn: Cursor, key_id: str, key_b64: str, role: str, note: str = "") -> None:
    """Add a key that verifies from now on. It signs only for a role for which no other key could.

    The caller has checked the values: a statement that fails is written to the database's log, secret and all.

    :param key_b64: at least 32 bytes, in base64.
    :raises OperatorError: there is a key of this name.
    """
    lock(txn)
    before = read(txn).signers()
    txn.execute(
        "insert into s2s.s2s_keys (key_id, key_b64, role, note) values (%s, %s, %s, %s) on conflict"
        " (key_id) do nothing",
        (key_id, key_b64, role, note),
    )
    if txn.rowcount == 0:
        txn.execute("select from s2s.s2s_keys where key_id = %s", (key_id,))
        check_written(txn, "insert", "s2s.s2s_keys")
        raise OperatorError(f"there is a key {key_id!r} already: choose another --key-id")
    # Without a default the newest key signs: whoever signed goes on, and where nobody did the new key begins.
    prefer(txn, {before.get(role, key_id) for role in read(txn).signers()})


def add_first_random(txn: Cursor) -> str | None:
    """Make one random key for either role, only where there is none at all. Two processes at once make one.

    :returns: its ``key_id``, or ``None``: there is a key already.
    """
    txn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    txn.execute("select from s2s.s2s_keys limit 1")
    if txn.rowcount:
        return None
    add(txn, "k1", random_secret(), "any", "made when the database was first used")
    return "k1"
