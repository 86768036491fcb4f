"""``decay``: the job that lets shields wear off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from s2s.world.drift import DriftJob


class Decay(DriftJob):
    """Takes shields from the ships in ``neutral`` sectors, and from no others."""

    job_type = "decay"
    schedule = "every:60s"
    rate = "job.decay.rate_permille"
    table = "s2s_world.ships"
    row_id = "ship_id"
    goals: ClassVar[Mapping[str, str]] = {"shields": "0"}
    statuses = ("neutral",)
    counts = ("decayed", "bare")
    message = "Ships that have lost their last shields: {}"
