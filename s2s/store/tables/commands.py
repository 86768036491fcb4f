"""Table ``commands``: accepting, claiming and finishing (docs/protocol.rst, "Commands")."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from s2s.errors import DatabaseError, StatementRefused
from s2s.store import driver
from s2s.store.driver import Cursor, Query, Steps, array_literal
from s2s.store.kept_rows import refusal
from s2s.store.tables import idempotency
from s2s.store.tables.singly import singly

#: Failed attempts, without deaths of the process, after which a command is dead.
MAX_ATTEMPTS: Final = 10
#: Failed attempts, with deaths of the process, after which a command is dead. It is higher than MAX_ATTEMPTS because
#: most commands that are charged for a death did not cause it.
MAX_CHARGES: Final = 50
#: Orderly stops that interrupt a command uncharged. A restart of several servers, one after another, may stop each
#: server in turn that has taken a long command. From the last of these stops on, the command runs alone.
MOST_STOPS: Final = 3
#: The longest pause between two attempts, in seconds: after a failure, and after the death of the process.
MAX_BACKOFF_S: Final = 300
MAX_DEATH_BACKOFF_S: Final = 10


# --- accepting -------------------------------------------------------------------------------------------------------


class Push(msgspec.Struct, frozen=True):
    """A pushed command that is not stored yet.

    :param fingerprint: SHA-256 of the canonical ``{cmd_type, payload}``.
    :param payload: canonical JSON.
    :param due_at: Unix seconds; ``None``: due at once.
    :param cmd_id: an id drawn for the command beforehand, or ``None``.
    """

    cmd_type: str
    idem_key: str
    fingerprint: bytes
    payload: str
    priority: int = 100
    due_at: int | None = None
    cmd_id: int | None = None


class Outcome(msgspec.Struct, frozen=True):
    """The result of a push.

    :param cmd_id: the id of the first command with this ``idem_key``.
    :param status: the status of that command.
    :param is_new: this push inserted the command.
    :param is_conflict: the first command has another fingerprint.
    """

    cmd_id: int
    status: str
    is_new: bool = False
    is_conflict: bool = False


#: The most rounds of insert and read for one batch of pushes. A further round follows if retention removed a key in
#: between.
_MOST_ROUNDS: Final = 3
_NEXT: Final = "nextval('s2s.commands_cmd_id_seq')"
#: An SQL expression that fails if the key was inserted and its command was not: the push would be answered and lost.
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

# One push alone: the statement needs no sort and no join of input arrays, and returns only the new cmd_id.
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
    """Return the query that accepts one push alone, if its key is new.

    :returns: the query; pass its rows to :func:`pushed_one`.
    """
    assert push.cmd_id is None
    return Query(
        _INSERT_ONE, (push.idem_key, push.fingerprint, push.cmd_type, push.payload, push.priority, push.due_at)
    )


def pushed_one(rows: Sequence[tuple[int]]) -> Outcome | None:
    """Return the outcome of :func:`push_one`; ``None``: its key is known, so use :func:`push_batch`."""
    return Outcome(rows[0][0], "ready", is_new=True) if rows else None


def push_batch(pushes: Sequence[Push]) -> Steps[list[Outcome]]:
    """Accept pushes in their order of arrival, in a constant number of statements.

    Each statement may commit by itself: the first one inserts all new commands or none, and the others only read.

    :returns: one outcome for each push, in the same order.
    :raises StatementRefused: the database neither inserts nor shows a key. The other new pushes are accepted all the
        same.
    """
    # If a key occurs twice in the batch, only its first push goes to the database.
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
        # A separate statement: the snapshot of the insert does not show a row that another transaction has just
        # committed.
        others = [key for key in unsettled if key not in made]
        known |= (yield from idempotency.firsts(others)) if others else {}
        # A key is in neither only if retention removed it in between, or if a user's trigger, rule or policy hides the
        # row.
        unsettled = {key: first[key] for key in others if key not in known}
    if unsettled:
        raise StatementRefused(
            "the insert of an idem_key had no effect, and the key does not exist: see the triggers, rules and policies"
            " of idempotency_keys"
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
    """Accept pushes one by one, after the database refused one of the batch, or another session locked a row of one.

    :returns: for each push its outcome or error (:func:`s2s.store.tables.singly.singly`), in the same order.
    """
    txn.execute(f"select {_NEXT} from generate_series(1, %s)", (len(pushes),))  # noqa: S608
    drawn = [
        msgspec.structs.replace(push, cmd_id=cmd_id) for push, (cmd_id,) in zip(pushes, txn.fetchall(), strict=True)
    ]
    # In the order of the keys, as a batch takes its locks. The sort is stable, so the first push of a repeated key
    # wins.
    places = sorted(range(len(drawn)), key=lambda place: drawn[place].idem_key)
    written = singly(txn, places, lambda place: driver.drive(txn, push_batch([drawn[place]]))[0])
    outcomes = dict(zip(places, written, strict=True))
    return [outcomes[place] for place in range(len(drawn))]


def _insertion(pushes: Collection[Push]) -> Query:
    """Return the query that inserts pushes of different keys; its rows are ``idem_key``, ``cmd_id`` of the new ones."""
    # Pass each column as one text: psycopg2 writes a list as an expression, which the database parses value by value.
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
    """Join texts by line breaks: keys and types cannot contain one, and canonical JSON escapes it."""
    lines = "\n".join(values)
    if lines.count("\n") >= len(values):
        raise ValueError("a line break in a key, a type or a payload")
    return lines


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command as its handler receives it.

    :param idem_key: the key for effects outside this database, which may happen more than once.
    :param attempts: the number of failed attempts before.
    """

    cmd_id: int
    cmd_type: str
    idem_key: str
    payload: dict[str, Any]
    attempts: int
    priority: int


def take(txn: Cursor, cmd_ids: Sequence[int]) -> list[Command]:
    """Lock the given commands that are still ready and that no other session has locked, in run order."""
    txn.execute(
        "select cmd_id, cmd_type, idem_key, payload, attempts, priority from s2s.commands"
        " where cmd_id = any(%s::bigint[]) and status = 'ready' order by priority, due_at, cmd_id"
        " for update skip locked",
        (array_literal(cmd_ids),),
    )
    return [Command(*row) for row in txn]


def finish(txn: Cursor, cmd_ids: Sequence[int]) -> None:
    """Mark commands as done.

    :raises StatementRefused: a trigger kept a row unchanged. The command would run again and its effect would be
        doubled.
    """
    txn.execute(
        "update s2s.commands set status = 'done', finished_at = now() where cmd_id = any(%s::bigint[])"
        # A trigger may also return the old row, which counts as written.
        " returning nullif(status, 'done')",
        (array_literal(cmd_ids),),
    )
    if txn.fetchall().count((None,)) < len(cmd_ids):
        _check_changed(txn, cmd_ids)


class Charge(NamedTuple):
    """A failed attempt of a command.

    :param is_death: the process died.
    :param runs_alone: the command runs alone from now on, since its attempt has ended the attempts of others, or would
        have. ``False``: a rollback to a savepoint has undone the attempt.
    """

    cmd_id: int
    error: str
    is_death: bool = False
    runs_alone: bool = True


def charge(txn: Cursor, charges: Collection[Charge]) -> int:
    """Count a failed attempt of ready commands: each one becomes due after a pause, or dead.

    :returns: how many of the commands are dead now.
    :raises StatementRefused: a trigger kept a row unchanged.
    """
    txn.execute(
        "update s2s.commands c set attempts = f.attempts, deaths = f.deaths, error = f.error,"
        " runs_alone = nullif(c.runs_alone is true or f.alone, false),"
        " status = case when f.is_last then 'dead' else 'ready' end, finished_at = case when f.is_last then now() end,"
        " due_at = clock_timestamp() + random() * interval '1 second' * least(power(2, least(f.attempts, 60)),"
        " case when f.died then %(death_pause)s else %(longest)s end)"
        " from (select cmd_id, failed.error, died, alone, commands.attempts as before, o.attempts, o.deaths,"
        "  o.attempts >= %(charges)s or o.attempts - o.deaths >= %(attempts)s as is_last"
        "  from s2s.commands join unnest(%(ids)s::bigint[], %(errors)s::text[], %(died)s::boolean[],"
        "  %(alone)s::boolean[]) as failed (cmd_id, error, died, alone) using (cmd_id),"
        # A row that was written by hand may have the largest possible numbers.
        "  lateral (select least(attempts, 1000000) + 1, least(deaths, 1000000) + died::integer) o (attempts, deaths)"
        " ) f"
        " where c.cmd_id = f.cmd_id and c.status = 'ready'"
        # A trigger may also return the old row, which counts as written. No time is compared: a clock may be set back.
        " returning c.cmd_id, c.status, c.status = 'dead' or c.attempts > f.before",
        {
            "attempts": MAX_ATTEMPTS,
            "charges": MAX_CHARGES,
            "longest": MAX_BACKOFF_S,
            "death_pause": MAX_DEATH_BACKOFF_S,
            "ids": [each.cmd_id for each in charges],
            "errors": [each.error for each in charges],
            "died": [each.is_death for each in charges],
            "alone": [each.runs_alone for each in charges],
        },
    )
    charged = {cmd_id: status for cmd_id, status, is_changed in txn.fetchall() if is_changed}
    if missing := [each.cmd_id for each in charges if each.cmd_id not in charged]:
        _check_changed(txn, missing)
    return list(charged.values()).count("dead")


def count_stops(txn: Cursor, cmd_ids: Collection[int], ran_alone: bool) -> tuple[int, int]:
    """Count an orderly stop that interrupted ready commands. Charge a command that was interrupted too often.

    :param ran_alone: the command was alone in its batch; otherwise none is charged.
    :returns: how many commands were charged, and how many of them are dead now.
    :raises StatementRefused: a trigger kept a row unchanged.
    """
    txn.execute(
        "update s2s.commands c set stops = f.stops,"
        " runs_alone = nullif(c.runs_alone is true or f.stops >= %s, false)"
        " from (select cmd_id, stops as before, least(coalesce(stops, 0), 1000000) + 1 as stops from s2s.commands"
        "  where cmd_id = any(%s::bigint[])) f"
        " where c.cmd_id = f.cmd_id and c.status = 'ready'"
        # A trigger may also return the old row, which counts as written.
        " returning case when c.stops is distinct from f.before then c.cmd_id end, c.stops",
        (MOST_STOPS, array_literal(cmd_ids)),
    )
    stops = dict(txn.fetchall())
    if missing := [cmd_id for cmd_id in cmd_ids if cmd_id not in stops]:
        _check_changed(txn, missing)
    charges = [
        Charge(cmd_id, f"ProcessStopped: {times} times the process was stopped while this command ran, now alone")
        for cmd_id, times in stops.items()
        if ran_alone and times > MOST_STOPS
    ]
    return len(charges), charge(txn, charges) if charges else 0


def _check_changed(txn: Cursor, cmd_ids: Sequence[int]) -> None:
    """Raise if one of the commands is still ready; a command that is gone or has another status is no error."""
    txn.execute(
        "select cmd_id from s2s.commands where cmd_id = any(%s::bigint[]) and status = 'ready'",
        (array_literal(cmd_ids),),
    )
    if txn.fetchone():
        raise refusal(txn, "update", "s2s.commands")
