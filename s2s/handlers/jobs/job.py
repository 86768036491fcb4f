"""The declaration of a job, and of when it is due (docs/protocol.rst, "The world and its jobs")."""

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


# --- when ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """When a job is due: at ``offset_s`` into every period, counted from the Unix epoch.

    So engines that share a job agree on its times, whenever each of them was started.

    :param every_s: the period, in seconds.
    :param offset_s: seconds from the start of a period.
    """

    every_s: int
    offset_s: int = 0

    def next_after(self, ts: int) -> int:
        """Give the first time it is due after a Unix second, never that second itself."""
        return ts + self.every_s - (ts - self.offset_s) % self.every_s


def parse_schedule(text: str) -> Schedule:
    """Read ``every:Ns`` (N from 1 to 86400) or ``daily@HH:MMZ`` (UTC).

    :raises OperatorError: it is neither.
    """
    every, daily = _EVERY.fullmatch(text), _DAILY.fullmatch(text)
    if every and int(every[1]) <= _DAY_S:
        return Schedule(int(every[1]))
    if daily:
        return Schedule(_DAY_S, int(daily[1]) * 3600 + int(daily[2]) * 60)
    raise OperatorError(f"{text!r} is no schedule: write every:Ns with N from 1 to 86400, or daily@HH:MMZ in UTC")


# --- what ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfinished:
    """What a step gives back that has more to do: it is committed, and the next step is a transaction of its own.

    :param state: where the next one goes on, as JSON of :data:`MOST_TOLD` bytes; it is stored with what the step did.
    """

    state: Mapping[str, Any]


#: The longest state or result, in bytes of canonical JSON: the shortest frame still holds it.
MOST_TOLD: Final = 2048
#: How deep a result lies in the envelope of a reply.
RESULT_DEPTH: Final = 3
#: What a step gives back: it has more to do, or it is finished, perhaps with what it came to, as JSON.
Outcome = Unfinished | Mapping[str, Any] | None


def validate_outcome(outcome: Any) -> Outcome:
    """Refuse what a step gave back that could not be stored, sent over the link and shown.

    :raises CanonicalError: it holds what canonical JSON cannot say, such as a float.
    :raises TypeError: it is nothing of the kind.
    :raises ValueError: it is longer than :data:`MOST_TOLD`.
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
    """One run of a job, or one step of it, as the job sees it.

    :param txn: the transaction that holds all that the step does.
    :param key: names this run and no other, also when it is rolled back and tried again: for ``idem_key``.
    :param due_at: when it was due, in Unix seconds; a run that is tried again has the same.
    :param settings: the configuration's values by key, as this transaction sees them.
    :param frame_size: the longest frame that the engine sends, in bytes.
    :param state: where the step before has left off; empty for the first step.
    """

    txn: Cursor = field(repr=False)
    key: str
    due_at: int
    settings: Mapping[str, Value] = field(repr=False)
    frame_size: int
    state: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, key: str) -> Value:
        """Return a value of the configuration, or its default where its row was removed.

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
        """Emit a command, which goes to the server if and only if this step is committed.

        :param idem_key: the same for the same intention; :attr:`key` is, and whatever is made of it. One with
            :attr:`key` in it gets a digest of the content: in a database that was restored from a dump the run comes
            again under the same key, and may tell something else.
        :param priority: 0 to 1000, lower first.
        :param due_at: Unix seconds before which the server does not run it.
        :raises CanonicalError: the payload holds what canonical JSON cannot say.
        :raises TooBigToSend: its frame would be longer than the engine sends.
        """
        if self.key in idem_key:
            idem_key += ":" + digest(cmd_type, canonical.dumps(payload))
        outbox.put(self.txn, cmd_type, idem_key, payload, priority=priority, due_at=due_at, frame_size=self.frame_size)


class IJob(Interface):  # type: ignore[misc]
    """One kind of job: when it is due and what it does."""

    job_type = Attribute("Its name: a lower-case letter, then up to 63 of a-z, 0-9, _ and .")
    schedule = Attribute("When it is due: every:Ns with N from 1 to 86400, or daily@HH:MMZ in UTC.")

    def run(txn: Cursor, run: JobRun) -> Outcome:  # noqa: N805 - an interface says how it is called
        """Do the job's work in the transaction that marks it as run; raise to have all of it undone.

        It runs in a thread of an engine. What it does outside this database may happen more than once. It never
        commits or rolls back. A long run is made of steps, each a transaction: see :class:`Unfinished`.
        """


@implementer(IPlugin, IJob)
class Job(ABC):
    """A job."""

    job_type: ClassVar[str]
    schedule: ClassVar[str]

    @abstractmethod
    def run(self, txn: Cursor, run: JobRun) -> Outcome:
        """Do the job's work; see :meth:`IJob.run`."""


def registry(types: Iterable[Job]) -> dict[str, Job]:
    """Key jobs by their name.

    :raises OperatorError: a name is ill-formed or stands twice, or a schedule is none.
    """
    return by_name(types, "job", "job_type", lambda kind: parse_schedule(kind.schedule))
