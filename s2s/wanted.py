"""What operators want of this engine (docs/protocol.rst, "s2s.engine.pause, s2s.engine.resume")."""

from __future__ import annotations

from s2s.clock import Clock
from s2s.condition import Condition
from s2s.news import news
from s2s.reread import Reread
from s2s.store import engines
from s2s.store.pool import Database


class Wanted:
    """Keeps :attr:`s2s.condition.Condition.wanted` as the table ``engines`` has it, whoever wrote it there.

    :param name: the engine's.
    """

    def __init__(self, database: Database, clock: Clock, name: str, condition: Condition) -> None:
        self._database = database
        self._name = name
        self._condition = condition
        self._rereading = Reread(database, clock, engines.wanted, (name,), self._took)
        self.start, self.stop = self._rereading.start, self._rereading.stop
        self.changed = self._rereading.changed

    async def want(self, state: str, reason: str, actor: str) -> None:
        """Store what is wanted; when this returns it is durable and in force.

        :param state: ``running`` or ``paused``.
        :param actor: who wants it, for the audit.
        :raises DatabaseUnavailable: it may or may not be stored.
        """
        await self._database.run(engines.want, self._name, state, reason, actor)
        await self._rereading.again()

    def _took(self, found: tuple[str, str]) -> None:
        wanted, reason = found
        before, self._condition.wanted = self._condition.wanted, wanted
        if before != wanted and (before is not None or wanted == "paused"):
            news.info("engine {state}: {reason!r}", state=self._condition.state, reason=reason)
