"""The declaration of an order handler, which an engine runs for an admin RPC (docs/protocol.rst, "Orders")."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from twisted.plugin import IPlugin
from zope.interface import Attribute, Interface, implementer

from s2s.errors import OperatorError
from s2s.handlers.jobs import Job
from s2s.handlers.run import Outcome, Run
from s2s.protocol.catalogue import OWN_PREFIX, MessageType, order_type
from s2s.protocol.names import by_name
from s2s.protocol.settings import Value
from s2s.store.access import ACCESS, Access
from s2s.store.driver import Cursor

#: The commands and the options of ``s2s order`` itself, which no order and no optional param may be called.
COMMANDS: Final = frozenset({"show", "list"})
OPTIONS: Final = frozenset({"database", "help", "idem-key", "json", "state-dir", "token-file", "url", "wait"})
#: The version at the end of an RPC name.
_VERSION: Final = re.compile(r"\.v[0-9]+$")


@dataclass(frozen=True)
class OrderRun(Run):
    """One order, or one step of it, as passed to its handler.

    :param params: the params, valid by :attr:`OrderHandler.schema`.
    :param actor: the operator or key that gave the order.
    :param created_at: the time at which the order was given, in Unix seconds.
    :param jobs: the jobs of the engine by name.
    :param state: the state that the previous step returned; empty for the first step. Its members ``done`` and
        ``total``, if present, show the progress to operators.
    """

    txn: Cursor = field(repr=False)
    key: str
    order_id: str
    params: Mapping[str, Any] = field(repr=False)
    actor: str
    created_at: int
    settings: Mapping[str, Value] = field(repr=False)
    frame_size: int
    jobs: Mapping[str, Job] = field(repr=False, default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


class IOrderHandler(Interface):  # type: ignore[misc]
    """One kind of order: the RPC, the schema of its params, and the function that an engine runs."""

    rpc = Attribute("Its name, such as harbour.close.v1: a lower-case letter, then up to 63 of a-z, 0-9, _ and .")
    schema = Attribute("The JSON Schema (2020-12) of its params, as parsed JSON, with a description and properties.")
    access = Attribute("The lowest role of a token that may give the order: observer, operator or admin.")
    command = Attribute("Its name for s2s order; empty: the rpc without its version, with - for each . and _.")
    rests = Attribute("Whether a paused engine refuses a new order of this kind, and suspends a running one.")
    runs_job = Attribute("The member of the params that names a job to run; empty: the order runs no job.")

    def run(txn: Cursor, order: OrderRun) -> Outcome:  # noqa: N805 - an interface says how it is called
        """Run the order, or its next step, in the transaction that stores the outcome.

        The method runs in a thread of an engine, and must not commit or roll back. A :class:`~s2s.errors.WireError`
        refuses the order or, at a later step, makes it fail, for this reason. The work of this step is undone.
        """


@implementer(IPlugin, IOrderHandler)
class OrderHandler(ABC):
    """The base class of order handlers."""

    rpc: ClassVar[str]
    schema: ClassVar[Mapping[str, Any]]
    access: ClassVar[Access] = "operator"
    command: ClassVar[str] = ""
    rests: ClassVar[bool] = False
    runs_job: ClassVar[str] = ""

    @abstractmethod
    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Run the order; see :meth:`IOrderHandler.run`."""


def message_type(handler: OrderHandler) -> MessageType:
    """Return the message type that the schema of an order handler defines."""
    return order_type(handler.rpc, handler.schema)


def command_name(handler: OrderHandler) -> str:
    """Return the name of an order for ``s2s order``."""
    return handler.command or re.sub("[._]", "-", _VERSION.sub("", handler.rpc))


def registry(handlers: Iterable[OrderHandler]) -> dict[str, OrderHandler]:
    """Return the order handlers by RPC.

    :raises OperatorError: an RPC or a command is ill-formed or occurs twice, or a schema cannot describe a command and
        a request.
    """
    found = by_name(handlers, "order", "rpc", _check)
    commands: dict[str, str] = {}
    for rpc, handler in found.items():
        other = commands.setdefault(command_name(handler), rpc)
        if other != rpc:
            raise OperatorError(
                f"the order {rpc} has the command {command_name(handler)!r} of {other}: set its attribute command"
            )
    return found


def _check(handler: OrderHandler) -> None:
    if handler.rpc.startswith(OWN_PREFIX):
        raise OperatorError(f"its rpc begins with {OWN_PREFIX}, which is for the messages of s2s: choose another name")
    if handler.access not in ACCESS:
        raise OperatorError(f"its access is {handler.access!r}: write one of {', '.join(ACCESS)}")
    schema = handler.schema
    if not isinstance(schema, Mapping) or schema.get("type") != "object" or "description" not in schema:
        raise OperatorError(
            'its schema does not describe an object: write a JSON Schema with "type": "object" and a "description"'
        )
    if "order_id" in schema.get("properties", {}):
        raise OperatorError("its schema has a member order_id, which each order has by itself: rename it")
    if handler.runs_job and handler.runs_job not in schema.get("required", ()):
        raise OperatorError(f"its runs_job is {handler.runs_job!r}: name a required member of its schema")
    if command_name(handler) in COMMANDS:
        raise OperatorError(f"its command is {command_name(handler)!r}, which is one of s2s order: set its command")
    required = schema.get("required", ())
    for name in schema.get("properties", {}):
        if name not in required and name.replace("_", "-") in OPTIONS:
            raise OperatorError(f"its optional param {name!r} is an option of s2s order: rename it, or require it")
    message_type(handler)
