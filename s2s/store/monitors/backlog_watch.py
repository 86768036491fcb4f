"""Report old snapshots and commands without a handler to operators (docs/faults.rst, "Growth outside our control")."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from s2s.errors import harmless
from s2s.runtime.clock import Clock
from s2s.store.monitors import snapshots
from s2s.store.monitors.periodic import Periodic
from s2s.store.monitors.snapshots import Holder
from s2s.store.pool import Database
from s2s.store.tables.lookback import Lookback

#: Seconds after which a snapshot counts as old: no transaction of ours may take so long, and few reports do.
OLD_S: Final = 300.0
#: The number of dead rows from which on an old snapshot is reported: a vacuum would start at this number (migration
#: 0007).
DEAD_ROWS: Final = 100_000
#: Seconds until an old snapshot is reported again.
AGAIN_S: Final = 3600.0
#: The most command types that are reported, each once.
_MOST_TYPES: Final = 64


class Watch(Periodic):
    """Reports each condition once.

    :param types: the command types that this server serves.
    :ivar oldest_snapshot_s: age of the oldest snapshot in seconds; 0.0: there is none.
    :ivar dead_rows: dead rows in our busy tables, as the database estimates them.
    """

    subject = "old snapshots and waiting commands"

    def __init__(self, database: Database, clock: Clock, types: Collection[str]) -> None:
        super().__init__(database, clock)
        self._types = types
        self._lookback = Lookback()
        self._told_types: list[str] = []
        #: When each holder was first seen, by its kind, name and transaction id.
        self._seen: dict[tuple[str, str, str], float] = {}
        self._told_at: float | None = None
        self.oldest_snapshot_s = 0.0
        self.dead_rows = 0

    async def _look(self) -> None:
        self._judge(*await self._database.run(snapshots.holders))
        if self._lookback.is_due and len(self._told_types) < _MOST_TYPES:
            known = [*self._types, *self._told_types]
            self._tell_type(await self._database.run(snapshots.unserved, self._lookback, known))

    def _judge(self, holders: Sequence[Holder], dead_rows: int) -> None:
        now = self._clock.mono()
        keys = [(holder.kind, holder.name, holder.xid) for holder in holders]
        self._seen = {key: self._seen.get(key, now) for key in keys}
        ages = [max(each.age_s or 0.0, now - self._seen[key]) for each, key in zip(holders, keys, strict=True)]
        self.oldest_snapshot_s = max(ages, default=0.0)
        self.dead_rows = dead_rows
        old = next((each for each, age_s in zip(holders, ages, strict=True) if age_s >= OLD_S), None)
        if old is None or (dead_rows < DEAD_ROWS and self._told_at is None):
            if self._told_at is not None:
                self.log.info("the old snapshot is gone: dead rows can be removed again")
            self._told_at = None
        elif self._told_at is None or now >= self._told_at + AGAIN_S:
            self._told_at = now
            self.log.warn(
                "a snapshot that is {age:.0f} s old keeps {dead} dead rows: {holder}: {cure}",
                age=ages[holders.index(old)],
                dead=dead_rows,
                holder=old.described,
                cure=old.cure,
            )

    def _tell_type(self, cmd_type: str | None) -> None:
        if cmd_type is not None:
            self._told_types.append(cmd_type)
            self.log.warn(
                "commands of type {cmd_type} wait: this server has no handler for it: "
                "start a server that has the plug-in, or cancel them",
                cmd_type=harmless(repr(cmd_type)),
            )
