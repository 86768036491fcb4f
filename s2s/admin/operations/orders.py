"""Operations that give orders to the engines and follow them (docs/protocol.rst, "Orders and their rows")."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ulid_transform import ulid_now

from s2s.admin.operations.operation import (
    BODY_BYTES,
    MOST_BODY_BYTES,
    Operation,
    OperationReply,
    OperationRequest,
    OperationSteps,
    Part,
    Rule,
    WaitFor,
    encode,
    run_non_idempotent,
)
from s2s.admin.operations.pages import Page, listing, paged
from s2s.errors import BadPayload, IdemConflict, NotFound, S2SError, WireError
from s2s.handlers.orders import OrderHandler
from s2s.handlers.orders.config_set import ConfigSet
from s2s.store.access import Access
from s2s.store.driver import Cursor
from s2s.store.tables import audit, orders
from s2s.store.tables.orders import OrderRow

ORDER_ID: Final[Rule] = {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[A-Za-z0-9_-]+$"}
#: Maximum seconds that a request may wait for the end of an order.
MOST_WAIT_S: Final = 60
_WAIT: Final[Rule] = {
    "type": "number",
    "minimum": 0,
    "maximum": MOST_WAIT_S,
    "default": 0,
    "description": "Seconds to wait for the end of the order.",
}


@dataclass(frozen=True)
class OrderView(OrderRow):
    """An order with its progress in words."""

    progress: str | None


def far(row: OrderRow) -> tuple[int, int] | None:
    """Return the done part and the total of an order, or ``None`` if the order does not record them."""
    state = row.state if isinstance(row.state, dict) else {}
    done, total = state.get("done"), state.get("total")
    return (done, total) if type(done) is int and type(total) is int else None


def _shown(row: OrderRow) -> OrderView:
    progress = far(row)
    return OrderView(**vars(row), progress=f"{progress[0]} of {progress[1]}" if progress else None)


def _give(rpc: str, ask: OperationRequest) -> OperationSteps[OrderView]:
    """Insert an order, unless it was given before, and wait for its end for up to ``wait`` seconds."""
    order_id = ulid_now()
    write = partial(_write, rpc, ask, order_id)
    row: OrderView
    if ask.idem_key is None:
        row, is_new = yield from run_non_idempotent(write, f"order {order_id} was given", order_id=order_id)
    else:
        row, is_new = yield write
    with suppress(S2SError):
        # The order is committed. Its row shows any later failure; an error now would suggest to give the order again.
        row = yield from _until_over(row, ask.query["wait"])
    status = 202 if row.status in orders.OPEN else 201 if is_new else 200
    return OperationReply(row, status, f"/v1/orders/{row.order_id}")


def _write(rpc: str, ask: OperationRequest, order_id: str, txn: Cursor) -> tuple[OrderView, bool]:
    try:
        order, is_new = orders.give(txn, order_id, rpc, ask.body, ask.actor, ask.idem_key)
    except IdemConflict as error:
        raise IdemConflict("the Idempotency-Key is that of another order", order_id=error.details["order_id"]) from None
    return _find(order.order_id, txn), is_new


def _show(ask: OperationRequest) -> OperationSteps[OrderView]:
    row: OrderView = yield partial(_find, ask.path_params["order_id"])
    return OperationReply((yield from _until_over(row, ask.query["wait"])))


def _until_over(row: OrderView, wait_s: float) -> Part[OrderView]:
    """Read an order again when it is over or the wait has timed out."""
    if wait_s and row.status in orders.OPEN:
        yield WaitFor(orders.over, (row.order_id,), wait_s)
        row = yield partial(_find, row.order_id)
    return row


def _list(txn: Cursor, before: str | None, **which: Any) -> list[OrderView]:
    if before is not None and orders.show(txn, before) is None:
        raise NotFound(f"at /query/cursor: there is no order {before!r}", path="/query/cursor")
    return [_shown(row) for row in orders.list_orders(txn, before=before, **which)]


def _find(order_id: str, txn: Cursor) -> OrderView:
    row = orders.show(txn, order_id)
    if row is None:
        raise NotFound(f"there is no order {order_id!r}")
    return _shown(row)


#: Maximum bodies in bytes, by RPC. The text of a setting has no limit of its own.
_BODY_BYTES: Final = {ConfigSet.rpc: MOST_BODY_BYTES}


def _refused(rpc: str, txn: Cursor, ask: OperationRequest, error: WireError) -> None:
    """Write the audit entry of an order that was refused before it had a row, whose trigger would write the entry."""
    result = {"status": "refused", "result": {"code": error.code, "message": error.message}}
    body = ask.body if isinstance(ask.body, Mapping) else {"body": ask.body}
    audit.write(txn, rpc, "", audit.cut(body, encode(body)), result)


def giving(
    rpc: str, params: Mapping[str, Any] | None = None, access: Access = "observer", summary: str = "Give an order"
) -> Operation[OrderView]:
    """Return the operation that gives an order.

    :param params: the JSON Schema of the params; ``None``: the caller, a client, leaves their check to the server.
    :param access: the lowest role that may give it.
    """
    return Operation(
        "give_" + rpc.replace(".", "_"),
        "POST",
        f"/v1/orders/{rpc}",
        access,
        summary,
        OrderView,
        partial(_give, rpc),
        query={"wait": _WAIT},
        body={**(params or {"type": "object"}), "title": f"Params of {rpc}"},
        body_bytes=_BODY_BYTES.get(rpc, BODY_BYTES),
        refusals=(BadPayload, IdemConflict),
        statuses={
            200: "The order was given before, and is over.",
            201: "The order is new, and over.",
            202: "The order is not over.",
        },
        takes_key=True,
        refused=partial(_refused, rpc),
    )


def operation(handler: OrderHandler) -> Operation[OrderView]:
    """Return the operation that gives an order to the engines that have this handler."""
    params = {name: said for name, said in handler.schema.items() if name != "description"}
    return giving(handler.rpc, params, handler.access, handler.schema["description"].rstrip("."))


LIST: Final[Operation[Page[OrderView]]] = listing(
    "list_orders",
    "/v1/orders",
    "List orders, the newest first",
    OrderView,
    paged(_list, lambda row: row.order_id),
    filters={
        "status": {"enum": ["queued", "running", "done", "refused", "failed"]},
        "rpc": {"type": "string", "maxLength": 64, "description": "Only orders of this RPC."},
    },
    cursor={**ORDER_ID, "description": "The next_cursor of the page before."},
    refusals=(NotFound,),
)
SHOW: Final = Operation(
    "show_order",
    "GET",
    "/v1/orders/{order_id}",
    "observer",
    "Show one order with its progress or its result",
    OrderView,
    _show,
    path_params={"order_id": ORDER_ID},
    query={"wait": _WAIT},
    refusals=(NotFound,),
)

OPERATIONS: Final[tuple[Operation[Any], ...]] = (LIST, SHOW)
