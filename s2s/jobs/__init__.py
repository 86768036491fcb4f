"""What a job is, and the ones that come with s2s (docs/protocol.rst, "The engine").

To add one, write a module and one entry in :data:`BUILTIN`.
"""

from __future__ import annotations

from typing import Final

from s2s.jobs.kind import IJobType, JobRun, JobType, Schedule, parse_schedule, registry

BUILTIN: Final[tuple[JobType, ...]] = ()

__all__ = ["BUILTIN", "IJobType", "JobRun", "JobType", "Schedule", "parse_schedule", "registry"]
