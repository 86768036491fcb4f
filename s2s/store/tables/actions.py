"""Actions of operators on rows of a table. An action applies only to unlocked rows in certain states.

Rows are locked before they are changed, and rows that another transaction has locked are skipped. So an action never
waits for a worker, a relay or a push, and cannot deadlock with them.

Each transaction writes one audit entry. An action on named rows writes the entry even if no row was changed, to record
the attempt, as a refused order does. An action on all dead rows writes entries only for steps that changed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from s2s.store.driver import Cursor
from s2s.store.kept_rows import Verb, note, refusal
from s2s.store.tables import audit

#: The maximum number of rows that one transaction changes.
STEP_ROWS: Final = 1000
#: Obstacles to an action, besides a state to which it does not apply.
LOCKED: Final = "locked"
MISSING: Final = "missing"
#: The obstacle of a row that a foreign trigger or rule keeps unchanged.
KEPT: Final = "kept"


@dataclass(frozen=True)
class Action:
    """One action on rows. All SQL in it is a constant of s2s; none comes from a user.

    :param verb: the name of the action.
    :param table: the table's name, with its schema.
    :param id: the column of the primary key.
    :param state: the column of the state.
    :param takes: the states to which it applies.
    :param statement: changes the rows ``%(ids)s``, which are locked and in one of these states. Returns the id of each
        and its outcome in one word.
    :param writes: the verb of the statement.
    :param settles: further work on the rows that the statement has returned.
    """

    verb: str
    table: str
    id: str
    state: str
    takes: tuple[str, ...]
    statement: str
    writes: Verb = "update"
    settles: Callable[[Cursor, Sequence[tuple[Any, ...]]], None] | None = None

    @property
    def name(self) -> str:
        """The action in the audit."""
        return f"{self.table.removeprefix('s2s.')}.{self.verb}"


@dataclass(frozen=True)
class RowOutcome:
    """The outcome of an action for one row.

    :param is_done: the action was done.
    :param outcome: the outcome that the statement returned; or the obstacle: :data:`LOCKED`, :data:`KEPT`,
        :data:`MISSING` or the state of the row.
    """

    id: int
    is_done: bool
    outcome: str


def act(txn: Cursor, action: Action, ids: Sequence[int], **params: Any) -> list[RowOutcome]:
    """Perform an action on rows by their ids, and write it to the audit.

    :param ids: at most :data:`STEP_ROWS` ids, without repeats.
    :param params: further parameters of the statement.
    :returns: the outcome for each row, in the same order.
    :raises StatementRefused: a trigger, a rule or a policy keeps all of the rows unchanged.
    """
    txn.execute(
        f"select {action.id} from {action.table} where {action.id} = any(%s::bigint[]) and {action.state} = any(%s)"  # noqa: S608
        " for update skip locked",
        (list(ids), list(action.takes)),
    )
    done, kept = _apply(txn, action, params)
    # A separate statement after the locking: a row in a fitting state that was not locked is locked by another session.
    txn.execute(
        f"select {action.id}, {action.state} from {action.table} where {action.id} = any(%s::bigint[])",  # noqa: S608
        ([row_id for row_id in ids if row_id not in done],),
    )
    states = dict(txn.fetchall())

    def obstacle(row_id: int) -> str:
        state: str = states.get(row_id, MISSING)
        if state in action.takes:
            return KEPT if row_id in kept else LOCKED
        return state

    left = {row_id: obstacle(row_id) for row_id in ids if row_id not in done}
    audit.write(txn, action.name, "", {"ids": list(ids)}, {"done": _by_word(done), "left": _by_word(left)})
    words = {**left, **done}
    return [RowOutcome(row_id, row_id in done, words[row_id]) for row_id in ids]


def act_on_dead(txn: Cursor, action: Action, after: int, cmd_type: str | None = None, **params: Any) -> list[int]:
    """Perform an action on the next dead rows.

    :param after: the last id of the step before; 0 at first.
    :param cmd_type: only rows of this command type; ``None``: all types.
    :returns: the ids of the changed rows in order; empty: no dead rows are left.
    :raises StatementRefused: a trigger, a rule or a policy keeps all of the rows unchanged.
    """
    txn.execute(
        f"select {action.id} from {action.table} where {action.id} > %(after)s and {action.state} = 'dead'"  # noqa: S608
        f" and (%(type)s::text is null or cmd_type = %(type)s) order by {action.id} limit %(limit)s"
        " for update skip locked",
        {"after": after, "type": cmd_type, "limit": STEP_ROWS},
    )
    done, _ = _apply(txn, action, params)
    if done:
        audit.write(txn, action.name, "", {"all_dead": True, "type": cmd_type}, {"done": _by_word(done)})
    return sorted(done)


def _apply(txn: Cursor, action: Action, params: dict[str, Any]) -> tuple[dict[int, str], set[int]]:
    """Perform an action on the rows whose ids the transaction has just locked.

    :returns: the outcome of each changed row, and the ids of the rows that are kept unchanged.
    :raises StatementRefused: all of them are kept unchanged.
    """
    ids = [row_id for (row_id,) in txn.fetchall()]
    txn.execute(action.statement, {**params, "ids": ids})
    rows = txn.fetchall()
    done = {row[0]: row[1] for row in rows}
    kept = set(ids) - done.keys()
    if kept and not done:
        raise refusal(txn, action.writes, action.table)
    if kept:
        note(txn, action.writes, action.table)
    if action.settles is not None:
        action.settles(txn, rows)
    return done, kept


def _by_word(words: Mapping[int, str]) -> dict[str, list[int]]:
    """Return the ids for each outcome, in order."""
    found: dict[str, list[int]] = {}
    for row_id, word in sorted(words.items()):
        found.setdefault(word, []).append(row_id)
    return found
