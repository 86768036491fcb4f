"""The state that operators want this engine to have (docs/protocol.rst, "s2s.engine.pause, s2s.engine.resume")."""

from __future__ import annotations

from collections.abc import Mapping

from twisted.logger import Logger

from s2s.errors import InternalError, StatementRefused, harmless
from s2s.roles.engine.state import EngineState
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, LineQuota
from s2s.runtime.status_log import status_log
from s2s.store.pool import Database
from s2s.store.refresher import Refresher
from s2s.store.tables import engines


class DesiredState:
    """Keeps :attr:`s2s.roles.engine.state.EngineState.wanted` equal to the row of the engine in the table ``engines``.

    :param name: the name of the engine.
    """

    log = Logger()

    def __init__(self, database: Database, clock: Clock, name: str, condition: EngineState) -> None:
        self._database = database
        self._name = name
        self._condition = condition
        self._refresher = Refresher(database, clock, engines.wanted, (name,), self._on_value)
        self.start, self.notify = self._refresher.start, self._refresher.notify
        #: Limits the log lines, since a server may pause and resume an engine many times a second.
        self._lines = LineQuota(clock.scheduler, self._tell, MOST_TOLD)

    def stop(self) -> None:
        """Stop reading."""
        self._refresher.stop()
        self._lines.stop()

    async def set(self, state: str, reason: str, actor: str) -> None:
        """Store the wanted state. When this returns, the state is durable and in force.

        :param state: ``running`` or ``paused``.
        :param actor: the operator or key that wants it, for the audit.
        :raises DatabaseUnavailable: the state may or may not be stored.
        :raises InternalError: the database refuses to store the state; the reason is logged at most once a minute.
        """
        try:
            await self._database.run(engines.want, self._name, state, reason, actor)
        except StatementRefused as refused:
            raise InternalError(incident=self._database.troubles.note(refused.state, str(refused))) from None
        await self._refresher.read_now()

    def _on_value(self, found: tuple[str, str]) -> None:
        wanted, reason = found
        before, self._condition.wanted = self._condition.wanted, wanted
        if before != wanted and (before is not None or wanted == "paused") and self._lines.may_tell(wanted):
            status_log.info("engine {state}: {reason!r}", state=self._condition.state, reason=harmless(reason))

    def _tell(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} times {state}" for state, count in untold.items())
        self.log.warn("the engine was wanted {told}, and is {state} now", told=told, state=self._condition.state)
