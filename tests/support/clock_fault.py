"""Simulate a database whose clock was ahead for a while, by the times in its rows.

A test cannot set the real clock. From :func:`begin` to :func:`end`, triggers add the lead of the clock to the times of
the rows that are written. A time that a user has chosen stays. Readers use the correct clock, so every such row waits,
as it would after a real clock was corrected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

#: The event and the PL/pgSQL code of each table's trigger. A time that is set to the past stays as it is.
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
    """Begin to write times that are ahead.

    :param execute: runs a statement in a transaction of its own: locks on several tables at once could deadlock.
    :param ahead: the lead of the clock, as an SQL interval.
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
    """Write correct times again."""
    for table in _DATED:
        execute(f"drop trigger clock_ahead on {table}")
