"""Tables ``config`` and ``config_history`` (docs/protocol.rst, "Configuration").

The triggers of the tables check types and bounds, count the version and write the history, also for plain SQL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from psycopg2.extras import Json

from s2s.errors import OperatorError, SchemaError, StatementRefused
from s2s.protocol.settings import Setting, Value
from s2s.store import driver
from s2s.store.driver import Cursor
from s2s.store.kept_rows import check_written, note
from s2s.store.tables.lists import Listed

CHANNEL: Final = "s2s_config"


@dataclass(frozen=True)
class Snapshot:
    """The whole configuration at one version."""

    version: int
    values: Mapping[str, Value]


@dataclass(frozen=True)
class ConfigRow:
    """A setting as it is shown to operators.

    :param version: the version of its last change; 0: never changed.
    """

    key: str
    value: Value
    type: str
    min: int | None
    max: int | None
    description: str
    version: int


@dataclass(frozen=True)
class Change:
    """One change of a setting, which is one version of the configuration."""

    version: int
    key: str
    old_value: Value
    new_value: Value
    actor: str
    changed_at: datetime


#: The version, for use if the row of ``config_version`` is missing.
_VERSION: Final = "select coalesce(max(version), 0) from s2s.config_history"


def declare(txn: Cursor, settings: Collection[Setting]) -> None:
    """Insert settings; values that exist already stay.

    The row of ``config_version`` is created again if a partial restore or a TRUNCATE has removed it.
    """
    txn.execute("select set_config('s2s.action', 'config.declare', true)")
    for setting in settings:
        txn.execute(
            "insert into s2s.config (key, value, type, min, max, description) values (%s, %s, %s, %s, %s, %s)"
            " on conflict (key) do update"
            " set min = excluded.min, max = excluded.max, description = excluded.description"
            " where (config.min, config.max, config.description)"
            " is distinct from (excluded.min, excluded.max, excluded.description)",
            (setting.key, Json(setting.default), setting.type, setting.least, setting.most, setting.description),
        )
    txn.execute(f"insert into s2s.config_version (version) {_VERSION} on conflict do nothing")
    if driver.missing(txn, "s2s.config", "key", [setting.key for setting in settings]):
        note(txn, "insert or update", "s2s.config")


def read(txn: Cursor) -> Snapshot:
    """Return the version and the values, read by one statement and so in one snapshot."""
    txn.execute(
        f"select coalesce(v.version, ({_VERSION})), c.key, c.value"  # noqa: S608 - a constant
        " from (select) as one left join s2s.config_version v on true left join s2s.config c on true"
    )
    rows = txn.fetchall()
    return Snapshot(rows[0][0], {key: value for _, key, value in rows if key is not None})


def exists(txn: Cursor, key: str) -> bool:
    """Return whether there is a setting with this key."""
    txn.execute("select from s2s.config where key = %s", (key,))
    return txn.rowcount > 0


def list_settings(txn: Cursor) -> list[ConfigRow]:
    """Return every setting, in the order of the keys."""
    txn.execute("select key, value, type, min, max, description, version from s2s.config order by key")
    return [ConfigRow(*row) for row in txn]


#: The list of changes, with a filter by ``key``.
HISTORY: Final = Listed(Change, "s2s.config_history", "version", indexed=("key",))


def change(txn: Cursor, key: str, value: Value, actor: str) -> int | None:
    """Set the value of a setting.

    :param actor: the actor, for the history.
    :returns: the new version; ``None``: the setting had this value already.
    :raises OperatorError: there is no such setting, or it cannot have this value; nothing has changed.
    :raises SchemaError: the triggers of the table do not fire, so no process would be notified.
    """
    txn.execute("select value, version from s2s.config where key = %s for update", (key,))
    found = txn.fetchone()
    if found is None:
        raise OperatorError(f"there is no setting {key!r}: see them with: s2s config list")
    if type(found[0]) is type(value) and found[0] == value:
        return None
    try:
        with driver.refusable(txn):
            txn.execute("select set_config('s2s.actor', %s, true)", (actor,))
            txn.execute("update s2s.config set value = %s where key = %s returning version", (Json(value), key))
            check_written(txn, "update", "s2s.config")
            ((version,),) = txn.fetchall()
    except StatementRefused as refused:
        raise OperatorError(str(refused)) from None
    if version == found[1]:
        raise SchemaError("the triggers of the table s2s.config do not fire: see s2s db status")
    return int(version)
