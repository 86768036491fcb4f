"""Command types whose handlers misbehave; their leftovers and locks must not affect any other command."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from s2s.handlers.commands import Command, CommandHandler
from s2s.store.driver import Cursor

#: A handler's time limit in a campaign, and the hanging handler's sleep, in seconds: longer than the limit plus the 5 s
#: of cancelling its SQL, so that its thread is stuck for a while.
TIMEOUT_S: Final = 4
HANGS_S: Final = 11.0
#: Statements by which the dirty handler changes its session.
_LEFT: Final = (
    "set search_path = nowhere, public",
    "set datestyle = 'SQL, DMY'",
    "set array_nulls = off",
    "set statement_timeout = 1000",
    "select pg_advisory_lock(1)",
    "listen s2s_nothing",
    "prepare dirty as select 1",
    "declare dirty cursor with hold for select 1",
    "create temp table commands (cmd_id bigint)",
    "set session characteristics as transaction read only",
    "set role faults_role",
)


class _Publishes(CommandHandler):
    """A command type whose effect is a notice with its key as the text."""

    schema: ClassVar[Mapping[str, Any]] = {"type": "object"}

    def _publish(self, txn: Cursor, command: Command) -> None:
        txn.execute(
            "insert into s2s.notices (cmd_id, scope, message, severity) values (%s, 'global', %s, 'info')",
            (command.cmd_id, command.idem_key),
        )


class Hanging(_Publishes):
    """Does not return for :data:`HANGS_S` in its first attempt."""

    cmd_type = "faults.hanging"

    def run(self, txn: Cursor, command: Command) -> None:
        """Publish, after a sleep in the first attempt."""
        if command.attempts == 0:
            time.sleep(HANGS_S)
        self._publish(txn, command)


class Holding(_Publishes):
    """Holds the interpreter lock in its first attempt: no other thread of its process runs any more."""

    cmd_type = "faults.holding"

    def run(self, txn: Cursor, command: Command) -> None:
        """Publish; in the first attempt, hold the interpreter lock for ever."""
        if command.attempts == 0:
            re.match("(a+)+$", "a" * 64 + "!")
        self._publish(txn, command)


class Dirty(_Publishes):
    """Changes the state of its session by the statements of :data:`_LEFT`."""

    cmd_type = "faults.dirty"

    def run(self, txn: Cursor, command: Command) -> None:
        """Publish, and change the state of the session."""
        self._publish(txn, command)
        for statement in _LEFT:
            txn.execute(statement)


hanging = Hanging()
holding = Holding()
dirty = Dirty()
