"""The declaration of an order: what an engine does on an admin RPC (docs/protocol.rst, "Orders")."""

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
    """One order, or one step of it, as its kind sees it.

    :param params: valid by the schema of the request, without the ``order_id``.
    :param actor: who gave it.
    :param created_at: when, in Unix seconds.
    :param state: where the step before has left off; empty for the first step. ``done`` and ``total``, where it has
        them, tell people how far it is.
    """

    order_id: str
    params: Mapping[str, Any] = field(repr=False)
    actor: str
    created_at: int
    state: Mapping[str, Any] = field(default_factory=dict)


class OrderHandler(ABC):
    """A kind of order.

    :cvar rpc: the type of its request, one of :data:`s2s.protocol.catalogue.ORDERS`.
    :cvar access: the least that a token of the HTTP API must have to give it.
    :cvar rests: a paused engine refuses it, and leaves one that runs where it is.
    """

    rpc: ClassVar[str]
    access: ClassVar[Access] = "operator"
    rests: ClassVar[bool] = False

    @abstractmethod
    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Do the order's work in the transaction that stores its end, or the next step of it.

        It runs in a thread of an engine, and never commits or rolls back.

        :raises WireError: it is refused, for this reason, and nothing of it is done.
        """
