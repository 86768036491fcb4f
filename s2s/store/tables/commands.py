"""Table ``commands``: accepting, claiming and finishing (docs/protocol.rst, "Commands")."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from s2s.errors import DatabaseError, StatementRefused
from s2s.store import driver
from s2s.store.driver import Cursor, Query, Steps, array_literal
from s2s.store.kept_rows import refusal
from s2s.store.tables import idempotency
from s2s.store.tables.singly import singly

#: A command that has failed so often is dead.
MAX_ATTEMPTS: Final = 10
#: So is one that was charged so often, the deaths of its process among them: most who die with a process are innocent.
MAX_CHARGES: Final = 50
#: The longest pause between two attempts, in seconds; after the death of its process.
MAX_BACKOFF_S: Final = 300
MAX_DEATH_BACKOFF_S: Final = 10


# --- accepting -------------------------------------------------------------------------------------------------------


class Push(msgspec.Struct, frozen=True):
    """One command on its way in.

    :param fingerprint: SHA-256 of the canonical ``{cmd_type, payload}``.
    :param payload: canonical JSON.
    :param due_at: Unix seconds, or ``None``: at once.
    :param cmd_id: a number drawn for it before, or ``None``.
    """

    cmd_type: str
    idem_key: str
    fingerprint: bytes
    payload: str
    priority: int = 100
    due_at: int | None = None
    cmd_id: int | None = None


class Outcome(msgspec.Struct, frozen=True):
    """What became of a push.

    :param cmd_id: the first command of its ``idem_key``.
    :param status: that command's.
    :param is_new: this push made it.
    :param is_conflict: the first one had another fingerprint.
    """

    cmd_id: int
    status: str
    is_new: bool = False
    is_conflict: bool = False


#: Insertions and looks for one batch of pushes, at most. A second one follows where a key was swept away in between.
_MOST_ROUNDS: Final = 3
_NEXT: Final = "nextval('s2s.commands_cmd_id_seq')"
#: Fails, where a key was taken and its command was not: a push that was answered then would be lost.
_REFUSAL: Final = "('a trigger keeps the command from being inserted, cmd_id ' || fresh.cmd_id)::bigint"
_INSERT: Final = driver.Prepared(
    "s2s_push",
    f"""
with pushed as materialized (
    -- cmd_ids in the order of arrival
    select idem_key, fingerprint, cmd_type, payload, priority, due_at,
        coalesce(cmd_id, {_NEXT}) as cmd_id
    from unnest(string_to_array($1, E'\\n'), string_to_array($2, E'\\n'), string_to_array($3, E'\\n'),
            string_to_array($4, E'\\n'), $5::integer[], $6::bigint[], $7::bigint[])
        with ordinality as p (idem_key, fingerprint, cmd_type, payload, priority, due_at, cmd_id, place)
    order by place
), fresh as (
    -- keys in their own order: two batches that overlap wait for each other in one direction only
    insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id)
    select idem_key, decode(fingerprint, 'hex'), cmd_id from pushed order by idem_key collate "C"
    on conflict (idem_key) do nothing
    returning idem_key, cmd_id
), made as (
    insert into s2s.commands (cmd_id, cmd_type, idem_key, payload, priority, due_at)
    select cmd_id, cmd_type, idem_key, payload::jsonb, priority, coalesce(to_timestamp(due_at), now())
    from pushed where cmd_id in (select cmd_id from fresh) order by cmd_id
    returning cmd_id
)
select idem_key, coalesce(made.cmd_id, {_REFUSAL}) from fresh left join made using (cmd_id)
""",  # noqa: S608 - of constants, as below
    *("text" for _ in range(7)),
)

# One push alone: what sorts and joins has nothing to do, and nothing need be told of it but its number.
_INSERT_ONE: Final = driver.Prepared(
    "s2s_push_one",
    f"""
with fresh as (
    insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id)
    values ($1, $2, {_NEXT})
    on conflict (idem_key) do nothing
    returning cmd_id
), made as (
    insert into s2s.commands (cmd_id, cmd_type, idem_key, payload, priority, due_at)
    select cmd_id, $3, $1, $4::jsonb, $5, coalesce(to_timestamp($6), now()) from fresh
    returning cmd_id
)
select coalesce(made.cmd_id, {_REFUSAL}) from fresh left join made using (cmd_id)
""",  # noqa: S608
    *("text", "bytea", "text", "text", "integer", "bigint"),
)


def push_one(push: Push) -> Query:
    """Accept one push alone, if its key is new.

    :returns: what its rows say, :func:`pushed_one` tells.
    """
    assert push.cmd_id is None
    return Query(
        _INSERT_ONE, (push.idem_key, push.fingerprint, push.cmd_type, push.payload, push.priority, push.due_at)
    )


def pushed_one(rows: Sequence[tuple[int]]) -> Outcome | None:
    """Say what came of :func:`push_one`; ``None``: its key is known, and the push is for :func:`push_batch`."""
    return Outcome(rows[0][0], "ready", is_new=True) if rows else None


def push_batch(pushes: Sequence[Push]) -> Steps[list[Outcome]]:
    """Accept pushes in their order of arrival, in a constant number of statements.

    Each statement may commit by itself: the first one does it all or nothing, and the others only look.

    :returns: one outcome for each push, in the same order.
    :raises StatementRefused: the database neither inserts nor shows a key; what else was new is accepted all the same.
    """
    # Of one key twice in the batch the first one goes to the database.
    first: dict[str, Push] = {}
    for push in pushes:
        first.setdefault(push.idem_key, push)
    made: dict[str, int] = {}
    known: dict[str, idempotency.First] = {}
    unsettled = first
    for _ in range(_MOST_ROUNDS):
        if not unsettled:
            break
        made |= dict((yield _insertion(unsettled.values())))
        # A statement of its own: the insert's snapshot does not show what another transaction has just committed.
        others = [key for key in unsettled if key not in made]
        known |= (yield from idempotency.firsts(others)) if others else {}
        # In neither only where the key was swept away in between, or where something of another hand takes the rows.
        unsettled = {key: first[key] for key in others if key not in known}
    if unsettled:
        raise StatementRefused(
            "the database neither takes nor knows a key: see the triggers, rules and policies of idempotency_keys"
        )

    outcomes = []
    for push in pushes:
        cmd_id = made.pop(push.idem_key, None)
        if cmd_id is not None:
            known[push.idem_key] = idempotency.First(push.fingerprint, cmd_id, "ready")
            outcomes.append(Outcome(cmd_id, "ready", is_new=True))
        else:
            before = known[push.idem_key]
            outcomes.append(Outcome(before.cmd_id, before.status, is_conflict=push.fingerprint != before.fingerprint))
    return outcomes


def push_singly(txn: Cursor, pushes: Sequence[Push]) -> list[Outcome | DatabaseError]:
    """Accept pushes of which the database refuses one or another session holds one, which one being unknown.

    :returns: for each push its outcome or error (:func:`s2s.store.tables.singly.singly`), in the same order.
    """
    txn.execute(f"select {_NEXT} from generate_series(1, %s)", (len(pushes),))  # noqa: S608
    drawn = [
        msgspec.structs.replace(push, cmd_id=cmd_id) for push, (cmd_id,) in zip(pushes, txn.fetchall(), strict=True)
    ]
    # In the order of the keys, as a batch takes its locks; the sort is stable, so of one key the first still wins.
    places = sorted(range(len(drawn)), key=lambda place: drawn[place].idem_key)
    written = singly(txn, places, lambda place: driver.drive(txn, push_batch([drawn[place]]))[0])
    outcomes = dict(zip(places, written, strict=True))
    return [outcomes[place] for place in range(len(drawn))]


def _insertion(pushes: Collection[Push]) -> Query:
    """Give what inserts pushes of different keys; its rows are ``idem_key`` and ``cmd_id`` of the new ones."""
    # Each column as one text: of lists psycopg2 writes expressions, which the database parses value by value.
    params = (
        _lines([push.idem_key for push in pushes]),
        _lines([push.fingerprint.hex() for push in pushes]),
        _lines([push.cmd_type for push in pushes]),
        _lines([push.payload for push in pushes]),
        array_literal([push.priority for push in pushes]),
        array_literal([push.due_at for push in pushes]),
        array_literal([push.cmd_id for push in pushes]),
    )
    return Query(_INSERT, params)


def _lines(values: Sequence[str]) -> str:
    """Write texts of which none has a line break: keys and types may have none, and canonical JSON escapes it."""
    lines = "\n".join(values)
    if lines.count("\n") >= len(values):
        raise ValueError("a line break in a key, a type or a payload")
    return lines


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command as its handler gets it.

    :param idem_key: for effects outside this database, which may happen more than once.
    :param attempts: how often it was charged a failure before.
    """

    cmd_id: int
    cmd_type: str
    idem_key: str
    payload: dict[str, Any]
    attempts: int
    priority: int


def take(txn: Cursor, cmd_ids: Sequence[int]) -> list[Command]:
    """Lock those of the commands that still wait and that nobody else has locked, in run order."""
    txn.execute(
        "select cmd_id, cmd_type, idem_key, payload, attempts, priority from s2s.commands"
        " where cmd_id = any(%s::bigint[]) and status = 'ready' order by priority, due_at, cmd_id"
        " for update skip locked",
        (array_literal(cmd_ids),),
    )
    return [Command(*row) for row in txn]


def finish(txn: Cursor, cmd_ids: Sequence[int]) -> None:
    """Mark commands as done.

    :raises StatementRefused: a trigger has kept one from being changed: it would run again, and its effect be doubled.
    """
    txn.execute(
        "update s2s.commands set status = 'done', finished_at = now() where cmd_id = any(%s::bigint[])"
        # A trigger may also return the old row, which counts as written.
        " returning nullif(status, 'done')",
        (array_literal(cmd_ids),),
    )
    if txn.fetchall().count((None,)) < len(cmd_ids):
        _check_changed(txn, cmd_ids)


def charge(txn: Cursor, failures: Sequence[tuple[int, str]], deaths: Container[int] = ()) -> int:
    """Charge a failed attempt to waiting commands: run again after a pause, or dead.

    :param failures: ``(cmd_id, error)``.
    :param deaths: those among them whose process died.
    :returns: how many are dead now.
    :raises StatementRefused: a trigger has kept one from being changed.
    """
    txn.execute(
        "update s2s.commands c set attempts = f.attempts, deaths = f.deaths, error = f.error,"
        " status = case when f.is_last then 'dead' else 'ready' end, finished_at = case when f.is_last then now() end,"
        " due_at = clock_timestamp() + random() * interval '1 second' * least(power(2, least(f.attempts, 60)),"
        " case when f.died then %(death_pause)s else %(longest)s end)"
        " from (select cmd_id, failed.error, died, o.attempts, o.deaths,"
        "  o.attempts >= %(charges)s or o.attempts - o.deaths >= %(attempts)s as is_last"
        "  from s2s.commands join unnest(%(ids)s::bigint[], %(errors)s::text[], %(died)s::boolean[])"
        "  as failed (cmd_id, error, died) using (cmd_id),"
        # A row that was written by hand may have the largest numbers.
        "  lateral (select least(attempts, 1000000) + 1, least(deaths, 1000000) + died::integer) o (attempts, deaths)"
        " ) f"
        " where c.cmd_id = f.cmd_id and c.status = 'ready'"
        # What was to be run was due. It still is where a trigger returns the old row, which counts as written.
        " returning c.cmd_id, c.status, c.status = 'dead' or c.due_at >= now()",
        {
            "attempts": MAX_ATTEMPTS,
            "charges": MAX_CHARGES,
            "longest": MAX_BACKOFF_S,
            "death_pause": MAX_DEATH_BACKOFF_S,
            "ids": [cmd_id for cmd_id, _ in failures],
            "errors": [error for _, error in failures],
            "died": [cmd_id in deaths for cmd_id, _ in failures],
        },
    )
    charged = {cmd_id: status for cmd_id, status, is_changed in txn.fetchall() if is_changed}
    if missing := [cmd_id for cmd_id, _ in failures if cmd_id not in charged]:
        _check_changed(txn, missing)
    return list(charged.values()).count("dead")


def _check_changed(txn: Cursor, cmd_ids: Sequence[int]) -> None:
    """Refuse to go on where a command waits that was to be changed; it may be gone, or have been changed otherwise."""
    txn.execute(
        "select cmd_id from s2s.commands where cmd_id = any(%s::bigint[]) and status = 'ready'",
        (array_literal(cmd_ids),),
    )
    if txn.fetchone():
        raise refusal(txn, "update", "s2s.commands")
