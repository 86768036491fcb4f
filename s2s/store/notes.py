"""Table ``batch_notes``: which batch a worker has in hand (docs/protocol.rst, "Commands").

A note is committed before its batch runs, and struck in the batch's own transaction. One that outlives its process
names the commands that may have killed it.
"""

from __future__ import annotations

import itertools
from typing import Final

from s2s.store import commands
from s2s.store.driver import Cursor, lock_key

_CLAIMING: Final = lock_key("claiming")
_DIED: Final = "ProcessDied: the process ended while this command's batch ran"


def presence_key(boot_id: str) -> int:
    """Give the key of the session advisory lock that is held while the process ``boot_id`` lives."""
    return lock_key(f"presence {boot_id}")


def claim(txn: Cursor, boot_id: str, worker: int, limit: int) -> list[int]:
    """Choose a worker's next batch and note it. Its transaction must be committed before the batch runs.

    A command that failed before runs alone, so that what it does wrong it does to itself.

    :returns: the cmd_ids in run order, none of them in another note.
    """
    # One claim at a time, so that batches are disjoint. The note need not reach the disk: it is for the death of a
    # process, and when the database dies nobody is charged.
    txn.execute("set local synchronous_commit = off; select pg_advisory_xact_lock(%s)", (_CLAIMING,))
    strike(txn, boot_id, worker)
    found = commands.candidates(txn, limit)
    fresh = itertools.takewhile(lambda one: one[1] == 0, found)
    cmd_ids = [cmd_id for cmd_id, _ in fresh] or [cmd_id for cmd_id, _ in found[:1]]
    if cmd_ids:
        txn.execute(
            "insert into batch_notes (boot_id, worker, cmd_ids) values (%s, %s, %s::bigint[])",
            (boot_id, worker, cmd_ids),
        )
    return cmd_ids


def strike(txn: Cursor, boot_id: str, worker: int) -> None:
    """Remove a worker's note."""
    txn.execute("delete from batch_notes where boot_id = %s and worker = %s", (boot_id, worker))


def reap(txn: Cursor, boot_id: str) -> tuple[int, int]:
    """Charge one attempt to each command that a dead process had in hand, and remove its notes.

    A command that is locked is left for the next time: its dead process's connection may still be closing, and a
    command that kills must not get away uncharged.

    :param boot_id: our own, which is never reaped: our presence lock may just be on its way back.
    :returns: how many commands were charged, and how many of them are dead now.
    """
    txn.execute("select distinct boot_id from batch_notes where boot_id <> %s", (boot_id,))
    charged = dead = 0
    for (other,) in txn.fetchall():
        # Held to the end of the transaction, so that of two reapers one does it.
        txn.execute("select pg_try_advisory_xact_lock(%s)", (presence_key(other),))
        if txn.fetchone() == (True,):
            free = _reap(txn, other)
            charged += len(free)
            dead += commands.charge(txn, [(cmd_id, _DIED) for cmd_id in free])
    return charged, dead


def _reap(txn: Cursor, boot_id: str) -> list[int]:
    """Lock the commands to charge, and leave in the notes those that another has locked."""
    noted = "select distinct unnest(cmd_ids) from batch_notes where boot_id = %s"
    txn.execute(
        f"select cmd_id from commands where cmd_id in ({noted}) and status = 'ready' for update skip locked",  # noqa: S608
        (boot_id,),
    )
    free = [cmd_id for (cmd_id,) in txn]
    # What is charged leaves the notes; a note goes when nothing in it waits any more.
    txn.execute(
        "update batch_notes n set cmd_ids = array("
        " select c.cmd_id from commands c"
        " where c.cmd_id = any(n.cmd_ids) and c.status = 'ready' and not c.cmd_id = any(%s::bigint[]))"
        " where boot_id = %s",
        (free, boot_id),
    )
    txn.execute("delete from batch_notes where boot_id = %s and cmd_ids = '{}'", (boot_id,))
    return free
