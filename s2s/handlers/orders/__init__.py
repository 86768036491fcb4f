"""The admin RPCs and their handlers on an engine (docs/protocol.rst, "Orders").

To add an RPC, write a module, one entry in :func:`builtin`, and the schema of its request
(:mod:`s2s.protocol.catalogue`): the message type and the command line follow from the schema.
"""

from __future__ import annotations

from collections.abc import Mapping

from s2s.handlers.jobs import Job
from s2s.handlers.orders.config_set import ConfigSet
from s2s.handlers.orders.force_tick import ForceTick
from s2s.handlers.orders.handler import OrderHandler, OrderRun
from s2s.handlers.orders.set_sector_status import SetSectorStatus
from s2s.handlers.orders.update_all_ships import UpdateAllShips

__all__ = ["ForceTick", "OrderHandler", "OrderRun", "builtin"]


def builtin(jobs: Mapping[str, Job], frame_size: int) -> dict[str, OrderHandler]:
    """Return every order handler by its RPC.

    :param jobs: the jobs that a forced tick may run, by name.
    :param frame_size: the longest frame that the engine sends, in bytes.
    """
    kinds = (ForceTick(jobs, frame_size), ConfigSet(), SetSectorStatus(), UpdateAllShips())
    return {kind.rpc: kind for kind in kinds}
