"""What operators do to rows of a table: each only in the states that it is for, and never behind another's back.

Rows are locked first and changed then, and one that another transaction has locked is left alone: nothing here waits
for a worker, a relay or a push, so nothing here can deadlock with one.

Each transaction leaves one entry in the audit. Whoever names rows leaves it also where nothing could be done, as a
refused order does: the attempt is what is told of. Of all dead rows only steps that changed some are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from s2s.store.driver import Cursor
from s2s.store.kept_rows import Verb, note, refusal
from s2s.store.tables import audit

#: Rows that one transaction changes, at most.
STEP_ROWS: Final = 1000
#: What stands in the way, beside a state that the action is not for.
LOCKED: Final = "locked"
MISSING: Final = "missing"
#: A trigger or a rule of another hand keeps the row as it is.
KEPT: Final = "kept"


@dataclass(frozen=True)
class Action:
    """One thing to do to rows. All of it is SQL of ours, none a user's.

    :param verb: what it is called.
    :param table: the table's name, with its schema.
    :param id: the name of its primary key.
    :param state: the name of the column that says the state.
    :param takes: the states that it is for.
    :param statement: does it to the rows ``%(ids)s``, which are locked and in one of these states, and returns for
        each its id and, in a word, what became of it.
    :param writes: the verb of the statement.
    :param settles: what is left to do with the rows that the statement has returned.
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
        """What the audit calls it."""
        return f"{self.table.removeprefix('s2s.')}.{self.verb}"


@dataclass(frozen=True)
class RowOutcome:
    """What became of one row.

    :param is_done: the action was done.
    :param outcome: the statement's word; or what stands in the way: :data:`LOCKED`, :data:`KEPT`, :data:`MISSING`
        or its state.
    """

    id: int
    is_done: bool
    outcome: str


def act(txn: Cursor, action: Action, ids: Sequence[int], **params: Any) -> list[RowOutcome]:
    """Do an action to rows by their ids.

    :param ids: :data:`STEP_ROWS` at most, without repeats.
    :param params: further parameters of the statement.
    :returns: a fate for each, in the same order; the audit has them too.
    :raises StatementRefused: the database keeps all of them as they are.
    """
    txn.execute(
        f"select {action.id} from {action.table} where {action.id} = any(%s::bigint[]) and {action.state} = any(%s)"  # noqa: S608
        " for update skip locked",
        (list(ids), list(action.takes)),
    )
    done, kept = _apply(txn, action, params)
    # A statement of its own after the locks: of what is in a fitting state and was not locked, another has the lock.
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
    """Do an action to the next dead rows.

    :param after: the last id of the step before; 0 at first.
    :param cmd_type: only these.
    :returns: their ids in order; none: there are no more.
    :raises StatementRefused: the database keeps all of them as they are.
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
    """Do an action to the rows whose ids the transaction has just locked.

    :returns: what became of each, and those that the database keeps as they are.
    :raises StatementRefused: it keeps all of them.
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
    """Give the ids of each word, in order."""
    found: dict[str, list[int]] = {}
    for row_id, word in sorted(words.items()):
        found.setdefault(word, []).append(row_id)
    return found
