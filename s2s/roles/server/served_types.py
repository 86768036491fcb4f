"""The command types that a server accepts: those that a server of its database serves or has served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from s2s.handlers.commands import CommandHandler
from s2s.protocol.catalogue.schema import Schema
from s2s.runtime.clock import Clock
from s2s.store.driver import Cursor
from s2s.store.pool import Database
from s2s.store.refresher import Refresher
from s2s.store.tables import command_types

#: Seconds between two reads for a type that nobody knows, which any engine can name, and for a NOTIFY.
UNKNOWN_GAP_S: Final = 1.0
NOTIFY_GAP_S: Final = 0.1


class ServedTypes:
    """The types of one process alone.

    :param served: its command types by name.
    :ivar schemas: by type, what a payload must satisfy.
    """

    def __init__(self, served: Mapping[str, CommandHandler]) -> None:
        self._own: Mapping[str, Schema] = {name: Schema(kind.schema) for name, kind in served.items()}
        self.schemas = self._own

    def read_now(self) -> Deferred[None]:
        """Look for types that became known meanwhile.

        :returns: fires when :attr:`schemas` has them, or fails with the :class:`s2s.errors.DatabaseError`.
        """
        return succeed(None)


class LiveServedTypes(ServedTypes):
    """The types of every server of a database, as their last starts have declared them.

    A server declares its own when it starts, and again what was removed since. Every server judges payloads by the
    schema declared last, its own type's too, so that all of them come to one verdict.

    :param known: the table, as it was read before the start.
    """

    log = Logger()

    def __init__(
        self, database: Database, clock: Clock, served: Mapping[str, CommandHandler], known: Mapping[str, str]
    ) -> None:
        super().__init__(served)
        own = texts(served)
        self._compiled: dict[str, tuple[str, Schema | None]] = {
            name: (text, self._own[name]) for name, text in own.items()
        }
        #: What is still to be declared: the database took no writes before the start.
        self._undeclared = {name: text for name, text in own.items() if known.get(name) != text}
        self._refresher = Refresher(database, clock, _declare_and_read, (self._undeclared, own), self._on_value)
        self.start, self.stop = self._refresher.start, self._refresher.stop
        self._use({**known, **own})

    def notify(self) -> None:
        """The table may have changed: read it soon."""
        self._refresher.notify(NOTIFY_GAP_S)

    def read_now(self) -> Deferred[None]:
        """Read the table, once a second at most."""
        return self._refresher.read_now(UNKNOWN_GAP_S)

    def _on_value(self, declared: Mapping[str, str]) -> None:
        self._undeclared.clear()
        self._use(declared)

    def _use(self, declared: Mapping[str, str]) -> None:
        schemas = dict(self._own)
        for name, text in declared.items():
            if self._compiled.get(name, ("", None))[0] != text:
                self._compiled[name] = (text, self._compile(name, text))
            schema = self._compiled[name][1]
            if schema is not None:
                schemas[name] = schema
        self._compiled = {name: each for name, each in self._compiled.items() if name in declared}
        self.schemas = schemas

    def _compile(self, name: str, text: str) -> Schema | None:
        try:
            return Schema(json.loads(text))
        except Exception as error:  # of either library, or the row was changed by hand
            self.log.error(
                "the schema of {cmd_type} in command_types cannot be used: {why}",
                cmd_type=name,
                why=type(error).__name__,
            )
            return None


def texts(served: Mapping[str, CommandHandler]) -> dict[str, str]:
    """Return the schemas of command types as JSON's text."""
    return {name: json.dumps(dict(kind.schema), sort_keys=True) for name, kind in served.items()}


def _declare_and_read(txn: Cursor, undeclared: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    command_types.declare(txn, {**undeclared, **{name: own[name] for name in command_types.missing(txn, own)}})
    return command_types.read(txn)
