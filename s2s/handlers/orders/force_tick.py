"""``admin.engine.force_tick.v1``: run a job now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from s2s.errors import NotFound
from s2s.handlers.jobs import JobRun
from s2s.handlers.orders.handler import OrderHandler, OrderRun
from s2s.handlers.run import Outcome
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.tables import jobs


class ForceTick(OrderHandler):
    """Runs a job once, in addition to its schedule, which does not change."""

    rpc: ClassVar[str] = "admin.engine.force_tick.v1"
    command: ClassVar[str] = "force-tick"
    rests: ClassVar[bool] = True
    runs_job: ClassVar[str] = "job_type"
    schema: ClassVar[Mapping[str, Any]] = {
        "description": "Runs one job now.",
        "type": "object",
        "properties": {
            "job_type": {
                "description": "Which job, e.g. port_refresh or decay.",
                "$comment": '"not" repeats the character class without anchors, because "$" also matches before a final'
                " line feed in some regular expression engines.",
                "type": "string",
                "minLength": 1,
                "maxLength": 64,
                "pattern": "^[a-z][a-z0-9_.]*$",
                "not": {"pattern": "[^a-z0-9_.]"},
            },
        },
        "required": ["job_type"],
        "additionalProperties": False,
    }

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Run the job, and return its outcome."""
        job_type = order.params["job_type"]
        job = order.jobs.get(job_type)
        if job is None:
            raise NotFound(f"this engine has no job {job_type!r}: see s2s jobs list", path="/payload/job_type")
        # No job runs twice at once, whether by schedule or by order.
        jobs.hold_still(own(txn), job_type)
        return job.run(txn, JobRun(txn, order.key, order.created_at, order.settings, order.frame_size, order.state))
