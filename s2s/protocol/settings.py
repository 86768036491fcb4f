"""The settings: the initial rows of the table ``config`` (docs/protocol.rst, "Configuration").

To add a setting, add an entry to :data:`SETTINGS`; ``s2s db migrate`` inserts it into the table. The code that uses a
setting reads it from :class:`s2s.roles.live_config.LiveConfig`, which reports every change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from s2s.errors import OperatorError

Value = str | int | bool


@dataclass(frozen=True)
class Setting:
    """One setting.

    :param key: a lower-case letter, then up to 63 of a-z, 0-9, _ and ``.``
    :param least: the minimum value of an integer, or the minimum length of a string.
    :param most: the maximum of the same.
    """

    key: str
    default: Value
    description: str
    least: int | None = None
    most: int | None = None

    @property
    def type(self) -> str:
        """``string``, ``integer`` or ``boolean``."""
        return {str: "string", int: "integer", bool: "boolean"}[type(self.default)]

    @property
    def number(self) -> int:
        """The default of an integer setting."""
        assert type(self.default) is int, self.key
        return self.default


SETTINGS: Final = (
    Setting("server.sweep_interval_s", 10, "seconds between two sweeps of the broadcasts", 1, 3600),
    Setting("executor.batch_size", 256, "commands that a worker runs in one transaction at most", 1, 4096),
    Setting("commands.keep_days", 7, "days after which finished and cancelled commands are removed", 0, 3650),
    Setting("commands.keep_dead_days", 90, "days after which dead commands are removed", 0, 3650),
    Setting("commands.keep_key_days", 30, "days that an idem_key outlives its command's row", 1, 3650),
    Setting("relay.window", 512, "commands that an engine has in flight at most", 1, 1024),
    Setting("link.window", 1024, "requests that a side keeps unanswered on a link at most", 1, 1024),
    Setting("link.window_kib", 4096, "KiB of frames that a side keeps unanswered on a link at most", 64, 4096),
    Setting("link.call_s", 3, "seconds until a request without an answer has failed", 1, 30),
    Setting("link.fresh_s", 300, "seconds that a request's ts may be off; a wider one opens second by second", 5, 900),
    Setting("link.idle_s", 10, "seconds of silence after which the peer is asked for its health", 1, 30),
    Setting("link.check_s", 3, "seconds until a health check counts as missed", 1, 30),
    Setting("link.misses", 3, "missed health checks in a row after which a link is cut", 1, 10),
)

BY_KEY: Final = {setting.key: setting for setting in SETTINGS}


def check_setting(setting: Setting) -> None:
    """Refuse a declaration whose default is no value of the setting.

    :raises OperatorError: the type of the default is another, or the default is beyond a bound.
    """
    default = setting.default
    if type(default) not in (str, int, bool):
        raise OperatorError(f"its default is a {type(default).__name__}: write a string, an integer or a boolean")
    if type(default) is bool and (setting.least, setting.most) != (None, None):
        raise OperatorError("it is a boolean and has bounds: leave them out")
    size = 0 if type(default) is bool else default if type(default) is int else len(str(default))
    if not (setting.least or size) <= size <= (size if setting.most is None else setting.most):
        of = "the length of its default" if type(default) is str else "its default"
        raise OperatorError(f"{of} is not from {setting.least} to {setting.most}")


def read_as(kind: str, text: str) -> Value | None:
    """Convert a text that a person typed to a value.

    :param kind: ``string``, ``integer`` or ``boolean``.
    :returns: ``None`` if the text is not of that kind.
    """
    if kind == "string":
        return text
    if kind == "boolean" and text in ("true", "false"):
        return text == "true"
    if kind == "integer" and text.removeprefix("-").isdecimal() and text.isascii() and len(text) <= 17:
        return int(text)
    return None


def number(key: str) -> int:
    """Return the default of an integer setting."""
    return BY_KEY[key].number


def value(values: Mapping[str, Value], key: str) -> Value:
    """Return a setting's value, or its default if the table ``config`` has no row for it.

    :param values: the rows of the table, by key.
    :raises KeyError: there is no such setting.
    """
    return values[key] if key in values else BY_KEY[key].default
