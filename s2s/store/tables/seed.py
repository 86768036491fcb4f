"""The first rows of ``sectors``, ``ports`` and ``ships``, generated from a seed: the same on every machine."""

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

#: The advisory lock that a transaction holds while it makes a world, so that only one world is made.
LOCK: Final = lock_key("world")
#: Rows of one COPY. Bounds the memory of this process, the memory that PostgreSQL needs for the checks of foreign keys,
#: and the time of a statement.
CHUNK_ROWS: Final = 20_000

#: The number of the first sectors, which are ``fedspace``.
_FEDSPACE: Final = 10
#: The percentage of the other sectors that are ``port_closed``.
_CLOSED_PERCENT: Final = 2
_NAMES: Final = ("Anchorage", "Cluster", "Crossing", "Deep", "Drift", "Expanse", "Gate", "Haven", "Reach", "Shoal")
#: The commodities of ports, and their usual prices.
_COMMODITIES: Final = (("ore", 20), ("organics", 50), ("equipment", 120))
#: The maximum shields of four kinds of ships. By decay, some lose their last shield soon, others after hours.
_SHIELDS: Final = (3, 30, 300, 3000)
#: The maximum distance of stock and price from their base values, for a quarter of the ports.
_NEAR: Final = 3
_SHIPS_OF_A_PLAYER: Final = 4

#: Returns a uniformly distributed integer from 0 to below its argument.
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
    """Make a world if there is none: sectors numbered from 1, one port in each, and ships numbered from 1.

    The same sizes and seed make the same rows, byte for byte. If two sessions call it at once, only one makes a world.

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
        # Lock sectors last, in the same order as the jobs and the checks of foreign keys, so there is no deadlock.
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
    # Python guarantees the same sequence in every release only for random(), not for the other methods of Random.
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
        # The stock and price of some ports reach their base values within half a minute; others take many minutes.
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
    """Draw an integer from ``low`` to ``high`` other than ``base``, so that a port starts away from its base value."""
    drawn = low + draw(high - low)
    return drawn + (drawn >= base)


def _ships(draw: _Draw, count: int, sectors: int) -> Iterator[str]:
    players = -(-count // _SHIPS_OF_A_PLAYER)
    for ship_id in range(1, count + 1):
        yield (
            f"{ship_id}\t{1 + draw(players)}\t{1 + draw(sectors)}\t{draw(1001)}\t{draw(10_001)}"
            f"\t{1 + draw(_SHIELDS[draw(4)])}\t{10 * (1 + draw(50))}\n"
        )
