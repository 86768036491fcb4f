"""Audit entries for link requests that no table trigger records (docs/protocol.rst, "Audit")."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from s2s.errors import BadPayload, DatabaseUnavailable, Forbidden, StatementRefused, WireError
from s2s.protocol import canonical
from s2s.protocol.envelope import ID, Envelope
from s2s.protocol.limits import Counters
from s2s.protocol.received import Request
from s2s.store.driver import Cursor
from s2s.store.pool import Database
from s2s.store.tables import audit

#: Entries that may wait while others are written. Further entries are counted and not written.
MAX_WAITING: Final = 64

#: The arguments of :func:`s2s.store.tables.audit.write`.
_Entry = tuple[str, str, Mapping[str, Any], Mapping[str, Any], str]


class AuditLog:
    """Writes audit entries, fire-and-forget.

    Entries that cannot be written, because too many come at once or the database fails, are counted.

    :param name: the name of the engine, which is the subject of control requests.
    :param rpcs: the RPCs of the orders that the engine serves.
    """

    log = Logger()

    def __init__(self, database: Database, counters: Counters, name: str, rpcs: Collection[str]) -> None:
        self._rpcs = rpcs
        self._database = database
        self._counters = counters
        self._name = name
        self._waiting: list[_Entry] = []
        self._is_writing = False
        self._writing: Deferred[None] = succeed(None)

    def answered(self, request: Request, answer: Mapping[str, Any]) -> None:
        """Record a control request and its reply."""
        self._note((request.message.name, self._name, request.payload, answer, f"key:{request.key_id}"))

    def refused(self, request: Envelope, key_id: str, error: WireError) -> None:
        """Record an order that was refused by its schema or by its sender's role, and so has no row in ``orders``."""
        if request.type not in self._rpcs or not isinstance(error, (BadPayload, Forbidden)):
            return
        payload = request.payload
        order_id = payload.get("order_id")
        subject = order_id if type(order_id) is str and ID.fullmatch(order_id) else ""
        result = {"status": "refused", "result": {"code": error.code, "message": error.message}}
        self._note((request.type, subject, audit.cut(payload, canonical.dumps(payload)), result, f"key:{key_id}"))

    def wait_idle(self) -> Deferred[None]:
        """Wait until every entry is written or counted."""
        return self._writing

    def _note(self, entry: _Entry) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._counters.meet("audit")
            return
        self._waiting.append(entry)
        if not self._is_writing:
            self._is_writing = True
            self._writing = Deferred.fromCoroutine(self._write())

    async def _write(self) -> None:
        """Write all waiting entries in one transaction, and repeat while new ones have come. Never fails."""
        while self._waiting:
            entries, self._waiting = self._waiting, []
            try:
                await self._database.run(_write, entries)
            except Exception as error:
                for _ in entries:
                    self._counters.meet("audit")
                if isinstance(error, StatementRefused):
                    # Logged at most once a minute, since the peer decides how often this happens.
                    self._database.troubles.note(error.state, str(error))
                # The pool has logged that the database is away.
                elif not isinstance(error, DatabaseUnavailable):
                    self.log.failure("entries of the audit were not written")
        self._is_writing = False


def _write(txn: Cursor, entries: Sequence[_Entry]) -> None:
    for entry in entries:
        audit.write(txn, *entry)
