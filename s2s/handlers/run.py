"""One run of a job or an order: its parameters, its commands, and its outcome (docs/protocol.rst, "Orders")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from s2s.protocol import canonical
from s2s.protocol.settings import Value
from s2s.store.driver import Cursor
from s2s.store.tables import outbox
from s2s.store.tables.own_keys import digest


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
        raise ValueError(f"the return value of a step has {MOST_TOLD} bytes of JSON at most")
    return cast("Outcome", outcome)


class Run:
    """The members that a run of a job and a run of an order share.

    :ivar txn: the transaction of the step.
    :ivar key: a unique key of this run, for ``idem_key``. A run that is rolled back and retried keeps its key.
    :ivar settings: the value of each installed setting by key, as this transaction sees it.
    :ivar frame_size: the longest frame that the engine sends, in bytes.
    :ivar state: the state that the previous step returned; empty for the first step.
    """

    txn: Cursor
    key: str
    settings: Mapping[str, Value]
    frame_size: int
    state: Mapping[str, Any]

    def setting(self, key: str) -> Value:
        """Return the value of a setting, or its default if its row was removed.

        :raises KeyError: no installed setting has this key.
        """
        return self.settings[key]

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
