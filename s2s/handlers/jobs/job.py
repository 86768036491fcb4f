"""The declaration of a job and of its schedule (docs/protocol.rst, "The world and its jobs")."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, cast

from twisted.plugin import IPlugin
from zope.interface import Attribute, Interface, implementer

from s2s.errors import OperatorError
from s2s.protocol import canonical
from s2s.protocol.names import by_name
from s2s.protocol.settings import Value, value
from s2s.store.driver import Cursor
from s2s.store.tables import outbox
from s2s.store.tables.own_keys import digest

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
class Unfinished:
    """The return value of a step if the run is not over: the step is committed, and the next one has a new transaction.

    :param state: where the next step goes on, at most :data:`MOST_TOLD` bytes of JSON; stored in the transaction of the
        step.
    """

    state: Mapping[str, Any]


#: The longest state or result in bytes of canonical JSON: it fits into the shortest frame.
MOST_TOLD: Final = 2048
#: The nesting depth of a result in the envelope of a reply.
RESULT_DEPTH: Final = 3
#: The return value of a step: :class:`Unfinished`, the result of the run as JSON, or ``None`` for a run without result.
Outcome = Unfinished | Mapping[str, Any] | None


def validate_outcome(outcome: Any) -> Outcome:
    """Refuse a return value of a step that cannot be stored, sent over the link and shown.

    :raises CanonicalError: the value contains something that canonical JSON cannot express, such as a float.
    :raises TypeError: the value is no outcome.
    :raises ValueError: the value is longer than :data:`MOST_TOLD`.
    """
    told = outcome.state if isinstance(outcome, Unfinished) else outcome
    if outcome is None:
        return None
    if not isinstance(told, Mapping):
        raise TypeError(f"a step gives back None, a mapping or Unfinished of one, and no {type(told).__name__}")
    if len(canonical.dumps(told, RESULT_DEPTH)) > MOST_TOLD:
        raise ValueError(f"what a step gives back has {MOST_TOLD} bytes of JSON at most")
    return cast("Outcome", outcome)


@dataclass(frozen=True)
class JobRun:
    """One run of a job, or one step of the run, as passed to the job.

    :param txn: the transaction of the step.
    :param key: a unique key of this run, for ``idem_key``. A run that is rolled back and retried keeps its key.
    :param due_at: the time at which the run was due, in Unix seconds. A run that is retried keeps it.
    :param settings: the values of the configuration by key, as this transaction sees them.
    :param frame_size: the longest frame that the engine sends, in bytes.
    :param state: the state that the previous step returned; empty for the first step.
    """

    txn: Cursor = field(repr=False)
    key: str
    due_at: int
    settings: Mapping[str, Value] = field(repr=False)
    frame_size: int
    state: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, key: str) -> Value:
        """Return a value of the configuration, or its default if its row was removed.

        :raises KeyError: there is no such key.
        """
        return value(self.settings, key)

    def emit(
        self,
        cmd_type: str,
        idem_key: str,
        payload: Mapping[str, Any],
        *,
        priority: int = 100,
        due_at: int | None = None,
    ) -> None:
        """Emit a command, which is sent to the server if and only if this step is committed.

        :param idem_key: must be the same for the same intention, as :attr:`key` and texts made of it are. A digest of
            the content is appended to one that contains :attr:`key`: in a database that was restored from a dump, the
            run happens again under the same key, and its command may have other content.
        :param priority: 0 to 1000, lower first.
        :param due_at: the time in Unix seconds before which the server does not run the command.
        :raises CanonicalError: the payload contains something that canonical JSON cannot express.
        :raises TooBigToSend: the frame of the command would be longer than the engine sends.
        """
        if self.key in idem_key:
            idem_key += ":" + digest(cmd_type, canonical.dumps(payload))
        outbox.put(self.txn, cmd_type, idem_key, payload, priority=priority, due_at=due_at, frame_size=self.frame_size)


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
