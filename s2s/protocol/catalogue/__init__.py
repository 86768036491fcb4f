"""Every message type with its senders, its schemas and its reply type (docs/protocol.rst, "Catalogue").

:data:`MESSAGES` are the types that every peer knows. To add one, put its two schema files into ``schemas/`` and one
line into that table. The types of orders follow from the order handlers that are installed: :func:`order_type`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from s2s.protocol.catalogue.schema import Schema, load
from s2s.protocol.signing import ROLES, Role

ACK: Final = "s2s.ack"
HEALTH_CHECK: Final = "s2s.health.check"
HEALTH_ACK: Final = "s2s.health.ack"
ERROR: Final = "s2s.error"
COMMAND_PUSH: Final = "s2s.command.push"
SWEEP: Final = "s2s.broadcast.sweep"
BUMP: Final = "s2s.config.bump"
PAUSE: Final = "s2s.engine.pause"
RESUME: Final = "s2s.engine.resume"
SHUTDOWN: Final = "s2s.engine.shutdown"
#: The prefix of the types in :data:`MESSAGES`, which no order may have.
OWN_PREFIX: Final = "s2s."
#: Types that are never requests, with or without ``ack_of``.
REPLY_ONLY: Final = frozenset({ACK, HEALTH_ACK, ERROR})


@dataclass(frozen=True)
class MessageType:
    """One type of request.

    :param sent_by: the roles that may send it.
    :param reply: the type of its reply, beside ``s2s.error``.
    :param control: whether a receiver obeys it only on a proven link (protocol, "Proof and control requests").
    :param entered: whether the replay cache records it; a push is identified by its ``idem_key`` instead.
    :param windowed: whether it counts against the requester's window.
    :param is_order: whether it is an order: an administrator's request to an engine (protocol, "Words").
    """

    name: str
    sent_by: tuple[Role, ...]
    request_schema: Schema = field(repr=False, compare=False)
    reply_schema: Schema = field(repr=False, compare=False)
    reply: str = ACK
    control: bool = True
    entered: bool = True
    windowed: bool = True
    is_order: bool = False


#: The message types that a peer knows, by name.
Catalogue = Mapping[str, MessageType]


def _message(name: str, sent_by: tuple[Role, ...], **options: Any) -> MessageType:
    return MessageType(name, sent_by, load(f"{name}.request"), load(f"{name}.reply"), **options)


_SERVER: Final[tuple[Role, ...]] = ("server",)

MESSAGES: Final = (
    _message(HEALTH_CHECK, ROLES, reply=HEALTH_ACK, control=False, windowed=False),
    _message(SHUTDOWN, _SERVER),
    _message(PAUSE, _SERVER),
    _message(RESUME, _SERVER),
    _message(SWEEP, _SERVER),
    _message(COMMAND_PUSH, ("engine",), control=False, entered=False),
    _message(BUMP, _SERVER),
)
#: The catalogue without orders.
BY_NAME: Final[Catalogue] = {message.name: message for message in MESSAGES}
#: The payload of ``s2s.error``.
ERROR_SCHEMA: Final = load("s2s.error")
#: The payload of the reply to any order.
ORDER_REPLY: Final = load("order.reply")
#: The member of each order's request besides the params.
_ORDER_ID: Final = "order_id"


def order_type(rpc: str, params: Mapping[str, Any]) -> MessageType:
    """Return the type of an order's request, whose payload is ``{order_id, **params}``.

    :param params: the JSON Schema of the params, as parsed JSON; its members are in ``properties`` at its top level.
    :raises jsonschema.exceptions.SchemaError: the schema is not a JSON Schema.
    :raises OperatorError: the schema breaks a rule of :func:`~s2s.protocol.catalogue.vet.vet`.
    """
    rule = ORDER_REPLY.document["properties"][_ORDER_ID]
    order_id = {**rule, "description": "The id of the order, chosen by the sender; the same id is the same order."}
    document = {
        "$schema": ORDER_REPLY.document["$schema"],
        "$id": f"urn:s2s:schema:{rpc}.request",
        "title": f"Payload of {rpc}",
        **params,
        "properties": {_ORDER_ID: order_id, **params.get("properties", {})},
        "required": [_ORDER_ID, *params.get("required", ())],
    }
    return MessageType(rpc, _SERVER, Schema(document), ORDER_REPLY, is_order=True)


def with_orders(orders: Iterable[MessageType]) -> Catalogue:
    """Return the catalogue of a peer that knows these orders."""
    return {**BY_NAME, **{message.name: message for message in orders}}
