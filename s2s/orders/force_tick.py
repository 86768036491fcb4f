"""``admin.engine.force_tick.v1``: run a job now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from s2s.errors import NotFound
from s2s.jobs import JobRun, JobType, Outcome
from s2s.orders.kind import OrderRun, OrderType
from s2s.store import config
from s2s.store import jobs as table
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.own_keys import database_id, own_key


class ForceTick(OrderType):
    """Runs a job once, beside its schedule, which stays as it is.

    :param jobs: by name.
    :param frame_size: the longest frame that the engine sends, in bytes.
    """

    rpc: ClassVar[str] = "admin.engine.force_tick.v1"
    rests: ClassVar[bool] = True

    def __init__(self, jobs: Mapping[str, JobType], frame_size: int) -> None:
        self._jobs = jobs
        self._frame_size = frame_size

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Come to what the job comes to."""
        job_type = order.params["job_type"]
        kind = self._jobs.get(job_type)
        if kind is None:
            raise NotFound(f"this engine has no job {job_type!r}: see s2s jobs list", path="/payload/job_type")
        # A job is never run twice at once, whoever wants it.
        table.hold_still(own(txn), job_type)
        settings = config.read(own(txn)).values
        key = own_key(database_id(own(txn)), "order", order.order_id)
        run = JobRun(txn, key, order.created_at, settings, self._frame_size, order.state)
        return kind.run(txn, run)
