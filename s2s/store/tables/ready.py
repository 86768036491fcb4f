"""Find the commands to run next (docs/protocol.rst, "Commands") without reading the commands that have run.

The order is that of the index ``commands_ready``: priority, ``due_at``, ``cmd_id``. For each priority a process
remembers the first command that its last scan found, and starts the next scan there; see
:mod:`s2s.store.tables.lookback`. Commands of types that the process does not serve stay below that start point.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from s2s.store.driver import Cursor, array_literal
from s2s.store.tables.fitting import jsonb_size
from s2s.store.tables.lookback import SLACK_S, Lookback

#: The most priorities with a remembered start point: all that a push can name. Each costs a scan one step in the index.
_MOST_PRIORITIES: Final = 1024
_FIRST_ID: Final = -(2**63)
#: The most bytes of the payloads of one batch, as jsonb, unless it has a single command. Python needs eight
#: times as many.
MOST_BYTES: Final = 16 * 1024 * 1024
#: Bytes in the table up to which a payload is not counted: uncompressed, it has at most 85 times as many.
SMALL_BYTES: Final = 1000
#: The least seconds between two searches for priorities that were empty: a claim may come every few milliseconds.
FIND_S: Final = 0.05

_SIZE: Final = f"case when pg_column_size(payload) > {SMALL_BYTES} then {jsonb_size('payload')} end"
# Find every priority between the known ones, and its first command: one step in the index for each, however many
# commands are ready under it.
_FIND: Final = """
with recursive found (priority, due_at, high) as (
    select n.priority, n.due_at, g.high
    from unnest(%(lows)s::bigint[], %(highs)s::bigint[]) g (low, high)
    cross join lateral (
        select priority, due_at from s2s.commands where status = 'ready' and priority > g.low and priority < g.high
        order by priority, due_at limit 1
    ) n
    union all
    select n.priority, n.due_at, f.high
    from found f
    cross join lateral (
        select priority, due_at from s2s.commands where status = 'ready' and priority > f.priority and priority < f.high
        order by priority, due_at limit 1
    ) n
)
select priority, extract(epoch from due_at)::float8 from found
"""
# The start points by priority.
_STARTS: Final = f"""
with starts (priority, due_at, cmd_id) as materialized (
    select k.priority, least(k.due_at, recent), case when k.due_at <= recent then k.cmd_id else {_FIRST_ID} end
    from (
        select priority, to_timestamp(due_at), cmd_id
        from unnest(%(priorities)s::integer[], %(due_ats)s::float8[], %(cmd_ids)s::bigint[])
            k (priority, due_at, cmd_id)
    ) k (priority, due_at, cmd_id), (select now() - {SLACK_S} * interval '1 second') r (recent)
    order by priority
)
"""  # noqa: S608 - of constants, as below
_OURS: Final = """
    (%(types)s::text is null or cmd_type = any(string_to_array(%(types)s::text, E'\\n')))
    and cmd_id not in (select unnest(cmd_ids) from s2s.batch_notes where note_id >= %(first_note)s)
    and not cmd_id = any(%(left_out)s::bigint[])
"""
# No outer "order by": the nested loop already returns the order, and a sort would read every priority up to its limit.
# A priority without a result returns a row without a command. The times and the first note are returned only in the
# rows that need them, since the client parses each value.
_CANDIDATES: Final = f"""
{_STARTS}
select p.priority,
    case when c.place > 1 and not %(is_timed)s then null else extract(epoch from coalesce(c.due_at, now()))::float8 end,
    c.cmd_id, c.attempts, c.runs_alone, c.size,
    case when c.place > 1 then null else (select min(note_id) from s2s.batch_notes where note_id >= %(first_note)s) end
from starts p
left join lateral (
    select row_number() over () as place, locked.* from (
        select due_at, cmd_id, attempts, runs_alone is true as runs_alone, {_SIZE} as size from s2s.commands
        where status = 'ready' and priority = p.priority and due_at <= now()
            and (commands.due_at, commands.cmd_id) >= (p.due_at, p.cmd_id) and {_OURS}
        order by commands.due_at, cmd_id limit %(limit)s
        for update skip locked -- a row of another session cannot be run, and must not be claimed again and again
    ) locked
) c on true
limit %(limit)s + (select count(*) from starts)
"""  # noqa: S608
_BEHIND: Final = f"""
{_STARTS}
select c.cmd_id
from starts p
cross join lateral (
    select cmd_id from s2s.commands
    where status = 'ready' and priority = p.priority and (due_at, cmd_id) < (p.due_at, p.cmd_id) and {_OURS}
    order by due_at, cmd_id limit %(limit)s
) c
limit %(limit)s
"""  # noqa: S608
_STILL_BEHIND: Final = f"""
select priority, extract(epoch from due_at)::float8, cmd_id, attempts, runs_alone is true, {_SIZE} from s2s.commands
where cmd_id = any(%(behind)s::bigint[]) and status = 'ready' and due_at <= now() and {_OURS}
for update skip locked
"""  # noqa: S608
_NEXT_DUE: Final = f"""
{_STARTS}
select extract(epoch from min(least(c.due_at, now() + interval '1 day')) - clock_timestamp())::float8
from starts p
cross join lateral (
    select due_at from s2s.commands where status = 'ready' and priority = p.priority and due_at > now()
    order by due_at limit 1
) c
"""  # noqa: S608


class Candidate(NamedTuple):
    """A command that may run next.

    :param due_at: Unix seconds, if it was needed to sort the command in.
    :param runs_alone: see :class:`s2s.store.tables.commands.Charge`.
    """

    priority: int
    due_at: float | None
    cmd_id: int
    attempts: int
    runs_alone: bool


def _within_bytes(found: list[Candidate], sizes: Mapping[int, int]) -> list[Candidate]:
    """Return the leading commands whose payloads fit into :data:`MOST_BYTES`, and at least one.

    :param sizes: the payload bytes of the commands that count, by ``cmd_id``.
    """
    total = 0
    for place, each in enumerate(found if sizes else ()):
        total += sizes.get(each.cmd_id, 0)
        if total > MOST_BYTES and place:
            return found[:place]
    return found


class Ready:
    """The commands that one process may run next.

    :param types: the command types that the process serves; ``None``: all.
    :param now: returns monotonic seconds.
    :ivar first_note: no current note has a lower ``note_id`` (:mod:`s2s.store.tables.claims`).
    :ivar notes: the ``note_id`` of each worker's last batch; 0: not known.
    """

    def __init__(self, types: Iterable[str] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._types: str | None = None
        self._lookback = Lookback(now)
        #: The schedule of the searches for priorities that were empty.
        self._finding = Lookback(now, least_s=FIND_S)
        #: By priority: ``due_at`` and ``cmd_id`` where the next scan starts. Other threads read it, so it is replaced
        #: whole.
        self._starts: dict[int, tuple[float, int]] = {}
        #: The next scan starts at the beginning of the index.
        self._is_whole = True
        self.first_note = 0
        self.notes: dict[int, int] = defaultdict(int)
        #: Whether there were notes at the last scan.
        self._is_noted = True
        self._left_out = array_literal([])
        if types is not None:
            self.serve(types)

    def serve(self, types: Iterable[str]) -> None:
        """Serve only commands of these types from the next scan on."""
        self._types = "\n".join(types)
        # Commands of new types may lie below the start points.
        self._is_whole = True

    def leave_out(self, cmd_ids: Iterable[int]) -> None:
        """Exclude these commands from the next scan on."""
        self._left_out = array_literal(cmd_ids)

    def look_back(self, txn: Cursor, limit: int) -> None:
        """Look for commands below the start points and for new priorities, if it is time to.

        It needs no lock, and the caller should hold none, because the search may take long.
        """
        if self._is_whole:
            return
        if self._finding.is_due:
            with self._finding.measured():
                self._find(txn, self._starts)
        if self._lookback.is_due:
            self._lookback.look(txn, _BEHIND, self._params(limit))
            # The limit is reached, so enough commands lie below the start points: scan from the beginning.
            self._is_whole = len(self._lookback.behind) >= limit

    def candidates(self, txn: Cursor, limit: int) -> list[Candidate]:
        """Find and lock the commands to run next that are neither noted nor locked.

        Only one caller may run at a time.

        :returns: in run order.
        """
        is_whole, self._is_whole = self._is_whole, False
        sizes: dict[int, int] = {}
        # Keep a reference: another worker may look back meanwhile.
        behind = self._lookback.behind
        if is_whole:
            with self._lookback.measured():
                self._find(txn, {})
                rows = self._scan(txn, limit, bool(behind), sizes)
        else:
            rows = self._scan(txn, limit, bool(behind), sizes)
        if behind:
            txn.execute(_STILL_BEHIND, {**self._params(limit), "behind": array_literal(behind)})
            for *row, size in txn.fetchall():
                rows.append(each := Candidate(*row))
                if size is not None:
                    sizes[each.cmd_id] = size
            rows = sorted(set(rows))
        if not rows and self._lookback.is_cheap:
            self._is_whole = True
            return [] if is_whole else self.candidates(txn, limit)
        return _within_bytes(rows[:limit], sizes)

    def noted(self, worker: int, note_id: int) -> None:
        """Remember the note of a batch that was made of the candidates just found."""
        self.notes[worker] = note_id
        if not self._is_noted:
            self.first_note = note_id

    def next_due_s(self, txn: Cursor) -> float | None:
        """Return the seconds until the next command that was not due at the last scan; ``None``: there is none."""
        txn.execute(_NEXT_DUE, self._params())
        row = txn.fetchone()
        return row[0] if row else None

    def _find(self, txn: Cursor, starts: Mapping[int, tuple[float, int]]) -> None:
        """Find the priorities that are not known yet."""
        ends = [-(2**31) - 1, *sorted(starts), 2**31]
        gaps = [(low, high) for low, high in itertools.pairwise(ends) if high > low + 1]
        txn.execute(
            _FIND, {"lows": array_literal(low for low, _ in gaps), "highs": array_literal(high for _, high in gaps)}
        )
        self._starts = {**dict(starts), **{priority: (due_at, _FIRST_ID) for priority, due_at in txn}}
        self._is_whole |= len(self._starts) > _MOST_PRIORITIES

    def _scan(self, txn: Cursor, limit: int, is_timed: bool, sizes: dict[int, int]) -> list[Candidate]:
        """Scan from the start points on, and move them.

        :param is_timed: return each ``due_at``, so that other commands can be sorted in.
        :param sizes: receives the bytes of each payload that counts, by ``cmd_id``.
        :returns: in run order; if not timed, only the first of each priority has its ``due_at``.
        """
        txn.execute(_CANDIDATES, {**self._params(limit), "is_timed": is_timed})
        rows = txn.fetchall()
        starts = dict(self._starts)
        place = None
        found = []
        for priority, due_at, cmd_id, attempts, runs_alone, size, _ in rows:
            if priority != place:
                place = priority
                starts[priority] = (due_at, _FIRST_ID if cmd_id is None else cmd_id)
            if cmd_id is not None:
                found.append(Candidate(priority, due_at, cmd_id, attempts, runs_alone))
                if size is not None:
                    sizes[cmd_id] = size
        self._starts = starts
        if rows:
            self.first_note, self._is_noted = rows[0][-1] or self.first_note, rows[0][-1] is not None
        return found

    def _params(self, limit: int = 0) -> dict[str, Any]:
        starts = self._starts
        return {
            "types": self._types,
            "limit": limit,
            "first_note": self.first_note,
            "priorities": array_literal(starts),
            "due_ats": f"{{{','.join(str(due_at) for due_at, _ in starts.values())}}}",
            "cmd_ids": array_literal(cmd_id for _, cmd_id in starts.values()),
            "left_out": self._left_out,
        }
