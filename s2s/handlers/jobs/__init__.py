"""The declaration of a job and of its schedule (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

from s2s.handlers.jobs.job import (
    IJob,
    Job,
    JobRun,
    Schedule,
    parse_schedule,
    registry,
)
from s2s.handlers.run import Outcome, Unfinished, validate_outcome

__all__ = [
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
