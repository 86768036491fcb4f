"""``port_refresh``: the job that lets trade even out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from s2s.world.drift import DriftJob


class PortRefresh(DriftJob):
    """Moves stock and price of each port towards their base values, except in ``port_closed`` sectors."""

    job_type = "port_refresh"
    schedule = "every:10s"
    rate = "job.port_refresh.rate_permille"
    table = "s2s_world.ports"
    row_id = "port_id"
    goals: ClassVar[Mapping[str, str]] = {"stock": "base_stock", "price": "base_price"}
    statuses = ("fedspace", "neutral")
    counts = ("moved", "at_base")
    message = "Ports that are back at their usual stock and price: {}"
