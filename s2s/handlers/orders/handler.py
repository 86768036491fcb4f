"""The declaration of an order handler, which an engine runs for an admin RPC (docs/protocol.rst, "Orders")."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from s2s.handlers.jobs import Outcome
from s2s.store.access import Access
from s2s.store.driver import Cursor


@dataclass(frozen=True)
class OrderRun:
    """One order, or one step of it, as passed to its handler.

    :param params: the params, valid by the schema of the request, without the ``order_id``.
    :param actor: the operator or key that gave the order.
    :param created_at: the time at which the order was given, in Unix seconds.
    :param state: the state that the previous step returned; empty for the first step. Its members ``done`` and
        ``total``, if present, show the progress to operators.
    """

    order_id: str
    params: Mapping[str, Any] = field(repr=False)
    actor: str
    created_at: int
    state: Mapping[str, Any] = field(default_factory=dict)


class OrderHandler(ABC):
    """The handler of one kind of order.

    :cvar rpc: the type of the request, one of :data:`s2s.protocol.catalogue.ORDERS`.
    :cvar access: the lowest access with which a token of the HTTP API may give the order.
    :cvar rests: a paused engine refuses a new order of this kind, and suspends a running one.
    """

    rpc: ClassVar[str]
    access: ClassVar[Access] = "operator"
    rests: ClassVar[bool] = False

    @abstractmethod
    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Run the order, or its next step, in the transaction that stores the outcome.

        The method runs in a thread of an engine, and must not commit or roll back.

        :raises WireError: the order is refused, or at a later step has failed, for this reason. The work of this step
            is undone.
        """
