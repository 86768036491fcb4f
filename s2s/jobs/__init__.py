"""What a job is, and the ones that come with s2s (docs/protocol.rst, "The world and its jobs").

To add one, write a module and one entry in :data:`BUILTIN`.
"""

from __future__ import annotations

from typing import Final

from s2s.jobs.decay import Decay
from s2s.jobs.kind import IJobType, JobRun, JobType, Outcome, Schedule, Unfinished, judged, parse_schedule, registry
from s2s.jobs.port_refresh import PortRefresh

BUILTIN: Final[tuple[JobType, ...]] = (PortRefresh(), Decay())

__all__ = [
    "BUILTIN",
    "IJobType",
    "JobRun",
    "JobType",
    "Outcome",
    "Schedule",
    "Unfinished",
    "judged",
    "parse_schedule",
    "registry",
]
