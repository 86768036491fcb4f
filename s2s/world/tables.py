"""Tables ``sectors``, ``ports`` and ``ships``: the world that orders and jobs change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from s2s import Cursor, Report

#: The schema of the tables, in PostgreSQL.
SCHEMA: Final = "s2s_world"
#: The largest number of JSON, and of each id.
MAX_ID: Final = 2**53 - 1
STATUSES: Final = ("fedspace", "neutral", "port_closed")
#: The fields that ``update_all_ships`` may set, and their maximum values; the minimum is 0. The table checks them too.
SHIP_FIELDS: Final = {"turns": 1_000_000, "fuel": 10**9, "shields": 10**9, "hold_capacity": 10**9}


@dataclass(frozen=True)
class Counts:
    """The numbers of sectors, in all and by status, of ports and of ships."""

    sectors: int
    fedspace: int
    neutral: int
    port_closed: int
    ports: int
    ships: int
    ships_without_shields: int


#: The rows of the world, in one snapshot. Ships first, the same order in which every writer locks the tables, to avoid
#: deadlocks.
COUNTS: Final = Report(
    "world",
    "Count the sectors by their status, the ports and the ships",
    Counts,
    "select sectors, fedspace, neutral, closed, ports, ships, bare from"
    " (select count(*) as ships, count(*) filter (where shields = 0) as bare from s2s_world.ships) v,"
    " (select count(*) as ports from s2s_world.ports) p,"
    " (select count(*) as sectors, count(*) filter (where status = 'fedspace') as fedspace,"
    " count(*) filter (where status = 'neutral') as neutral,"
    " count(*) filter (where status = 'port_closed') as closed from s2s_world.sectors) s",
    at="/v1/world",
)


def is_empty(txn: Cursor) -> bool:
    """Return whether there is no sector, and therefore no port and no ship."""
    txn.execute("select from s2s_world.sectors limit 1")
    return txn.rowcount == 0


def set_sector_status(txn: Cursor, sector_id: int, status: str) -> str | None:
    """Set the status of a sector.

    :returns: its previous status; ``None``: there is no such sector.
    :raises RuntimeError: a trigger or rule of the table keeps the row unchanged.
    """
    txn.execute("select status from s2s_world.sectors where sector_id = %s for no key update", (sector_id,))
    found = txn.fetchone()
    if found is None:
        return None
    txn.execute("update s2s_world.sectors set status = %s where sector_id = %s returning status", (status, sector_id))
    if txn.fetchall() != [(status,)]:
        raise RuntimeError("the row of the sector stays unchanged: see the triggers and rules of s2s_world.sectors")
    return str(found[0])


def count_ships(txn: Cursor) -> tuple[int, int]:
    """Return the number of ships and the greatest ``ship_id``, or 0 if there is none."""
    txn.execute("select count(*), coalesce(max(ship_id), 0) from s2s_world.ships")
    count, last = txn.fetchone() or (0, 0)
    return int(count), int(last)


def end_of_batch(txn: Cursor, after: int, last: int, rows: int) -> int | None:
    """Return the last ``ship_id`` of the next batch of ships, in the order of their ids.

    :param after: the last ``ship_id`` of the batch before; 0 at first.
    :param last: the last ``ship_id`` of all batches.
    :param rows: the number of ships in a batch.
    :returns: ``None``: there are no more ships.
    """
    txn.execute(
        "select max(ship_id) from (select ship_id from s2s_world.ships where ship_id > %s and ship_id <= %s"
        " order by ship_id limit %s) batch",
        (after, last, rows),
    )
    end = (txn.fetchone() or (None,))[0]
    return None if end is None else int(end)


def update_ships(txn: Cursor, field: str, value: int, after: int, end: int) -> int:
    """Set one field of a batch of ships.

    :param field: one of :data:`SHIP_FIELDS`.
    :param after: the batch begins after this ``ship_id``, and ends with ``end``.
    :returns: the number of ships in the batch.
    :raises KeyError: there is no such field.
    """
    txn.execute(_UPDATE[field], (value, after, end))
    return txn.rowcount


#: The statement for each field: column names are constants, never input.
_UPDATE: Final = {
    field: f"update s2s_world.ships set {field} = %s where ship_id > %s and ship_id <= %s"  # noqa: S608 - a constant of ours
    for field in SHIP_FIELDS
}
