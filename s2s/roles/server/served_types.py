"""The command types that a server accepts: those that any server of its database serves or has served."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from s2s.errors import OperatorError, one_line
from s2s.handlers.commands import CommandHandler
from s2s.protocol.catalogue.schema import Schema
from s2s.protocol.catalogue.vet import MAX_SIZE
from s2s.runtime import own_threads
from s2s.runtime.clock import Clock
from s2s.store.driver import Cursor
from s2s.store.pool import Database
from s2s.store.refresher import Refresher
from s2s.store.tables import command_types

#: The shortest time in seconds between two reads of the table: for an unknown type, which any engine can name, and for
#: a NOTIFY.
UNKNOWN_GAP_S: Final = 1.0
NOTIFY_GAP_S: Final = 0.1
#: The largest number of looked-up types that each read includes: as many as pushes can wait for.
MOST_WANTED: Final = 1024


class ServedTypes:
    """The command types of this process alone.

    :param served: the command handlers of this process by type name.
    :ivar schemas: the schema of the payload by type.
    :ivar unusable: declared types whose schema this server cannot use.
    """

    def __init__(self, served: Mapping[str, CommandHandler]) -> None:
        self._own: Mapping[str, Schema] = {name: Schema(kind.schema) for name, kind in served.items()}
        self.schemas = self._own
        self.unusable: Collection[str] = ()

    def read_now(self, cmd_type: str) -> Deferred[None]:
        """Read the types that were declared meanwhile.

        :param cmd_type: a type that must be read if it is declared.
        :returns: fires when :attr:`schemas` contains them, or fails with the :class:`s2s.errors.DatabaseError`.
        """
        return succeed(None)


class LiveServedTypes(ServedTypes):
    """The command types of all servers of a database, as declared at the last start of each server.

    A server declares its own types when it starts, and again if their rows are removed. Every server checks payloads by
    the schema declared last, also for its own types, so that all servers accept the same payloads.

    :param known: the content of the table before the start.
    """

    log = Logger()

    def __init__(
        self, database: Database, clock: Clock, served: Mapping[str, CommandHandler], known: Mapping[str, str]
    ) -> None:
        super().__init__(served)
        self._reactor = database.reactor
        self._own_texts = own = texts(served)
        self._compiled: dict[str, tuple[str, Schema | None]] = {
            name: (text, self._own[name]) for name, text in own.items()
        }
        #: The types still to be declared, because the database accepted no writes before the start.
        self._undeclared = {name: text for name, text in own.items() if known.get(name) != text}
        #: The types that were looked up, the oldest first. Without this list a read might leave them out by its limit.
        self._wanted: dict[str, None] = {}
        #: The schemas of this server's types that another server declared and that were logged.
        self._told: dict[str, str] = {}
        self._is_stopped = False
        args = (self._undeclared, own, self._wanted)
        self._refresher = Refresher(database, clock, _declare_and_read, args, self._on_value)
        self.start = self._refresher.start
        first = {**known, **own}
        self._use(first, self._compile_all(self._changed(first)))

    def stop(self) -> None:
        """Stop reading; see :meth:`s2s.store.refresher.Refresher.stop`."""
        self._is_stopped = True
        self._refresher.stop()

    def notify(self) -> None:
        """Read the table soon, because it may have changed."""
        self._refresher.notify(NOTIFY_GAP_S)

    def read_now(self, cmd_type: str) -> Deferred[None]:
        """Read the table, at most once a second."""
        self._wanted.pop(cmd_type, None)
        self._wanted[cmd_type] = None
        if len(self._wanted) > MOST_WANTED:
            del self._wanted[next(iter(self._wanted))]
        return self._refresher.read_now(UNKNOWN_GAP_S)

    def _on_value(self, declared: Mapping[str, str]) -> Deferred[None] | None:
        self._undeclared.clear()
        changed = self._changed(declared)
        if not changed:
            self._use(declared, {})
            return None
        # Compile in a thread, since each schema may take a second.
        compiling = own_threads.run(self._reactor, self._compile_all, changed)
        return compiling.addCallback(lambda compiled: self._use(declared, compiled))

    def _changed(self, declared: Mapping[str, str]) -> dict[str, str]:
        return {name: text for name, text in declared.items() if self._compiled.get(name, ("", None))[0] != text}

    def _use(self, declared: Mapping[str, str], compiled: Mapping[str, Schema | str | None]) -> None:
        for name, schema in compiled.items():
            if isinstance(schema, str):
                self._tell_unusable(name, schema)
            self._compiled[name] = (declared[name], schema if isinstance(schema, Schema) else None)
        self._compiled = {name: each for name, each in self._compiled.items() if name in declared}
        usable = {name: schema for name, (_, schema) in self._compiled.items() if schema is not None}
        self.schemas = {**self._own, **usable}
        self.unusable = frozenset(self._compiled) - self.schemas.keys()
        self._tell_replaced({name: declared[name] for name in self._own_texts.keys() & usable.keys()})

    def _tell_unusable(self, name: str, why: str) -> None:
        self.log.error(
            "the schema of {cmd_type} in s2s.command_types cannot be used: {why}; its pushes have to wait: give this"
            " server the release whose server declared it, or start a server that serves it",
            cmd_type=name,
            why=why,
        )

    def _tell_replaced(self, declared: Mapping[str, str]) -> None:
        """Log once each schema of another server that replaces the schema of one of this server's types."""
        others = {name: text for name, text in declared.items() if text != self._own_texts[name]}
        for name in sorted(others):
            if self._told.get(name) != others[name]:
                self.log.warn(
                    "the schema of {cmd_type} in force is not that of this server: another one has started later, with"
                    " another release of the handler: give both the same release, and start this server again",
                    cmd_type=name,
                )
        self._told = others

    def _compile_all(self, schemas: Mapping[str, str]) -> dict[str, Schema | str | None]:
        """Compile schemas, and return for an unusable schema the error text. Blocks."""
        return {name: None if self._is_stopped else _compile(text) for name, text in schemas.items()}


def _compile(text: str) -> Schema | str:
    try:
        if len(text) > MAX_SIZE:
            raise OperatorError(f"it has more than {MAX_SIZE} characters")
        return Schema(json.loads(text))
    except Exception as error:  # from either library, or since the row was changed by hand
        return one_line(error)


def texts(served: Mapping[str, CommandHandler]) -> dict[str, str]:
    """Return the schemas of command types as JSON texts."""
    return {name: json.dumps(dict(kind.schema), sort_keys=True) for name, kind in served.items()}


def _declare_and_read(
    txn: Cursor, undeclared: Mapping[str, str], own: Mapping[str, str], wanted: Iterable[str]
) -> dict[str, str]:
    command_types.declare(txn, {**undeclared, **{name: own[name] for name in command_types.missing(txn, own)}})
    return command_types.read(txn, list(wanted))
