"""Table ``batch_notes``: the batch that each worker has claimed (docs/protocol.rst, "Commands").

A worker commits a note before its batch runs, and deletes the note in the transaction of the batch. A note that
outlives its process lists the commands that may have killed the process.

**How is a dead process detected?** A process holds its presence lock, a session advisory lock, on its listening
connection. The lock is free when the process is dead, but also briefly while a living process reconnects, and for every
process after a restart of the database. A reaper therefore charges a note only under two conditions: it saw the same
note (same ``noted_at``) with a free lock at two scans, :data:`s2s.roles.server.reaper.SURE_S` apart; and it held its
own presence lock on one connection in between. Then the database was up all the time, and a living process had the time
to notice its dead connection and to reconnect.

**What if the process is alive after all?** A process that is cut off for longer cannot be distinguished from a dead
one. Such a mistake may cost a command an attempt, but it never causes a second run, because the locks of the commands
exclude the reaper and the worker from each other. A running batch holds these locks, and the reaper skips it. A batch
that still waits for a thread locks its commands when it begins, then reads its note again (:func:`claimed`), and does
not run the commands that were removed from the note. A claim whose COMMIT had an unknown outcome is never run: the next
claim of the worker deletes its note. The note itself is not locked while the batch runs; otherwise a process that stops
in a hurry could not release it (:func:`release_all`).

**What does an orderly stop leave behind?** The commands that it interrupts are free at once, and each counts the stop,
so that a command that stops its process is found out. The shutdown cannot write to a command that a handler of the
process still has locked. The note of such a command stays, marked as ``stopped``, and the next scan of any reaper
counts the stop.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence, Set
from datetime import datetime
from typing import Final, NamedTuple

from s2s.errors import StatementRefused
from s2s.store.driver import Cursor, advisory_lock, array_literal, lock_key, refusable
from s2s.store.kept_rows import check_written, refusal, still_there
from s2s.store.kept_rows import note as note_kept
from s2s.store.tables import commands
from s2s.store.tables.commands import Charge
from s2s.store.tables.ready import Candidate, Ready

_CLAIMING: Final = lock_key("claiming")
_REAPING: Final = lock_key("reaping")
_DIED: Final = "ProcessDied: the process ended while this command's batch ran"
#: A command that was alone in its batch probably ended the process, so the death counts as a failure. This also
#: happens, now and then, to a command that another worker had, and to the last command of a batch whose other commands
#: were charged at an earlier scan.
_DIED_ALONE: Final = "ProcessDied: the process ended while this command ran alone"
_STUCK: Final = "Stuck: the process did not finish this command's batch in time"
_STOPPED: Final = "the process was stopped"
_OF_WORKER: Final = "boot_id = %s and worker = %s and (%s = 0 or note_id = %s)"
#: Seconds that a note may exist without locked commands: longer than the database lets any transaction idle.
OVERSTAY_S: Final = 90.0


class Claim(NamedTuple):
    """The identity of one note: the worker's next note has another time."""

    boot_id: str
    worker: int
    noted_at: datetime


class Scan(NamedTuple):
    """The result of a reaper's scan.

    :param presence: the start of the connection that holds the reaper's own presence lock; ``None``: the lock is not
        held, and the reaper cannot charge anything.
    :param orphaned: the notes of other processes whose presence lock is free.
    :param charged: how many commands were charged an attempt.
    :param dead: how many of the charged commands are dead now.
    """

    presence: datetime | None
    orphaned: Set[Claim] = frozenset()
    charged: int = 0
    dead: int = 0


def presence_key(boot_id: str) -> int:
    """Return the key of the session advisory lock that the process ``boot_id`` holds while it lives."""
    return lock_key(f"presence {boot_id}")


def present(txn: Cursor, boot_ids: Set[str]) -> set[str]:
    """Return the given processes, by ``boot_id``, that hold their presence lock now."""
    held = _held(txn) if boot_ids else {}
    return {boot_id for boot_id in boot_ids if presence_key(boot_id) in held}


def _held(txn: Cursor) -> dict[int, datetime]:
    """Return the advisory locks held in this database, each with the start of its holder's connection."""
    # A default role of our user may not be allowed to see the start of its own sessions.
    txn.execute(
        "set local role none; select l.classid::bigint << 32 | l.objid::bigint, a.backend_start"
        " from pg_locks l left join pg_stat_activity a using (pid)"
        " where l.locktype = 'advisory' and l.objsubid = 1 and l.granted"
        " and l.database = (select oid from pg_database where datname = current_database())"
    )
    held = dict(txn.fetchall())
    txn.execute("reset role")
    return held


def claim(
    txn: Cursor,
    boot_id: str,
    worker: int,
    limit: int,
    lone: Container[int] = (),
    doubtful: Container[int] = (),
    ready: Ready | None = None,
) -> list[int]:
    """Choose the next batch of a worker and note it. Commit the transaction before the batch runs.

    :param lone: commands that run alone, besides those with ``runs_alone``.
    :param doubtful: commands to treat as if they had failed before.
    :param ready: the commands that this process may run next; all commands by default.
    :returns: the cmd_ids in run order, none of them in another note.
    """
    ready = ready or Ready()
    # The note need not reach the disk: it records the death of a process, and a crash of the database charges no one.
    # Use the index whatever the statistics say: the table is nearly empty, except for dead rows that a snapshot keeps.
    # Delete before taking the lock that all claims need: a lost connection of ours may still hold the note.
    txn.execute(
        "set local synchronous_commit = off; set local enable_seqscan = off;"
        " delete from s2s.batch_notes where boot_id = %s and worker = %s and note_id >= %s",
        (boot_id, worker, ready.first_note),
    )
    ready.look_back(txn, limit)
    # One claim at a time, so that the batches are disjoint.
    advisory_lock(txn, _CLAIMING)
    found = ready.candidates(txn, limit)
    cmd_ids = batch_of(found, lone, doubtful)
    if cmd_ids:
        txn.execute(
            # A claim whose connection was lost may have been committed since the delete above.
            "with late as (delete from s2s.batch_notes where boot_id = %s and worker = %s and note_id >= %s)"
            " insert into s2s.batch_notes (boot_id, worker, cmd_ids) values (%s, %s, %s::bigint[]) returning note_id",
            (boot_id, worker, ready.first_note, boot_id, worker, array_literal(cmd_ids)),
        )
        check_written(txn, "insert", "s2s.batch_notes")
        ((note_id,),) = txn.fetchall()
        ready.noted(worker, note_id)
    return cmd_ids


def batch_of(found: Sequence[Candidate], lone: Container[int] = (), doubtful: Container[int] = ()) -> list[int]:
    """Choose the batch that begins with the first of the candidates.

    A batch contains one command that runs alone, or commands that failed before, or commands that did not. A command
    that is likely to fail again thus fails after few that succeed, and a failure after a success costs another run
    (:mod:`s2s.roles.server.executor`). A batch steps over a command of another sort, but not to a lower priority.

    :param found: the candidates in run order.
    :param lone: see :func:`claim`.
    :param doubtful: see :func:`claim`.
    :returns: the cmd_ids in run order.
    """

    def sort(each: Candidate) -> str:
        if each.runs_alone or each.cmd_id in lone:
            return "alone"
        return "again" if each.attempts or each.cmd_id in doubtful else "new"

    first = next(iter(found), None)
    if first is None or sort(first) == "alone":
        return [each.cmd_id for each in found[:1]]
    cmd_ids = []
    last_priority: float = math.inf
    for each in found:
        if each.priority > last_priority:
            break
        if sort(each) == sort(first):
            cmd_ids.append(each.cmd_id)
        else:
            last_priority = min(last_priority, each.priority)
    return cmd_ids


def claimed(txn: Cursor, boot_id: str, worker: int, note_id: int = 0) -> tuple[list[int], int]:
    """Return the cmd_ids of a worker's note as it is now, and the id of this transaction.

    :param note_id: the id of the note; 0: not known. With an id, the dead notes that a snapshot keeps are not read.
    """
    txn.execute(
        f"select cmd_ids, txid_current() from s2s.batch_notes where {_OF_WORKER}",  # noqa: S608
        (boot_id, worker, note_id, note_id),
    )
    rows = txn.fetchall()
    return [cmd_id for cmd_ids, _ in rows for cmd_id in cmd_ids], rows[0][1] if rows else 0


def is_committed(txn: Cursor, xid: int) -> bool:
    """Return whether another transaction was committed.

    :param xid: its id, as returned by :func:`claimed`.
    """
    txn.execute("select txid_status(%s)", (xid,))
    return bool(txn.fetchone() == ("committed",))


def release(txn: Cursor, boot_id: str, worker: int, note_id: int = 0) -> None:
    """Delete a worker's note; see :func:`claimed`."""
    params = (boot_id, worker, note_id, note_id)
    txn.execute(f"delete from s2s.batch_notes where {_OF_WORKER}", params)  # noqa: S608
    if not txn.rowcount:
        txn.execute(f"select from s2s.batch_notes where {_OF_WORKER}", params)
        if txn.fetchall():
            note_kept(txn, "delete", "s2s.batch_notes")


def keep_stuck(txn: Cursor, boot_id: str, worker: int, cmd_ids: Sequence[int]) -> None:
    """Reduce a worker's note to the commands whose handler does not return.

    No worker claims these commands while the note exists. The other commands are free once the batch's transaction
    ends.
    """
    txn.execute(
        "update s2s.batch_notes set cmd_ids = %s::bigint[], stuck = true where boot_id = %s and worker = %s",
        (array_literal(cmd_ids), boot_id, worker),
    )
    if not txn.rowcount:
        still_there(txn, "update", "s2s.batch_notes", "boot_id", [boot_id], f"worker = {int(worker)}")


def release_all(txn: Cursor, boot_id: str) -> None:
    """Release all notes of a process in an orderly shutdown, so that its unfinished commands do not count as dead.

    The stop is counted for each of these commands (:func:`commands.count_stops`). A command that a session still holds
    stays in its note, and a reaper counts it later.
    """
    # The commands of a stuck note were charged when their handler did not return.
    txn.execute("delete from s2s.batch_notes where boot_id = %s and stuck", (boot_id,))
    txn.execute("update s2s.batch_notes set stopped = true where boot_id = %s", (boot_id,))
    still_there(txn, "update", "s2s.batch_notes", "boot_id", [boot_id], "not stopped")
    _count_stops(txn, 0)


def reap(txn: Cursor, boot_id: str, presence: datetime | None, sure: Set[Claim], first_note: int = 0) -> Scan:
    """Find the notes of dead processes, and charge an attempt to each command of the notes that are certain by now.

    Also charge the commands of a living process, including this one, that were noted for longer than any transaction
    lasts: a handler that hangs must not hold the commands noted with it. A batch that still runs has its commands
    locked, and they are skipped.

    :param boot_id: the ``boot_id`` of this process.
    :param presence: our presence at the scans that made ``sure``; if it has changed, no command is charged.
    :param sure: the notes that were seen with a free lock long enough ago.
    :param first_note: see :class:`s2s.store.tables.ready.Ready`; dead notes with a lower id are not read.
    """
    charged, dead_now = _count_stops(txn, first_note)
    # Read the notes before the locks: a process takes its lock before it notes a batch.
    txn.execute(
        "set local enable_seqscan = off; select boot_id, worker, noted_at, stuck, cardinality(cmd_ids) = 1,"
        " noted_at < now() - %s * interval '1 second' from s2s.batch_notes where note_id >= %s and not stopped",
        (OVERSTAY_S, first_note),
    )
    rows = [(Claim(*row[:3]), *row[3:]) for row in txn]
    stuck_notes = {note for note, is_stuck, _, _ in rows if is_stuck}
    single_notes = {note for note, _, is_single, _ in rows if is_single}
    notes = {note: is_over and not is_stuck for note, is_stuck, _, is_over in rows}
    held = _held(txn)
    now = held.get(presence_key(boot_id))
    if now is None:
        return Scan(None, frozenset(), charged, dead_now)
    orphaned = {note for note in notes if note.boot_id != boot_id and presence_key(note.boot_id) not in held}
    dead = {note: _DIED_ALONE if note in single_notes else _DIED for note in orphaned & sure}
    # Only if the database was up all the time: after a restart, a note is as old as the outage was long.
    overdue = [note for note, is_over in notes.items() if is_over]
    stuck = dict.fromkeys(overdue if overdue and _is_older(txn, now) else (), _STUCK)
    guilty = {**stuck, **dead}
    if now != presence or not guilty or not _is_alone(txn):
        return Scan(now, orphaned, charged, dead_now)
    for note in stuck_notes & guilty.keys():
        # The commands of a stuck note were charged when their handler did not return.
        txn.execute("delete from s2s.batch_notes where (boot_id, worker, noted_at) = %s", (note,))
        del guilty[note]
    counts = [(charged, dead_now), *(_charge(txn, note, why) for note, why in guilty.items())]
    return Scan(now, orphaned, sum(charged for charged, _ in counts), sum(dead for _, dead in counts))


def _count_stops(txn: Cursor, first_note: int) -> tuple[int, int]:
    """Free the commands of stopped processes, and count the stop for each.

    :returns: how many commands were charged, and how many of them are dead now.
    """
    txn.execute(
        "set local enable_seqscan = off; select boot_id, worker, noted_at, cardinality(cmd_ids) = 1"
        " from s2s.batch_notes where note_id >= %s and stopped",
        (first_note,),
    )
    notes = {Claim(*row[:3]): row[3] for row in txn}
    if not notes or not _is_alone(txn):
        return 0, 0
    counts = [_charge(txn, note, _STOPPED, is_single) for note, is_single in notes.items()]
    return sum(charged for charged, _ in counts), sum(dead for _, dead in counts)


def _charge(txn: Cursor, note: Claim, why: str, is_single: bool = False) -> tuple[int, int]:
    """Charge the commands of a note; if the database refuses that, free them uncharged.

    :param why: the error of the commands; :data:`_STOPPED`: count a stop instead.
    :returns: how many commands were charged, and how many of them are dead now.
    """
    try:
        with refusable(txn):
            cmd_ids = _reap(txn, note)
            if why == _STOPPED:
                return commands.count_stops(txn, cmd_ids, is_single)
            charges = [Charge(cmd_id, why, is_death=why == _DIED) for cmd_id in cmd_ids]
            return len(cmd_ids), commands.charge(txn, charges)
    except StatementRefused:
        # The worker that claims the unchangeable command later leaves it out.
        txn.execute("delete from s2s.batch_notes where (boot_id, worker, noted_at) = %s", (note,))
        return 0, 0


def _is_older(txn: Cursor, presence: datetime) -> bool:
    txn.execute("select %s < now() - %s * interval '1 second'", (presence, OVERSTAY_S))
    return bool(txn.fetchone() == (True,))


def _is_alone(txn: Cursor) -> bool:
    """Exclude other reapers until the transaction ends, so that two of them do not charge one death twice."""
    txn.execute("select pg_try_advisory_xact_lock(%s)", (_REAPING,))
    return bool(txn.fetchone() == (True,))


def _reap(txn: Cursor, note: Claim) -> list[int]:
    """Lock the commands to charge, and leave in the note the commands that another session has locked.

    The remaining commands wait for the next scan: the connection of their dead process may still be closing, and a
    command that kills its process must be charged.
    """
    txn.execute(
        "select cmd_id from s2s.commands where status = 'ready' and cmd_id in"
        " (select unnest(cmd_ids) from s2s.batch_notes where (boot_id, worker, noted_at) = %s) for update skip locked",
        (note,),
    )
    free = [cmd_id for (cmd_id,) in txn]
    # A charged command leaves the note. Delete the note when none of its commands is ready any more.
    txn.execute(
        "update s2s.batch_notes n set cmd_ids = array("
        " select c.cmd_id from s2s.commands c"
        " where c.cmd_id = any(n.cmd_ids) and c.status = 'ready' and not c.cmd_id = any(%s::bigint[]))"
        " where (boot_id, worker, noted_at) = %s returning cmd_ids && %s::bigint[]",
        (free, note, free),
    )
    if free and txn.fetchall() != [(False,)]:
        # Otherwise each scan would charge the commands again.
        raise refusal(txn, "update", "s2s.batch_notes")
    txn.execute("delete from s2s.batch_notes where (boot_id, worker, noted_at) = %s and cmd_ids = '{}'", (note,))
    return free
