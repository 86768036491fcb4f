"""The first rows of ``sectors``, ``ports`` and ``ships``, generated from a seed: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Final

#: Removes a world. Sectors last, in the same order as the jobs and the checks of foreign keys, so there is no deadlock.
REMOVE: Final = "truncate s2s_world.ships, s2s_world.ports, s2s_world.sectors"
#: To run after the rows are written, so that queries are planned for them.
ANALYZE: Final = "analyze s2s_world.sectors, s2s_world.ports, s2s_world.ships"
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


def copies(sectors: int, ships: int, seed: int) -> Iterator[tuple[str, str, int]]:
    """Yield the rows of a world: sectors numbered from 1, one port in each, and ships numbered from 1.

    The same sizes and seed yield the same rows, byte for byte.

    :returns: statements of COPY from stdin, each with its input and the number of its rows.
    """
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
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield statement, "".join(chunk), len(chunk)


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
