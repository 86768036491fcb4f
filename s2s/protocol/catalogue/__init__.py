"""Every message type with its senders, its schemas and its reply type (docs/protocol.rst, "Catalogue").

To add a type, put its two schema files into ``schemas/`` and one line into :data:`MESSAGES`. An order needs only the
schema file of its request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from s2s.protocol.catalogue.schema import Schema, load, requests
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
#: The prefixes of the names of orders.
_ORDERS: Final = ("admin.", "world.")
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
    """

    name: str
    sent_by: tuple[Role, ...]
    reply: str = ACK
    control: bool = True
    entered: bool = True
    windowed: bool = True
    request_schema: Schema = field(init=False, repr=False, compare=False)
    reply_schema: Schema = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "request_schema", load(f"{self.name}.request"))
        object.__setattr__(self, "reply_schema", load("order.reply" if self.is_order else f"{self.name}.reply"))

    @property
    def is_order(self) -> bool:
        """Whether this type is an order: an administrator's request to an engine (protocol, "Words")."""
        return self.name.startswith(_ORDERS)


_SERVER: Final[tuple[Role, ...]] = ("server",)

#: The orders. The payload of a request is ``{order_id, **params}``; the engine's handlers are in
#: :mod:`s2s.handlers.orders`.
ORDERS: Final = tuple(name for name in requests() if name.startswith(_ORDERS))

MESSAGES: Final = (
    MessageType(HEALTH_CHECK, ROLES, reply=HEALTH_ACK, control=False, windowed=False),
    MessageType(SHUTDOWN, _SERVER),
    MessageType(PAUSE, _SERVER),
    MessageType(RESUME, _SERVER),
    MessageType(SWEEP, _SERVER),
    MessageType(COMMAND_PUSH, ("engine",), control=False, entered=False),
    MessageType(BUMP, _SERVER),
    *(MessageType(rpc, _SERVER) for rpc in ORDERS),
)

BY_NAME: Final = {message.name: message for message in MESSAGES}
#: The payload of ``s2s.error``.
ERROR_SCHEMA: Final = load("s2s.error")
