"""``s2s jobs``: the due time and the last result of each job."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

import click

from s2s.admin.operations import lists
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import ALL, json_option, show, words
from s2s.store.tables.jobs import JobRow

#: Seconds after which a job that is due and has not run is reported.
OVERDUE_S: Final = 30


@click.group()
def jobs() -> None:
    """List the jobs that the engines run."""


@jobs.command(name="list")
@with_backend
@json_option
def list_(backend: Backend, as_json: bool) -> None:
    """List the jobs that any engine has had, with the due time and the last result of each."""
    found = rows(backend, lists.JOBS, ALL)
    lines = found if as_json else [_line(row) for row in found]
    columns = ("job_type", "schedule", "last_run", "runs", "told")
    show(lines, columns, as_json, "there are none: they are written down by the first engine that starts")


@dataclass(frozen=True)
class _Line:
    """A job as a terminal line."""

    job_type: str
    schedule: str
    last_run: datetime | None
    runs: int
    told: str


def _line(row: JobRow) -> _Line:
    if row.error is not None:
        told = f"failed, attempt {row.attempts}: {row.error}"
    elif row.is_running:
        told = "running"
    else:
        told = words(row.last_result or {})[1:-1] or ("done" if row.runs else "never run")
    if row.due_at < datetime.now(timezone.utc) - timedelta(seconds=OVERDUE_S):
        told += f"; due since {row.due_at:%Y-%m-%d %H:%M:%S}: does an engine run that has it?"
    return _Line(row.job_type, row.schedule, row.last_finished_at, row.runs, told)
