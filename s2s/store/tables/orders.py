"""Table ``orders``: admin RPCs for an engine (docs/protocol.rst, "Orders").

The row is authoritative: an engine runs an order only while it has locked the open row, and uses the row's params. A
step takes two transactions, as with jobs (:mod:`s2s.store.tables.jobs`). The table's triggers write the audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any, Final

from psycopg2.extras import Json

from s2s.errors import CanonicalError, IdemConflict
from s2s.protocol import canonical
from s2s.protocol.limits import Bounds
from s2s.store.cursor import Unreadable
from s2s.store.driver import Cursor, advisory_lock, lock_key
from s2s.store.kept_rows import note, refusal
from s2s.store.tables import claims
from s2s.store.tables.fitting import fitting, jsonb_size
from s2s.store.tables.jobs import ONE_MORE, PAUSE, change_row, check_changed, has_next_attempt, hold_row, next_attempt

CHANNEL: Final = "s2s_orders"
#: Notified when an order is over.
OVER_CHANNEL: Final = "s2s_orders_over"
#: The status of an order that is not over.
OPEN: Final = ("queued", "running")
#: Seconds for which an engine leaves an order to run a job that it lacks to an engine that has the job: longer than an
#: engine's interval between looks at the table, shorter than an operator waits.
LEFT_S: Final = 20.0
_ATTEMPTING: Final = lock_key("attempting an order")


@dataclass(frozen=True)
class Order:
    """An order in progress.

    :param created_at: Unix seconds.
    :param state: where the order continues and its progress; empty until it runs.
    :param attempts: the number of attempts since the last progress, with this one.
    :param retry_at: unique to each attempt, so that it shows whether this attempt still belongs to the caller.
    :param place: the ``ctid`` of its row at that time, see :class:`s2s.store.tables.jobs.DueJob`.
    """

    order_id: str
    rpc: str
    params: dict[str, Any]
    actor: str
    status: str
    result: dict[str, Any] | None
    state: Mapping[str, Any]
    attempts: int
    created_at: int
    retry_at: datetime | None = None
    place: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the order is queued or running."""
        return self.status in OPEN


_ORDER: Final = (
    "order_id, rpc, params, actor, status, result, case status when 'running' then state else '{}' end, attempts,"
    " floor(extract(epoch from created_at))::bigint, retry_at, ctid::text"
)


@dataclass(frozen=True)
class OrderRow:
    """An order as operators see it.

    :param engine: the name of the engine that ran it last.
    :param way: ``link`` or ``table``: how the engine received it.
    """

    order_id: str
    rpc: str
    params: dict[str, Any]
    actor: str
    idem_key: str | None
    status: str
    result: dict[str, Any] | None
    state: dict[str, Any] | None
    attempts: int
    engine: str | None
    way: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


_ROW: Final = ", ".join(field.name for field in fields(OrderRow))


# --- giving ----------------------------------------------------------------------------------------------------------


def give(
    txn: Cursor,
    order_id: str,
    rpc: str,
    params: Mapping[str, Any],
    actor: str,
    idem_key: str | None = None,
    *,
    by_link: bool = False,
) -> tuple[Order, bool]:
    """Insert an order, with its audit entry, unless it exists already.

    :param params: valid, without the ``order_id``.
    :param idem_key: an existing order with this key is the same order, whatever its id.
    :param by_link: the order came over a link. Otherwise an engine with a link leaves it to the link
        for a while.
    :returns: the order, and whether it is new.
    :raises IdemConflict: the id or the key belongs to an order with other content; nothing is written.
    """
    txn.execute(
        "insert into s2s.orders (order_id, rpc, params, actor, idem_key) values (%s, %s, %s::jsonb, %s, %s)"
        " on conflict do nothing",
        (order_id, rpc, canonical.dumps(params).decode(), actor, idem_key),
    )
    is_new = txn.rowcount > 0
    # A separate statement, because it sees an order that another transaction has just inserted.
    order = known(txn, order_id, rpc, params, idem_key)
    if order is None:
        raise refusal(txn, "insert", "s2s.orders")
    if by_link:
        # A session that holds the row is running its step and sets the way itself.
        txn.execute(
            "update s2s.orders set way = 'link' where order_id = any(array(select order_id from s2s.orders"
            " where order_id = %s and way is null for update skip locked))",
            (order_id,),
        )
        if is_new and not txn.rowcount:
            raise refusal(txn, "update", "s2s.orders")
    return order, is_new


def known(txn: Cursor, order_id: str, rpc: str, params: Mapping[str, Any], idem_key: str | None = None) -> Order | None:
    """Return an existing order.

    :returns: ``None``: there is none.
    :raises IdemConflict: the id or the key belongs to an order with other content.
    """
    txn.execute(
        f"select {_ORDER} from s2s.orders where idem_key = %s or order_id = %s order by idem_key = %s desc nulls last",  # noqa: S608
        (idem_key, order_id, idem_key),
    )
    found = [Order(*row) for row in txn]
    if len(found) > 1 or (found and not _is_same(found[0], rpc, params)):
        raise IdemConflict("the order was given before with other content", order_id=found[0].order_id)
    return found[0] if found else None


def _is_same(order: Order, rpc: str, params: Mapping[str, Any]) -> bool:
    try:
        # Compare bytes: to Python, true equals 1.
        return (order.rpc, canonical.dumps(order.params)) == (rpc, canonical.dumps(params))
    except CanonicalError:  # another program has written the params
        return False


def find(txn: Cursor, order_id: str) -> Order:
    """Return an order that exists."""
    txn.execute(f"select {_ORDER} from s2s.orders where order_id = %s", (order_id,))  # noqa: S608 - a constant
    return Order(*(txn.fetchone() or ()))


#: ``stepped_at`` and ``order_id`` of the last order of a page.
Place = tuple[datetime, str]


#: The most bytes of the params of one page, as jsonb, unless it has a single order.
PAGE_BYTES: Final = 16 * 1024 * 1024
#: Stands for the params of an order that no frame can hold; they are not read.
TOO_LONG: Final[Any] = Unreadable("they are longer than a frame")


def queued(
    txn: Cursor,
    rpcs: Iterable[str],
    limit: int,
    after: Place | None = None,
    frame_size: int = Bounds.frame_size,
) -> tuple[list[Order], Place | None]:
    """Return one page of the queued orders of these RPCs, the longest waiting first.

    :param after: the end of the previous page; ``None``: return the first page.
    :param frame_size: bytes of the longest frame; longer params become :data:`TOO_LONG`.
    :returns: the page, and its end; ``None``: it is the last page.
    """
    columns = _ORDER.replace("params", fitting("params"))
    behind = "" if after is None else " and (stepped_at, order_id) > (%(stepped_at)s, %(order_id)s)"
    txn.execute(
        f"""
        with page as (
            select *, ctid from s2s.orders where status = 'queued' and rpc = any(%(rpcs)s){behind}
            order by stepped_at, order_id limit %(limit)s
        ), sized as (
            select *, count(*) over () as total, row_number() over in_turn as place,
                sum({jsonb_size(fitting("params"))}) over in_turn as bytes
            from page window in_turn as (order by stepped_at, order_id)
        )
        select stepped_at, total, {columns} from sized
        where place = 1 or bytes is null or bytes <= %(most)s order by place
        """,  # noqa: S608 - of constants
        {
            "rpcs": list(rpcs),
            "limit": limit,
            "stepped_at": after and after[0],
            "order_id": after and after[1],
            "longest": frame_size,
            "most": PAGE_BYTES,
        },
    )
    rows = txn.fetchall()
    found = [Order(*row[2:]) for row in rows]
    is_last = not rows or len(rows) == rows[0][1] < limit
    page = [replace(each, params=TOO_LONG if each.params is None else each.params) for each in found]
    return page, None if is_last else (rows[-1][0], found[-1].order_id)


def answered(
    txn: Cursor, order_id: str, status: str, result: Mapping[str, Any] | None, engine: str, boot_id: str | None
) -> Order | None:
    """End an order with the answer of an engine that does not share this database.

    An engine that shares the database writes its row before it answers, so its answer changes nothing.

    :param status: ``done``, ``refused`` or ``failed``.
    :param engine: the engine's name.
    :param boot_id: the engine's process. An engine that shares this database holds its presence lock here.
    :returns: the changed order; ``None``: the answer did not end the order.
    """
    if boot_id is not None and claims.present(txn, {boot_id}):
        return None
    # Skip an order that an engine of this database is running: its attempt is recent, or its step has locked the row.
    free = (
        "select order_id from s2s.orders where order_id = %s and status = 'queued' and (attempts = 0 or"
        " retry_at <= now())"
        " for update skip locked"
    )
    txn.execute(
        f"update s2s.orders set way = 'link' where order_id = any(array({free})) returning {_ORDER}",  # noqa: S608
        (order_id,),
    )
    row = txn.fetchone()
    if row is None:
        txn.execute(free, (order_id,))
        if txn.rowcount:
            note(txn, "update", "s2s.orders")
        return None
    finish(txn, Order(*row), status, result, engine)
    return find(txn, order_id)


# --- running ---------------------------------------------------------------------------------------------------------


def attempt(
    txn: Cursor,
    rpcs: Iterable[str],
    resting: Iterable[str],
    in_hand: Iterable[str],
    patience_s: float,
    job_members: Mapping[str, str],
    jobs: Sequence[str] = (),
) -> Order | None:
    """Count an attempt of the open order that has waited longest for a step.

    :param rpcs: the RPCs that the caller serves now.
    :param resting: the RPCs among these whose running orders are skipped.
    :param in_hand: the ``order_id`` of each order that the caller is running.
    :param patience_s: seconds for which an order that has not come over a link is left for a link to deliver.
    :param job_members: the member of the params that names a job, by the RPC of each order that runs one.
    :param jobs: the caller's jobs. An order to run another job is left for :data:`LEFT_S` to an engine that has the
        job, if any engine has ever declared it.
    :raises RowRefused: the database refuses the change of that row.
    """
    # One engine looks at a time, as with jobs.
    advisory_lock(txn, _ATTEMPTING)
    txn.execute(
        "select order_id, ctid::text from s2s.orders"
        " where status in ('queued', 'running') and rpc = any(%(rpcs)s)"
        " and (status = 'queued' or rpc <> all(%(resting)s)) and order_id <> all(%(in_hand)s)"
        " and (retry_at is null or retry_at <= now())"
        " and (status = 'running' or attempts > 0 or way = 'link'"
        " or created_at <= now() - %(patience_s)s * interval '1 second')"
        " and not exists (select from s2s.jobs j"
        "  join unnest(%(running)s::text[], %(members)s::text[]) as r (rpc, member)"
        "  on r.rpc = orders.rpc and j.job_type = params ->> r.member"
        "  where j.job_type <> all(%(jobs)s) and stepped_at > now() - %(left_s)s * interval '1 second')"
        " order by stepped_at limit 1 for update skip locked",
        {
            "rpcs": list(rpcs),
            "resting": list(resting),
            "in_hand": list(in_hand),
            "patience_s": patience_s,
            "jobs": list(jobs),
            "running": list(job_members),
            "members": list(job_members.values()),
            "left_s": LEFT_S,
        },
    )
    row = txn.fetchone()
    if row is None:
        return None
    change = f"update s2s.orders set {ONE_MORE}, retry_at = now() + {PAUSE}, stepped_at = clock_timestamp() where"  # noqa: S608
    key, written = ("order_id", row[0]), "retry_at > now()"
    return Order(*change_row(txn, change, place=row[1], key=key, returning=_ORDER, written=written))


def hold(txn: Cursor, order: Order, waits: bool = False) -> str | None:
    """Lock an order until the transaction ends.

    :param waits: wait for a session that holds the row.
    :returns: the ``ctid`` of its row; ``None``: the attempt no longer belongs to the caller.
    """
    where = "order_id = %(order_id)s and retry_at = %(retry_at)s and status in ('queued', 'running')"
    return hold_row(txn, "s2s.orders", where, vars(order), waits)


def go_on(txn: Cursor, order: Order, place: str, state: Mapping[str, Any], engine: str, is_next_ours: bool) -> Order:
    """Store where an order continues; its next step is due at once.

    :param place: the ``ctid`` of its row, as :func:`hold` returned it; the order may have changed the row since.
    :param is_next_ours: also count an attempt of the next step, which the caller does without another look at the
        table.
    :returns: the changed order.
    """
    change = (
        f"update s2s.orders set status = 'running', state = %s, {next_attempt(is_next_ours)}, engine = %s,"  # noqa: S608
        " way = coalesce(way, 'table'), started_at = coalesce(started_at, now()) where"
    )
    key = ("order_id", order.order_id)
    written = has_next_attempt(is_next_ours)
    row = change_row(txn, change, Json(dict(state)), engine, place=place, key=key, returning=_ORDER, written=written)
    return Order(*row)


def release(txn: Cursor, order: Order) -> None:
    """Undo the count of an attempt that was not begun."""
    txn.execute(
        "update s2s.orders set attempts = attempts - 1, retry_at = null where order_id = %s and retry_at = %s",
        (order.order_id, order.retry_at),
    )
    if not txn.rowcount and hold(txn, order):
        note(txn, "update", "s2s.orders")


def finish(txn: Cursor, order: Order, status: str, result: Mapping[str, Any] | None, engine: str) -> None:
    """End an order.

    :param status: ``done``, ``refused`` (it never ran) or ``failed``.
    :raises RowRefused: a trigger kept the row unchanged.
    """
    txn.execute(
        "update s2s.orders set status = %(status)s, result = %(result)s, retry_at = null, engine = %(engine)s,"
        " way = coalesce(way, 'table'), finished_at = clock_timestamp(),"
        " started_at = case when %(status)s <> 'refused' then coalesce(started_at, now()) end"
        " where order_id = %(order_id)s returning status = %(status)s",
        {
            "status": status,
            "result": None if result is None else Json(dict(result)),
            "engine": engine,
            "order_id": order.order_id,
        },
    )
    check_changed(txn, "s2s.orders", "order_id", order.order_id)


# --- for operators ---------------------------------------------------------------------------------------------------


def show(txn: Cursor, order_id: str) -> OrderRow | None:
    """Return an order, or ``None`` if there is none with this id."""
    txn.execute(f"select {_ROW} from s2s.orders where order_id = %s", (order_id,))  # noqa: S608 - a constant
    row = txn.fetchone()
    return OrderRow(*row) if row else None


def over(txn: Cursor, order_ids: Sequence[str]) -> set[str]:
    """Return the given orders that are finished or do not exist."""
    txn.execute(
        "select order_id from s2s.orders where order_id = any(%s) and status = any(%s)", (list(order_ids), list(OPEN))
    )
    return set(order_ids) - {order_id for (order_id,) in txn}


def list_orders(
    txn: Cursor,
    *,
    status: str | None = None,
    rpc: str | None = None,
    limit: int = 100,
    before: str | None = None,
) -> list[OrderRow]:
    """List orders, the newest first.

    :param status: only orders with this status; ``rpc`` likewise.
    :param before: only orders older than this one, which is the last order of the previous page.
    """
    given = {name: value for name, value in (("rpc", rpc), ("status", status)) if value is not None}
    which, values = ", ".join(given), ", ".join(f"%({name})s" for name in given)
    # Write the filters as bounds of an index that begins with them: see s2s.store.tables.lists.
    where = [f"({which}) {than} ({values})" for than in (">=", "<=") if given]
    order = [*given, "created_at", "order_id"]
    if before is not None:
        last = ["(select created_at from s2s.orders where order_id = %(before)s)", "%(before)s"]
        where.append(f"({', '.join(order)}) < ({', '.join([f'%({name})s' for name in given] + last)})")
    txn.execute(
        f"select {_ROW} from s2s.orders where {' and '.join(where or ['true'])}"  # noqa: S608 - constants
        f" order by {', '.join(f'{column} desc' for column in order)} limit %(limit)s",
        {**given, "before": before, "limit": limit},
    )
    return [OrderRow(*row) for row in txn]
