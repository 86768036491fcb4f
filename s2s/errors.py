"""Every error, in one tree, with its wire code.

::

    S2SError
    ├── OperatorError            a mistake of whoever started us: one line that names the cure
    │   ├── SchemaError          the database is not migrated, or is newer than we are
    │   └── NoSigningKey         no key of ours may sign now
    ├── LocalError               we were asked to do what the protocol forbids; nothing was written
    │   ├── CanonicalError       a value that canonical JSON cannot say
    │   ├── InvalidPayload       a payload that its schema refuses
    │   ├── TooBigToSend         a frame over the limit in force
    │   └── LineFull             too many calls wait for the window already
    ├── CallError                a request of ours did not get the reply that it wanted
    │   ├── Unreachable          nobody was there to take it
    │   ├── UnknownOutcome       it may or may not have taken effect
    │   │   ├── LinkLost
    │   │   └── DeadlinePassed
    │   ├── BadReply             the peer answered with what is no answer to this request
    │   └── Refused              the peer answered ``s2s.error``
    ├── HandlerTimeout           foreign code took longer than its deadline
    ├── HandlerStuck             foreign code does not return, past its deadline
    ├── DatabaseError
    │   ├── DatabaseUnavailable  no connection, or it was lost
    │   │   ├── CommitLost       with a COMMIT under way, whose outcome is unknown
    │   │   └── NoThread         the operating system starts no further thread
    │   └── StatementRefused     the database refused the data
    │       └── RowRefused       it does not let a row be changed
    └── WireError                what we answer to a peer: one class a code, see :data:`BY_CODE`
        ├── Unsigned             BadJson TooLarge AuthRequired AuthBad
        ├── Forbidden Replay TsSkew
        ├── BadEnvelope BadPayload UnsupportedVersion UnsupportedType
        ├── UnknownCommand IdemConflict StaleVersion NotFound
        └── NotReady Paused ShuttingDown Overloaded DbUnavailable DeadlineExceeded InternalError

A :class:`WireError` is what *we* say; when a *peer* says it, the call fails with :class:`Refused`. The two never
mix: a peer's mistake is not ours (docs/protocol.rst, "Errors").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

#: The attribute in which an exception keeps its line.
_LINE: Final = "_s2s_line"
#: The cure where the operating system starts no further thread.
THREAD_CURE: Final = "raise the limit of its processes: --pids-limit of a container, TasksMax= of systemd, or ulimit -u"
#: Control characters and the separators of lines: a table refuses NUL, and a terminal obeys ESC.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def harmless(text: str) -> str:
    """Give a peer's text as a log line can bear it: at most 200 characters, none that a log or a terminal obeys."""
    return (text if text.isascii() and text.isprintable() else ascii(text))[:200]


def one_line(error: BaseException) -> str:
    """Say an exception in one line that a table can hold: a driver's further lines would quote the row."""
    if _LINE in vars(error):
        return str(vars(error)[_LINE])
    try:
        said = str(error)
    except BaseException:  # the exception is a plug-in's own, and may raise whatever it wants
        said = "it does not say why"
    return storable(f"{type(error).__name__}: {said}")


def describe(error: BaseException) -> None:
    """Have an exception's own code say its line now, inside the deadline of the code that raised it."""
    vars(error)[_LINE] = one_line(error)


def storable(text: str) -> str:
    """Return the first line of a text, 500 characters at most, without what a table refuses or a terminal obeys."""
    return _CONTROLS.sub("", text.partition("\n")[0]).encode("utf-8", "replace").decode()[:500]


class S2SError(Exception):
    """The root of the tree."""


class OperatorError(S2SError):
    """A mistake of configuration or environment; its text is one line that names the cure."""


class SchemaError(OperatorError):
    """The database's schema is older or newer than this release."""


class NoSigningKey(OperatorError):
    """No key of this role is active."""


class LocalError(S2SError):
    """The caller asked for what the protocol forbids. Nothing was sent."""


class CanonicalError(LocalError):
    """A value has no canonical form; the text says where and what to use instead."""


class InvalidPayload(LocalError):
    """A payload of ours breaks its JSON Schema; the text says where."""


class TooBigToSend(LocalError):
    """A frame would pass the smaller of the two sides' ``frame_size_limit``."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the frame has {size} bytes and the limit is {limit}: send less, or raise --frame-size-limit")
        self.size = size
        self.limit = limit


class LineFull(LocalError):
    """More calls wait for the window than the stated bound."""


class CallError(S2SError):
    """A request of ours failed."""


class Unreachable(CallError):
    """There was no connection: nothing was sent."""


class UnknownOutcome(CallError):
    """The request may or may not have taken effect: ask, or send it again where it is idempotent."""


class LinkLost(UnknownOutcome):
    """The link ended before the reply came."""


class DeadlinePassed(UnknownOutcome):
    """No reply came within the request's deadline."""


class BadReply(CallError):
    """The reply's type or payload is not what the catalogue promises for the request.

    :cvar code: what a row of ours says then; never on the wire.
    """

    code: Final = "bad_reply"


class Refused(CallError):
    """The peer answered ``s2s.error``.

    :param code: the code as the peer wrote it; one that we do not know is kept as it is.
    :param message: the peer's text, for people.
    :param details: the peer's details.
    """

    def __init__(self, code: str, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(f"{code}: {harmless(message)}")
        self.code = code
        self.message = message
        self.details = details

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later: the peer's word, else the code's rule."""
        said = self.details.get("retryable")
        if isinstance(said, bool):
            return said
        known = BY_CODE.get(self.code)
        return known is not None and known.retryable

    @property
    def retry_after_ms(self) -> int | None:
        """The peer's wish for the pause before the next try, in milliseconds."""
        said = self.details.get("retry_after_ms")
        return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None


class DatabaseError(S2SError):
    """What the driver raised, told apart by what a caller can do about it."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot serve now: nothing was done, unless it is a :class:`CommitLost`.

    :param text: the server's message without the data.
    :param state: the SQLSTATE; empty: there is no connection, or it broke.
    """

    def __init__(self, text: str, state: str = "") -> None:
        super().__init__(text)
        self.state = state


class CommitLost(DatabaseUnavailable):
    """The connection broke during the COMMIT: it may or may not have taken effect."""


class NoThread(DatabaseUnavailable):
    """The operating system starts no further thread: nothing was begun."""

    def __init__(self) -> None:
        super().__init__(f"no thread can be started: {THREAD_CURE}")


class StatementRefused(DatabaseError):
    """The database refused the statement for its data.

    :param text: the server's message without the data.
    :param constraint: the constraint's name, where one was violated.
    :param state: the SQLSTATE.
    """

    def __init__(self, text: str, constraint: str | None = None, state: str = "") -> None:
        super().__init__(text)
        self.constraint = constraint
        self.state = state


class RowRefused(StatementRefused):
    """The database does not let a row be changed: a trigger, a constraint, or a value out of range.

    :param key: the row's.
    """

    def __init__(self, key: str, refused: StatementRefused) -> None:
        super().__init__(str(refused), refused.constraint, refused.state)
        self.key = key


class HandlerTimeout(S2SError):
    """A call of a handler, a job or an order took longer than its deadline; nothing of it was done."""


class HandlerStuck(S2SError):
    """A call of a handler, a job or an order does not return, although its deadline is over and its SQL was cancelled.

    :param task: the task of the pool that runs it.
    :param subject: the subject of the call.
    """

    def __init__(self, task: Any, subject: Any, text: str) -> None:
        super().__init__(text)
        self.task = task
        self.subject = subject


class WireError(S2SError):
    """An ``s2s.error`` that we send (docs/protocol.rst, "Errors").

    :param message: one sentence for people; it never holds a secret or the peer's data beyond a name.
    :param details: members of ``details`` beside ``retryable``.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool] = False
    #: The link ends after the answer.
    closes: bool = False
    #: Answered with a signature; only what fails before its MAC holds is not.
    signed: ClassVar[bool] = True
    #: It tells of our state and nothing of the frame: a thousand of them are one line in the log.
    passing: ClassVar[bool] = False
    text: ClassVar[str] = ""

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or self.text)
        self.message = message or self.text
        self.details = details

    def payload(self) -> dict[str, Any]:
        """The payload of the ``s2s.error`` envelope."""
        return {
            "code": self.code,
            "message": self.message,
            "details": {"retryable": self.retryable, **self.details},
        }


class Unsigned(WireError):
    """Failed before its MAC held: answered once without ``auth`` and ``ack_of``, with a fixed text, then closed."""

    closes = True
    signed = False


class BadJson(Unsigned):
    """The frame is not one strict JSON object; ``details.rule`` names the rule broken (see
    :mod:`s2s.protocol.canonical`).
    """

    code = "bad_json"

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(text, rule=rule)


class TooLarge(Unsigned):
    """The length prefix is over ``frame_size_limit``."""

    code = "toolarge"
    text = "the frame is longer than the frame_size_limit"


class AuthRequired(Unsigned):
    """There is no ``auth`` member."""

    code = "auth_required"
    text = "the envelope has no auth member"


class AuthBad(Unsigned):
    """Malformed, unknown, ended or wrong: the peer is not told which."""

    code = "auth_bad"
    text = "the envelope's auth does not verify"


class Forbidden(WireError):
    """``src`` or ``dst`` is not the peer's role or ours, or the key may not sign for ``src``."""

    code = "forbidden"
    closes = True


class Replay(WireError):
    """The request was seen before, or is older than the link's proof."""

    code = "replay"
    closes = True


class TsSkew(WireError):
    """``ts`` is outside the freshness window; the third in a row closes the link (:mod:`s2s.protocol.session`)."""

    code = "ts_skew"
    retryable = True


class BadEnvelope(WireError):
    """A member of the envelope is missing or ill-formed; ``details.path`` points at it."""

    code = "bad_envelope"


class BadPayload(WireError):
    """The payload breaks its JSON Schema; ``details.path`` points at the member."""

    code = "bad_payload"


class UnsupportedVersion(WireError):
    """``v`` is not one of ``details.supported``."""

    code = "unsupported_version"


class UnsupportedType(WireError):
    """The type is unknown, or is not sent in this direction."""

    code = "unsupported_type"


class UnknownCommand(WireError):
    """No handler serves the ``cmd_type``."""

    code = "unknown_command"


class IdemConflict(WireError):
    """The key was used before with another content."""

    code = "idem_conflict"


class StaleVersion(WireError):
    """The database does not have the version."""

    code = "stale_version"


class NotFound(WireError):
    """What the request names does not exist."""

    code = "not_found"


class NotReady(WireError):
    """The link is not proven yet, or the process is still starting."""

    code = "not_ready"
    retryable = True
    passing = True


class Paused(WireError):
    """The engine is paused."""

    code = "paused"
    retryable = True
    passing = True


class ShuttingDown(WireError):
    """The process is draining."""

    code = "shutting_down"
    retryable = True
    passing = True


class Overloaded(WireError):
    """A bound is reached; nothing in force is forgotten to make room."""

    code = "overloaded"
    retryable = True
    passing = True


class DbUnavailable(WireError):
    """The database is away, or a COMMIT's outcome is unknown."""

    code = "db_unavailable"
    retryable = True
    passing = True
    text = "the database is not available; the outcome may be unknown, and the same request may be sent again"


class DeadlineExceeded(WireError):
    """The responder did not finish in time; the outcome is unknown."""

    code = "deadline_exceeded"
    retryable = True
    passing = True
    text = "the request was not answered in time; its outcome is unknown"


class InternalError(WireError):
    """An unexpected exception; ``details.incident`` is in our log beside the traceback."""

    code = "internal_error"
    retryable = True
    text = "something went wrong here; the incident is in our log"


def _leaves(cls: type[WireError]) -> list[type[WireError]]:
    below = [leaf for sub in cls.__subclasses__() for leaf in _leaves(sub)]
    return below or [cls]


#: Every wire code and its class.
BY_CODE: dict[str, type[WireError]] = {leaf.code: leaf for leaf in _leaves(WireError)}
