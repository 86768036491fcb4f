"""What a job is, and the ones that come with s2s (docs/protocol.rst, "The world and its jobs").

To add one, write a module and one entry in :data:`BUILTIN`.
"""

from __future__ import annotations

from typing import Final

from s2s.handlers.jobs.decay import Decay
from s2s.handlers.jobs.job import (
    IJob,
    Job,
    JobRun,
    Outcome,
    Schedule,
    Unfinished,
    parse_schedule,
    registry,
    validate_outcome,
)
from s2s.handlers.jobs.port_refresh import PortRefresh

BUILTIN: Final[tuple[Job, ...]] = (PortRefresh(), Decay())

__all__ = [
    "BUILTIN",
    "IJob",
    "Job",
    "JobRun",
    "Outcome",
    "Schedule",
    "Unfinished",
    "parse_schedule",
    "registry",
    "validate_outcome",
]
