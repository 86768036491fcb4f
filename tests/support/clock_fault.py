"""The database's clock is ahead for a while, as its rows show it afterwards.

No test can set a real clock. From :func:`begin` to :func:`end` triggers date what is written as a clock would that is
ahead. A time that a user has chosen stays. For the readers the clock is right already, so every such row waits, as it
does once the real clock is right again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

#: What dates each table, in PL/pgSQL. What is pulled back is left as it is.
_DATED: Final = {
    "commands": (
        "insert",
        "if new.due_at = new.created_at then new.due_at := new.due_at + ahead; end if;"
        " new.created_at := new.created_at + ahead;",
    ),
    "orders": ("insert", "new.created_at := new.created_at + ahead; new.stepped_at := new.stepped_at + ahead;"),
    "outbox": (
        "insert or update of send_at",
        "if tg_op = 'INSERT' or new.send_at > now() then new.send_at := new.send_at + ahead; end if;",
    ),
    "jobs": (
        "insert or update of due_at",
        "if tg_op = 'INSERT' or new.due_at > old.due_at then new.due_at := new.due_at + ahead; end if;",
    ),
    "s2s_keys": (
        "insert",
        "if new.active_from = new.created_at then new.active_from := new.active_from + ahead; end if;"
        " new.created_at := new.created_at + ahead;",
    ),
}


def begin(execute: Callable[[str], Any], ahead: str = "2 hours") -> None:
    """Let the clock be ahead.

    :param execute: runs a statement in a transaction of its own: locks of several tables at once could be a deadlock.
    :param ahead: an interval, in SQL.
    """
    for table, (event, dating) in _DATED.items():
        execute(
            f"create or replace function clock_ahead_{table}() returns trigger language plpgsql"
            f" set search_path from current as $$ declare ahead interval := '{ahead}';"
            f" begin {dating} return new; end $$"
        )
        execute(
            f"create trigger clock_ahead before {event} on {table} for each row execute function clock_ahead_{table}()"
        )


def end(execute: Callable[[str], Any]) -> None:
    """Let the clock be right again."""
    for table in _DATED:
        execute(f"drop trigger clock_ahead on {table}")
