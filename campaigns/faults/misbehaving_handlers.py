"""Command types whose handlers misbehave: what they leave or hold may touch no other command."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from s2s.handlers.commands import Command, CommandHandler
from s2s.store.driver import Cursor

#: Seconds that a handler may take in a campaign, and that the hanging one takes: longer than that and the 5 s in which
#: its SQL is cancelled, so that its thread is stuck for a while.
TIMEOUT_S: Final = 4
HANGS_S: Final = 11.0
#: What the dirty one leaves on its session.
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
    """A type whose effect is a notice with the text of its key."""

    schema: ClassVar[Mapping[str, Any]] = {"type": "object"}

    def _publish(self, txn: Cursor, command: Command) -> None:
        txn.execute(
            "insert into s2s.notices (cmd_id, scope, message, severity) values (%s, 'global', %s, 'info')",
            (command.cmd_id, command.idem_key),
        )


class Hanging(_Publishes):
    """Does not return for a while, at its first attempt."""

    cmd_type = "faults.hanging"

    def run(self, txn: Cursor, command: Command) -> None:
        """Hang, or publish."""
        if command.attempts == 0:
            time.sleep(HANGS_S)
        self._publish(txn, command)


class Holding(_Publishes):
    """Holds the interpreter at its first attempt: no other thread of its process runs any more."""

    cmd_type = "faults.holding"

    def run(self, txn: Cursor, command: Command) -> None:
        """Hold it for ever, or publish."""
        if command.attempts == 0:
            re.match("(a+)+$", "a" * 64 + "!")
        self._publish(txn, command)


class Dirty(_Publishes):
    """Leaves everything behind that it can."""

    cmd_type = "faults.dirty"

    def run(self, txn: Cursor, command: Command) -> None:
        """Publish, and make a mess."""
        self._publish(txn, command)
        for statement in _LEFT:
            txn.execute(statement)


hanging = Hanging()
holding = Holding()
dirty = Dirty()
