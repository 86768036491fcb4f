"""The declaration of a command handler."""

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
    """The handler of one command type: the schema of its payload, and the function that runs it."""

    cmd_type = Attribute("Its name: a lower-case letter, then up to 63 of a-z, 0-9, _ and .")
    schema = Attribute("The JSON Schema (2020-12) of its payload, as parsed JSON.")
    batched = Attribute("Whether run_batch is to be called instead of run.")

    def run(txn: Cursor, command: Command) -> None:  # noqa: N805 - an interface says how it is called
        """Run one command in the transaction that marks it as done. An exception undoes its work and causes a retry.

        The method runs in a thread. Its effects outside this database may happen more than once: recognize a repetition
        by ``command.idem_key``. It must not commit or roll back, since the transaction also contains the work of other
        commands; savepoints are allowed.
        """

    def run_batch(txn: Cursor, commands: Sequence[Command]) -> None:  # noqa: N805
        """Run many commands at once; called only if ``batched``. After an exception the commands are run one by one."""


@implementer(IPlugin, ICommandHandler)
class CommandHandler(ABC):
    """The handler of a command type whose commands are run one by one."""

    cmd_type: ClassVar[str]
    schema: ClassVar[Mapping[str, Any]]
    batched: ClassVar[bool] = False

    @abstractmethod
    def run(self, txn: Cursor, command: Command) -> None:
        """Run one command; see :meth:`ICommandHandler.run`."""

    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        """Run many commands, one by one."""
        for command in commands:
            self.run(txn, command)


class BatchCommandHandler(CommandHandler):
    """The handler of a command type that runs many commands in one statement."""

    batched: ClassVar[bool] = True

    def run(self, txn: Cursor, command: Command) -> None:
        """Run one command as a batch of one."""
        self.run_batch(txn, (command,))

    @abstractmethod
    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        """Run many commands; see :meth:`ICommandHandler.run_batch`."""


def registry(types: Iterable[CommandHandler]) -> dict[str, CommandHandler]:
    """Return the command handlers by type name.

    :raises OperatorError: a name is ill-formed or occurs twice.
    """
    return by_name(types, "command type", "cmd_type")
