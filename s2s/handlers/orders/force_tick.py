"""``admin.engine.force_tick.v1``: run a job now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from s2s.errors import NotFound
from s2s.handlers.jobs import Job, JobRun, Outcome
from s2s.handlers.orders.handler import OrderHandler, OrderRun
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.tables import config, jobs
from s2s.store.tables.orders import FORCE_TICK
from s2s.store.tables.own_keys import database_id, own_key


class ForceTick(OrderHandler):
    """Runs a job once, in addition to its schedule, which does not change.

    :ivar jobs: the jobs by name.
    :param frame_size: the longest frame that the engine sends, in bytes.
    """

    rpc: ClassVar[str] = FORCE_TICK
    rests: ClassVar[bool] = True

    def __init__(self, jobs: Mapping[str, Job], frame_size: int) -> None:
        self.jobs = jobs
        self._frame_size = frame_size

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Run the job, and return its outcome."""
        job_type = order.params["job_type"]
        kind = self.jobs.get(job_type)
        if kind is None:
            raise NotFound(f"this engine has no job {job_type!r}: see s2s jobs list", path="/payload/job_type")
        # No job runs twice at once, whether by schedule or by order.
        jobs.hold_still(own(txn), job_type)
        settings = config.read(own(txn)).values
        key = own_key(database_id(own(txn)), "order", order.order_id)
        run = JobRun(txn, key, order.created_at, settings, self._frame_size, order.state)
        return kind.run(txn, run)
