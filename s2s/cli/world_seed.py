"""Make the first rows of the bundled world, for ``s2s world seed`` and ``s2s up``."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Final

from s2s.store import interruptible
from s2s.store.driver import Cursor, commit, lock_key
from s2s.store.kept_rows import check_written
from s2s.store.lock_wait import PATIENCE_S, LockWait
from s2s.store.tables import audit
from s2s.world import seed as rows_of
from s2s.world.tables import is_empty

#: The advisory lock that a transaction holds while it makes a world, so that only one world is made.
LOCK: Final = lock_key("world")


def make_world(
    txn: Cursor,
    sectors: int,
    ships: int,
    seed: int,
    *,
    replace: bool = False,
    progress: Callable[[int], object] = lambda rows: None,
    tell: Callable[[str], object] = lambda line: None,
) -> bool:
    """Make a world if there is none. If two sessions call it at once, only one makes a world.

    :param replace: remove the existing world first. This commits the earlier changes of the transaction, and then the
        new world.
    :param progress: called with the number of rows just written, of ``2 * sectors + ships`` in all.
    :param tell: called for sessions that hold locks needed by ``replace``: see :class:`~s2s.store.lock_wait.LockWait`.
    :returns: ``False``: a world exists already, and nothing was done.
    :raises OperatorError: other sessions held the locks for ``replace`` for too long.
    """
    if not replace:
        return _make(txn, sectors, ships, seed, replace, progress)
    # A try that gets no lock is rolled back: the actor set for the audit has to survive that.
    commit(txn.connection)
    locks = LockWait(txn.connection, tell, PATIENCE_S)
    with locks.watched():
        return locks.run(lambda txn: _make(txn, sectors, ships, seed, replace, progress))


def _make(txn: Cursor, sectors: int, ships: int, seed: int, replace: bool, progress: Callable[[int], object]) -> bool:
    txn.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
    if replace:
        txn.execute(rows_of.REMOVE)
    elif not is_empty(txn):
        return False
    for statement, lines, rows in rows_of.copies(sectors, ships, seed):
        with interruptible.copying():
            txn.copy_expert(statement, io.StringIO(lines))
        check_written(txn, "insert", statement.split()[1], rows)
        progress(txn.rowcount)
    txn.execute(rows_of.ANALYZE)
    made = {"sectors": sectors, "ports": sectors, "ships": ships, "seed": seed, "replace": replace}
    audit.write(txn, "world.seed", "world", made)
    return True
