"""The declaration of a command type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from twisted.plugin import IPlugin
from zope.interface import Attribute, Interface, implementer

from s2s.protocol.names import by_name
from s2s.store.driver import Cursor
from s2s.store.tables.commands import Command


class ICommandHandler(Interface):  # type: ignore[misc]
    """One kind of command: how its payload looks and what it does."""

    cmd_type = Attribute("Its name: a lower-case letter, then up to 63 of a-z, 0-9, _ and .")
    schema = Attribute("The JSON Schema (2020-12) of its payload, as parsed JSON.")
    batched = Attribute("Whether run_batch is to be called instead of run.")

    def run(txn: Cursor, command: Command) -> None:  # noqa: N805 - an interface says how it is called
        """Do one command's work in the transaction that marks it as done; raise to have all of it undone and retried.

        It runs in a thread. What it does outside this database may happen more than once: ``command.idem_key`` is for
        telling. It never commits or rolls back, since others' work is in the same transaction; savepoints are fine.
        """

    def run_batch(txn: Cursor, commands: Sequence[Command]) -> None:  # noqa: N805
        """Do many commands' work at once; only where ``batched``. If it raises, they are run one by one."""


@implementer(IPlugin, ICommandHandler)
class CommandHandler(ABC):
    """A command type whose commands are run one by one."""

    cmd_type: ClassVar[str]
    schema: ClassVar[Mapping[str, Any]]
    batched: ClassVar[bool] = False

    @abstractmethod
    def run(self, txn: Cursor, command: Command) -> None:
        """Do one command's work; see :meth:`ICommandHandler.run`."""

    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        """Do many commands' work."""
        for command in commands:
            self.run(txn, command)


class BatchCommandHandler(CommandHandler):
    """A command type that does many commands' work in one statement."""

    batched: ClassVar[bool] = True

    def run(self, txn: Cursor, command: Command) -> None:
        """Do one command's work, as a batch of one."""
        self.run_batch(txn, (command,))

    @abstractmethod
    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        """Do many commands' work; see :meth:`ICommandHandler.run_batch`."""


def registry(types: Iterable[CommandHandler]) -> dict[str, CommandHandler]:
    """Key command types by their name.

    :raises OperatorError: a name is ill-formed or stands twice.
    """
    return by_name(types, "command type", "cmd_type")
