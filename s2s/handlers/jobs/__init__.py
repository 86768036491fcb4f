"""The declaration of a job, and the built-in ones (docs/protocol.rst, "The world and its jobs").

To add a built-in job, write a module and one entry in :data:`BUILTIN`.
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
