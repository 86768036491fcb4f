"""Table ``s2s_keys`` (docs/protocol.rst, "Keys"). Its trigger notifies channel ``s2s_keys`` of every change.

Only :class:`~s2s.protocol.signing.Keyring` decides which key signs, by the database's clock, which dates the keys.
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
#: The advisory lock that is held while the first key is made.
_LOCK: Final = lock_key("keys")
#: The end of the year 9999, in Unix seconds.
_LAST: Final = 253402300799.0


@dataclass(frozen=True)
class KeyRow:
    """A key as stored in the table.

    :param active_from: Unix seconds.
    :param active_to: Unix seconds; ``None``: it has no end.
    """

    key_id: str
    key_b64: str = field(repr=False)
    role: str
    active_from: float
    active_to: float | None
    is_default_tx: bool

    @property
    def roles(self) -> list[Role]:
        """The roles whose messages it may sign."""
        return [role for role in ROLES if self.role in (role, "any")]

    def has_ended(self, now: float) -> bool:
        """Return whether it will never be active again, unless the row is changed.

        :param now: Unix seconds.
        """
        return self.active_to is not None and self.active_to <= max(now, self.active_from)


@dataclass(frozen=True)
class KeyTable:
    """Every key, and the time of the read.

    :param now: the time of the database's clock at the read, in Unix seconds.
    """

    rows: list[KeyRow]
    now: float

    def by_clock(self, now: float) -> list[KeyRow]:
        """Return the rows with their times converted to another clock.

        :param now: the time of that clock after the rows have arrived, in Unix seconds. A key that had become active or
            ended at the read has then done so by that clock too.
        """
        # With this order of terms, rounding cannot move a past time into the future.
        return [
            replace(
                row,
                active_from=now + (row.active_from - self.now),
                active_to=None if row.active_to is None else now + (row.active_to - self.now),
            )
            for row in self.rows
        ]

    def row(self, key_id: str) -> KeyRow:
        """Return one key.

        :raises OperatorError: there is no key of this name.
        """
        for row in self.rows:
            if row.key_id == key_id:
                return row
        raise OperatorError(f"there is no key {key_id!r}: see them with: s2s keys list")

    def signers(self, at: float | None = None) -> dict[Role, str]:
        """Return the key that signs for each role; a role for which no key can sign is left out.

        :param at: Unix seconds of the database's clock; ``None``: the time of the read.
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
    """A key as it is shown to operators, without its secret.

    :param status: a description of its current use.
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
    """Make a keyring from the table's rows.

    :returns: the keyring, and the reason for each row that cannot be used, by its ``key_id``.
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
    """Return every key with its secret, and the time of the database's clock."""
    txn.execute(
        "select key_id, key_b64, role, extract(epoch from active_from)::float8,"
        " extract(epoch from nullif(active_to, 'infinity'))::float8, is_default_tx from s2s.s2s_keys order by key_id"
    )
    rows = [KeyRow(*row) for row in txn]
    # Read after the rows, and not with now(), which is the start of this transaction: a key that a row dates with the
    # current time is then active.
    txn.execute("select extract(epoch from clock_timestamp())::float8")
    return KeyTable(rows, float((txn.fetchone() or ())[0]))


def list_public(txn: Cursor) -> list[PublicKeyRow]:
    """Return the keys with their current use, without their secrets."""
    table = read(txn)
    status = _status(table)
    txn.execute(
        # Times are cut to the years of datetime. An open end stays null; least and greatest would ignore the null.
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
    """Format a time for people; a time before 1970 or after 9999 is replaced by the nearest limit."""
    return datetime.fromtimestamp(min(max(seconds, 0.0), _LAST), timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def lock(txn: Cursor) -> None:
    """Lock the table against other writers, including plain SQL, until this transaction ends; readers do not wait."""
    txn.execute("lock table s2s.s2s_keys in share row exclusive mode")


def prefer(txn: Cursor, key_ids: Collection[str]) -> None:
    """Make keys the defaults of their roles. In two statements, because the unique index is checked row by row."""
    chosen = sorted(key_ids)
    txn.execute(
        "update s2s.s2s_keys set is_default_tx = false where is_default_tx and key_id <> all(%s)"
        " and role in (select role from s2s.s2s_keys where key_id = any(%s))",
        (chosen, chosen),
    )
    txn.execute("update s2s.s2s_keys set is_default_tx = true where key_id = any(%s) and not is_default_tx", (chosen,))
    # The table is locked, so no other session has changed it meanwhile.
    txn.execute(
        "select from s2s.s2s_keys where is_default_tx <> (key_id = any(%s))"
        " and role in (select role from s2s.s2s_keys where key_id = any(%s))",
        (chosen, chosen),
    )
    if txn.rowcount:
        raise refusal(txn, "update", "s2s.s2s_keys")


def add(txn: Cursor, key_id: str, key_b64: str, role: str, note: str = "") -> None:
    """Add a key that verifies from now on. It signs only for a role for which no other key can sign.

    The caller must have checked the values, because the database logs a failed statement with the secret.

    :param key_b64: at least 32 bytes, in base64.
    :raises OperatorError: a key of this name exists.
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
    # Without a default the newest key would sign. The previous signer stays; the new key signs if there was no signer.
    prefer(txn, {before.get(role, key_id) for role in read(txn).signers()})


def add_first_random(txn: Cursor) -> str | None:
    """Make one random key for either role if the table has no key. Two processes at once make only one.

    :returns: its ``key_id``; ``None``: a key exists already.
    """
    txn.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))
    txn.execute("select from s2s.s2s_keys limit 1")
    if txn.rowcount:
        return None
    add(txn, "k1", random_secret(), "any", "made when the database was first used")
    return "k1"
