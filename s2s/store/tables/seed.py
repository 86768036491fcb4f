"""The first rows of ``sectors``, ``ports`` and ``ships``: made up of a seed, the same on every machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Final

from s2s.store import interruptible
from s2s.store.driver import Cursor, commit, lock_key
from s2s.store.kept_rows import check_written
from s2s.store.lock_wait import PATIENCE_S, LockWait
from s2s.store.tables import audit, world

#: Held by whoever makes a world, so that it is made once.
LOCK: Final = lock_key("world")
#: Rows of one COPY. It bounds the memory, here and of the checks of foreign keys there, and the time of a statement.
CHUNK_ROWS: Final = 20_000

#: Sectors that are ``fedspace``, the first ones.
_FEDSPACE: Final = 10
#: Of a hundred others, so many are ``port_closed``.
_CLOSED_PERCENT: Final = 2
_NAMES: Final = ("Anchorage", "Cluster", "Crossing", "Deep", "Drift", "Expanse", "Gate", "Haven", "Reach", "Shoal")
#: What ports deal in, and what it usually costs.
_COMMODITIES: Final = (("ore", 20), ("organics", 50), ("equipment", 120))
#: The greatest shields of four kinds of ships: some soon lose their last by decay, others after hours.
_SHIELDS: Final = (3, 30, 300, 3000)
#: How far a quarter of the ports are from their base, at most.
_NEAR: Final = 3
_SHIPS_OF_A_PLAYER: Final = 4

#: Gives an evenly distributed integer from 0 to below its argument.
_Draw = Callable[[int], int]


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
    """Make a world where there is none: sectors from 1, a port in each, and ships from 1.

    The same sizes and seed make the same rows, byte for byte. Of two that try at once, one makes it.

    :param replace: remove first what there is. What the transaction has done before is committed then, and so is this.
    :param progress: is called with the number of rows that were just written, of ``2 * sectors + ships`` in all.
    :param tell: of the sessions that hold the locks for ``replace``: see :class:`~s2s.store.lock_wait.LockWait`.
    :returns: ``False``: there is a world already, and nothing was done.
    :raises OperatorError: those locks were not free for too long.
    """
    if not replace:
        return _make(txn, sectors, ships, seed, replace, progress)
    # A try that gets no lock is rolled back: the signature for the audit has to outlive it.
    commit(txn.connection)
    locks = LockWait(txn.connection, tell, PATIENCE_S)
    with locks.watched():
        return locks.run(lambda txn: _make(txn, sectors, ships, seed, replace, progress))


def _make(txn: Cursor, sectors: int, ships: int, seed: int, replace: bool, progress: Callable[[int], object]) -> bool:
    txn.execute("select pg_advisory_xact_lock(%s)", (LOCK,))
    if replace:
        # Sectors last, as in the jobs and the checks of foreign keys: so nobody waits for us while we wait for him.
        txn.execute("truncate s2s_world.ships, s2s_world.ports, s2s_world.sectors")
    elif not world.is_empty(txn):
        return False
    for statement, rows in (
        ("copy s2s_world.sectors (sector_id, name, status) from stdin", _sectors(_draw(seed, "sectors"), sectors)),
        (
            "copy s2s_world.ports (port_id, sector_id, commodity, stock, base_stock, capacity,"
            " price, base_price, min_price, max_price) from stdin",
            _ports(_draw(seed, "ports"), sectors),
        ),
        (
            "copy s2s_world.ships (ship_id, player_id, sector_id, turns, fuel, shields, hold_capacity) from stdin",
            _ships(_draw(seed, "ships"), ships, sectors),
        ),
    ):
        while chunk := "".join(islice(rows, CHUNK_ROWS)):
            with interruptible.copying():
                txn.copy_expert(statement, io.StringIO(chunk))
            check_written(txn, "insert", statement.split()[1], chunk.count("\n"))
            progress(txn.rowcount)
    txn.execute("analyze s2s_world.sectors, s2s_world.ports, s2s_world.ships")
    made = {"sectors": sectors, "ports": sectors, "ships": ships, "seed": seed, "replace": replace}
    audit.write(txn, "world.seed", "world", made)
    return True


def _draw(seed: int, table: str) -> _Draw:
    # Python promises the same numbers of random() in every release, and of nothing else that Random has.
    number = Random(f"{table} {seed}").random  # noqa: S311 - a world, not a secret

    def draw(below: int) -> int:
        return int(number() * below)

    return draw


# --- rows, as COPY reads them ------------------------------------------------------------------------------------


def _sectors(draw: _Draw, count: int) -> Iterator[str]:
    for sector_id in range(1, count + 1):
        name = _NAMES[draw(len(_NAMES))]
        status = "port_closed" if draw(100) < _CLOSED_PERCENT else "neutral"
        yield f"{sector_id}\t{name} {sector_id}\t{'fedspace' if sector_id <= _FEDSPACE else status}\n"


def _ports(draw: _Draw, count: int) -> Iterator[str]:
    for port_id in range(1, count + 1):
        commodity, usual = _COMMODITIES[draw(len(_COMMODITIES))]
        capacity = 1000 * (1 + draw(10))
        base_stock = capacity // 4 + draw(capacity // 2)
        # Some arrive within half a minute, others take many.
        reach = _NEAR if draw(4) == 0 else capacity
        stock = _other_than(base_stock, max(0, base_stock - reach), min(capacity, base_stock + reach), draw)
        base_price = usual - usual // 4 + draw(usual // 2)
        low, high = base_price // 2, base_price * 2
        price = _other_than(base_price, max(low, base_price - reach), min(high, base_price + reach), draw)
        yield (
            f"{port_id}\t{port_id}\t{commodity}\t{stock}\t{base_stock}\t{capacity}"
            f"\t{price}\t{base_price}\t{low}\t{high}\n"
        )


def _other_than(base: int, low: int, high: int, draw: _Draw) -> int:
    """Draw from ``low`` to ``high``, and never ``base``: a port begins with a way to go."""
    drawn = low + draw(high - low)
    return drawn + (drawn >= base)


def _ships(draw: _Draw, count: int, sectors: int) -> Iterator[str]:
    players = -(-count // _SHIPS_OF_A_PLAYER)
    for ship_id in range(1, count + 1):
        yield (
            f"{ship_id}\t{1 + draw(players)}\t{1 + draw(sectors)}\t{draw(1001)}\t{draw(10_001)}"
            f"\t{1 + draw(_SHIELDS[draw(4)])}\t{10 * (1 + draw(50))}\n"
        )
