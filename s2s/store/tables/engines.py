"""Tables ``engines`` and ``engine_links``: the desired state of engines, and the links between servers and engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from s2s.store.driver import Cursor
from s2s.store.kept_rows import note, refusal
from s2s.store.tables import audit, claims

CHANNEL: Final = "s2s_engines"
#: Seconds after which a server writes its links again. After three times as long, a link counts as gone.
REFRESH_S: Final = 10.0
_STALE: Final = f"interval '{3 * REFRESH_S:g} seconds'"


@dataclass(frozen=True)
class LinkRow:
    """A proven link of a server.

    :param address: the address from which the engine connects.
    """

    key_id: str
    name: str
    engine_boot_id: str | None
    address: str


@dataclass(frozen=True)
class EngineRow:
    """An engine as operators see it; without a link the last four are ``None``.

    :param wanted: the desired state; ``None``: the engine is linked and does not share this database, so its desired
        state is in its own database.
    """

    name: str
    wanted: str | None
    reason: str
    key_id: str | None
    boot_id: str | None
    address: str | None
    linked_at: datetime | None


def wanted(txn: Cursor, name: str) -> tuple[str, str]:
    """Return the desired state, ``running`` or ``paused``, and its reason."""
    txn.execute("select wanted, reason from s2s.engines where name = %s", (name,))
    return txn.fetchone() or ("running", "")


def want(txn: Cursor, name: str, state: str, reason: str, actor: str) -> None:
    """Store the desired state of an engine: ``running`` or ``paused``. A repeat changes nothing.

    :param actor: the actor of the change, for the audit.
    """
    audit.sign(txn, actor)
    txn.execute(
        "insert into s2s.engines (name, wanted, reason) values (%s, %s, %s) on conflict (name) do update"
        " set wanted = excluded.wanted, reason = excluded.reason, changed_at = now()"
        " where engines.wanted <> excluded.wanted",
        (name, state, reason),
    )
    # An engine without a row is to run. A trigger may return the old row, which counts as written.
    if wanted(txn, name)[0] != state:
        raise refusal(txn, "insert or update", "s2s.engines")


def show_links(txn: Cursor, server_boot_id: str, links: Sequence[LinkRow]) -> None:
    """Replace the stored links of a server by the given ones. Also remove the links of servers that are gone."""
    columns = (
        [link.key_id for link in links],
        [link.name for link in links],
        [link.engine_boot_id for link in links],
        [link.address for link in links],
    )
    # No fsync is needed: links that a crash of the database loses are written again.
    txn.execute("set local synchronous_commit = off")
    txn.execute(
        "delete from s2s.engine_links l where (server_boot_id = %s and not exists (select"  # noqa: S608 - a constant
        " from unnest(%s::text[], %s::text[]) as n (key_id, name) where n.key_id = l.key_id and n.name = l.name))"
        f" or seen_at < now() - {_STALE}",
        (server_boot_id, *columns[:2]),
    )
    txn.execute(
        "insert into s2s.engine_links as l (server_boot_id, key_id, name, engine_boot_id, address)"
        " select %s, n.* from unnest(%s::text[], %s::text[], %s::text[], %s::text[]) as n"
        " on conflict (server_boot_id, key_id, name) do update set seen_at = now(), engine_boot_id ="
        " excluded.engine_boot_id, address = excluded.address, linked_at = case when l.address = excluded.address"
        " and l.engine_boot_id is not distinct from excluded.engine_boot_id then l.linked_at else now() end",
        (server_boot_id, *columns),
    )
    if txn.rowcount < len(links):
        note(txn, "insert or update", "s2s.engine_links")


def linked(txn: Cursor, names: Sequence[str]) -> set[str]:
    """Return the given engine names that have a link."""
    txn.execute(
        f"select distinct name from s2s.engine_links where name = any(%s) and seen_at >= now() - {_STALE}",  # noqa: S608
        (list(names),),
    )
    return {name for (name,) in txn}


def are_strangers(txn: Cursor) -> bool:
    """Whether engines are linked and none of them shares this database."""
    shares = [is_shared for _, is_shared in _shares(txn)]
    return bool(shares) and not any(shares)


def strangers(txn: Cursor) -> list[str]:
    """Return the names of the linked engines that do not share this database."""
    return sorted({name for name, is_shared in _shares(txn) if not is_shared})


def _shares(txn: Cursor) -> list[tuple[str, bool]]:
    """Return the name of each link's engine, and whether the engine shares this database."""
    txn.execute(f"select name, engine_boot_id from s2s.engine_links where seen_at >= now() - {_STALE}")  # noqa: S608 - a constant
    links = txn.fetchall()
    present = claims.present(txn, {boot_id for _, boot_id in links if boot_id})
    return [(name, boot_id in present) for name, boot_id in links]


def list_engines(txn: Cursor) -> list[EngineRow]:
    """List, by name, every engine that is linked or has a stored desired state."""
    txn.execute(
        "select name, coalesce(e.wanted, 'running'), coalesce(e.reason, ''), l.key_id, l.engine_boot_id, l.address,"  # noqa: S608
        f" l.linked_at from s2s.engines e full join (select * from s2s.engine_links where seen_at >= now() -"
        f" {_STALE}) l"
        " using (name) order by name, l.key_id"
    )
    rows = [EngineRow(*row) for row in txn.fetchall()]
    present = claims.present(txn, {row.boot_id for row in rows if row.boot_id})
    return [
        row if row.key_id is None or row.boot_id in present else replace(row, wanted=None, reason="") for row in rows
    ]
