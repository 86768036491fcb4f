"""The settings (docs/protocol.rst, "Configuration")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from s2s.admin.operations.operation import MOST_BODY_BYTES, Operation, OperationRequest, members, once
from s2s.admin.operations.pages import KEY, Page, in_stretches, keyed, listing
from s2s.errors import NotFound, harmless
from s2s.handlers.orders.config_set import ConfigSet, set_value
from s2s.protocol.settings import Value
from s2s.store.driver import Cursor
from s2s.store.tables import config, engines
from s2s.store.tables.config import Change, ConfigRow

#: The schemas of the members of the order that sets a setting, which are used here too.
_MEMBERS: Final = ConfigSet.schema["properties"]
_WHERE: Final = {"key": _MEMBERS["key"]}


@dataclass(frozen=True)
class SettingChange:
    """A setting after a request to set it.

    :param version: the current version of the configuration.
    :param changed: ``False``: the setting had this value already.
    :param hint: the linked engines that the value does not reach, because they do not share this database.
    """

    key: str
    value: Value
    version: int
    changed: bool
    hint: str | None = None


#: The number of engines that a hint names.
_NAMED: Final = 10
#: The prefixes of the settings that only servers use.
_OF_SERVERS: Final = ("server.", "executor.", "commands.")


def _show(txn: Cursor, ask: OperationRequest) -> ConfigRow:
    key = ask.path_params["key"]
    for row in config.list_settings(txn):
        if row.key == key:
            return row
    raise NotFound(f"there is no setting {key!r}")


def _set(txn: Cursor, ask: OperationRequest) -> SettingChange:
    _show(txn, ask)  # raises NotFound, because the key is part of the path and not of the body
    key = ask.path_params["key"]
    return SettingChange(**set_value(txn, key, ask.body["value"], ask.actor, "/body"), hint=_unreached(txn, key))


def _unreached(txn: Cursor, key: str) -> str | None:
    if key.startswith(_OF_SERVERS):
        return None
    names = list(map(harmless, engines.strangers(txn)))
    if not names:
        return None
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"the setting does not reach linked engines that do not share this database: {', '.join(names[:_NAMED])}{more}:"
        " set it where the engine's own database is"
    )


LIST: Final[Operation[Page[ConfigRow]]] = listing(
    "list_config",
    "/v1/config",
    "List the settings with their bounds",
    ConfigRow,
    keyed(config.list_settings, lambda row: row.key),
    cursor=KEY,
)
HISTORY: Final[Operation[Page[Change]]] = listing(
    "list_config_history",
    "/v1/config/history",
    "List the changes of settings, the newest first",
    Change,
    in_stretches(config.HISTORY),
    filters={"key": {"type": "string", "maxLength": 200, "description": "Only changes of this setting."}},
)
SHOW: Final = Operation(
    "show_config", "GET", "/v1/config/{key}", "observer", "Show one setting", ConfigRow, once(_show),
    path_params=_WHERE, refusals=(NotFound,),
)  # fmt: skip
SET: Final = Operation(
    "set_config",
    "PUT",
    "/v1/config/{key}",
    "admin",
    "Set a setting; every process uses the new value at once",
    SettingChange,
    once(_set),
    path_params=_WHERE,
    body=members({"value": _MEMBERS["value"]}, "value"),
    body_bytes=MOST_BODY_BYTES,
    refusals=(NotFound,),
)

OPERATIONS: Final[tuple[Operation[Any], ...]] = (LIST, HISTORY, SHOW, SET)
