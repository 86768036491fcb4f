"""The declaration of a job and of its schedule (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from twisted.plugin import IPlugin
from zope.interface import Attribute, Interface, implementer

from s2s.errors import OperatorError
from s2s.handlers.run import Outcome, Run
from s2s.protocol.names import by_name
from s2s.protocol.settings import Value
from s2s.store.driver import Cursor

_EVERY: Final = re.compile(r"every:([1-9][0-9]{0,4})s")
_DAILY: Final = re.compile(r"daily@([01][0-9]|2[0-3]):([0-5][0-9])Z")
_DAY_S: Final = 86_400


# --- the schedule ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """The times at which a job is due: at ``offset_s`` into every period, counted from the Unix epoch.

    Engines that share a job thus agree on its times, whenever each of them was started.

    :param every_s: the period, in seconds.
    :param offset_s: seconds from the start of a period.
    """

    every_s: int
    offset_s: int = 0

    def next_after(self, ts: int) -> int:
        """Return the first time after a Unix second at which the job is due, never that second itself."""
        return ts + self.every_s - (ts - self.offset_s) % self.every_s


def parse_schedule(text: str) -> Schedule:
    """Parse ``every:Ns`` (N from 1 to 86400) or ``daily@HH:MMZ`` (UTC).

    :raises OperatorError: the text is neither.
    """
    every, daily = _EVERY.fullmatch(text), _DAILY.fullmatch(text)
    if every and int(every[1]) <= _DAY_S:
        return Schedule(int(every[1]))
    if daily:
        return Schedule(_DAY_S, int(daily[1]) * 3600 + int(daily[2]) * 60)
    raise OperatorError(f"{text!r} is no schedule: write every:Ns with N from 1 to 86400, or daily@HH:MMZ in UTC")


# --- the job ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobRun(Run):
    """One run of a job, or one step of the run, as passed to the job.

    :param due_at: the time at which the run was due, in Unix seconds. A run that is retried keeps it.
    """

    txn: Cursor = field(repr=False)
    key: str
    due_at: int
    settings: Mapping[str, Value] = field(repr=False)
    frame_size: int
    state: Mapping[str, Any] = field(default_factory=dict)


class IJob(Interface):  # type: ignore[misc]
    """One kind of job: its schedule, and the function that runs it."""

    job_type = Attribute("Its name: a lower-case letter, then up to 63 of a-z, 0-9, _ and .")
    schedule = Attribute("When it is due: every:Ns with N from 1 to 86400, or daily@HH:MMZ in UTC.")

    def run(txn: Cursor, run: JobRun) -> Outcome:  # noqa: N805 - an interface says how it is called
        """Run the job in the transaction that marks it as run. An exception undoes all of its work.

        The method runs in a thread of an engine. Its effects outside this database may happen more than once. It must
        not commit or roll back. A long run consists of steps, each in its own transaction: see :class:`Unfinished`.
        """


@implementer(IPlugin, IJob)
class Job(ABC):
    """The base class of jobs."""

    job_type: ClassVar[str]
    schedule: ClassVar[str]

    @abstractmethod
    def run(self, txn: Cursor, run: JobRun) -> Outcome:
        """Run the job; see :meth:`IJob.run`."""


def registry(types: Iterable[Job]) -> dict[str, Job]:
    """Return the jobs by name.

    :raises OperatorError: a name is ill-formed or occurs twice, or a schedule is ill-formed.
    """
    return by_name(types, "job", "job_type", lambda kind: parse_schedule(kind.schedule))
