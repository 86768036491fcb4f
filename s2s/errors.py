"""Every error, in one tree, with its wire code.

::

    S2SError
    ├── OperatorError            a mistake of configuration or environment: one line that names the remedy
    │   ├── SchemaError          the database schema is older or newer than this release
    │   └── NoSigningKey         no key of ours may sign now
    ├── LocalError               the caller asked for an action that the protocol forbids; nothing was written
    │   ├── CanonicalError       a value has no canonical JSON form
    │   ├── InvalidPayload       a payload breaks its schema
    │   ├── TooBigToSend         a frame exceeds the current limit
    │   └── LineFull             too many calls wait for the window already
    ├── CallError                one of our requests failed
    │   ├── Unreachable          there was no connection
    │   ├── UnknownOutcome       the request may or may not have taken effect
    │   │   ├── LinkLost
    │   │   └── DeadlinePassed
    │   ├── BadReply             the peer's answer is not valid for this request
    │   └── Refused              the peer answered ``s2s.error``
    ├── HandlerTimeout           plug-in code took longer than its deadline
    ├── HandlerStuck             plug-in code does not return after its deadline
    ├── DatabaseError
    │   ├── DatabaseUnavailable  there is no connection, or the connection was lost
    │   │   ├── CommitLost       the connection was lost during a COMMIT, whose outcome is unknown
    │   │   └── NoThread         the operating system starts no further thread
    │   └── StatementRefused     the database refused the data
    │       └── RowRefused       the database does not allow a change of a row
    └── WireError                an error that we send to a peer: one class for each code, see :data:`BY_CODE`
        ├── Unsigned             BadJson TooLarge AuthRequired AuthBad
        ├── Forbidden Replay TsSkew
        ├── BadEnvelope BadPayload UnsupportedVersion UnsupportedType
        ├── UnknownCommand IdemConflict StaleVersion NotFound
        └── NotReady Paused ShuttingDown Overloaded DbUnavailable DeadlineExceeded InternalError

A :class:`WireError` is an error that *we* send. When a *peer* sends one, the call fails with :class:`Refused`. The two
are separate classes, so that a peer's error is never sent as ours (docs/protocol.rst, "Errors").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

#: The attribute of an exception that holds its description, which is one line.
_LINE: Final = "_s2s_line"
#: The remedy when the operating system starts no further thread.
THREAD_CURE: Final = "raise the limit of its processes: --pids-limit of a container, TasksMax= of systemd, or ulimit -u"
#: Control characters and line separators. PostgreSQL refuses NUL, and a terminal interprets ESC.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def harmless(text: str) -> str:
    """Return a peer's text in a form that is safe in a log line: at most 200 printable ASCII characters."""
    return (text if text.isascii() and text.isprintable() else ascii(text))[:200]


def one_line(error: BaseException) -> str:
    """Return a description of an exception as one line that a table can store.

    Only the first line is used, because the further lines of a database driver's error quote the row.
    """
    if _LINE in vars(error):
        return str(vars(error)[_LINE])
    try:
        said = str(error)
    except BaseException:  # the exception's class may be a plug-in's, whose __str__ may raise any exception
        said = "it does not say why"
    return storable(f"{type(error).__name__}: {said}")


def describe(error: BaseException) -> None:
    """Store the description of an exception in it now, because its ``__str__`` may be plug-in code.

    That code must run inside the deadline of the code that raised the exception.
    """
    vars(error)[_LINE] = one_line(error)


def storable(text: str) -> str:
    """Return the first line of a text, at most 500 characters, without control characters and line separators."""
    return _CONTROLS.sub("", text.partition("\n")[0]).encode("utf-8", "replace").decode()[:500]


class S2SError(Exception):
    """The root of the tree."""


class OperatorError(S2SError):
    """A mistake of configuration or environment; its text is one line that names the remedy."""


class SchemaError(OperatorError):
    """The database's schema is older or newer than this release."""


class NoSigningKey(OperatorError):
    """No key that may sign for this role is active."""


class LocalError(S2SError):
    """The caller asked for an action that the protocol forbids. Nothing was sent."""


class CanonicalError(LocalError):
    """A value has no canonical form; the text names the place and the alternative."""


class InvalidPayload(LocalError):
    """One of our payloads breaks its JSON Schema; the text names the place."""


class TooBigToSend(LocalError):
    """A frame would exceed the smaller of the two sides' ``frame_size_limit``."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the frame has {size} bytes and the limit is {limit}: send less, or raise --frame-size-limit")
        self.size = size
        self.limit = limit


class LineFull(LocalError):
    """The bound on the calls that wait for the window is reached."""


class CallError(S2SError):
    """One of our requests failed."""


class Unreachable(CallError):
    """There was no connection: nothing was sent."""


class UnknownOutcome(CallError):
    """The request may or may not have taken effect: query the state, or send the request again if it is idempotent."""


class LinkLost(UnknownOutcome):
    """The link ended before the reply came."""


class DeadlinePassed(UnknownOutcome):
    """No reply came within the request's deadline."""


class BadReply(CallError):
    """The reply's type or payload is not the one that the catalogue defines for the request.

    :cvar code: the code in our tables; it is never sent.
    """

    code: Final = "bad_reply"


class Refused(CallError):
    """The peer answered ``s2s.error``.

    :param code: the code as the peer wrote it, even if it is unknown here.
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
        """Whether the same request may succeed later: the peer's ``details.retryable``, else the code's default."""
        said = self.details.get("retryable")
        if isinstance(said, bool):
            return said
        known = BY_CODE.get(self.code)
        return known is not None and known.retryable

    @property
    def retry_after_ms(self) -> int | None:
        """The pause before the next attempt that the peer asks for, in milliseconds."""
        said = self.details.get("retry_after_ms")
        return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None


class DatabaseError(S2SError):
    """An error of the database driver. The subclasses differ in the action that a caller can take."""


class DatabaseUnavailable(DatabaseError):
    """The database is not available now. Nothing was done, unless the error is a :class:`CommitLost`.

    :param text: the server's message without the data.
    :param state: the SQLSTATE; empty if there is no connection or it was lost.
    """

    def __init__(self, text: str, state: str = "") -> None:
        super().__init__(text)
        self.state = state


class CommitLost(DatabaseUnavailable):
    """The connection was lost during the COMMIT, which may or may not have taken effect."""


class NoThread(DatabaseUnavailable):
    """The operating system starts no further thread. Nothing was started."""

    def __init__(self) -> None:
        super().__init__(f"no thread can be started: {THREAD_CURE}")


class StatementRefused(DatabaseError):
    """The database refused the statement because of its data.

    :param text: the server's message without the data.
    :param constraint: the name of the violated constraint, if there is one.
    :param state: the SQLSTATE.
    """

    def __init__(self, text: str, constraint: str | None = None, state: str = "") -> None:
        super().__init__(text)
        self.constraint = constraint
        self.state = state


class RowRefused(StatementRefused):
    """The database refused a change of a row because of a trigger, a constraint, or a value out of range.

    :param key: the key of the row.
    """

    def __init__(self, key: str, refused: StatementRefused) -> None:
        super().__init__(str(refused), refused.constraint, refused.state)
        self.key = key


class HandlerTimeout(S2SError):
    """A call of a handler, a job or an order took longer than its deadline; none of its changes took effect."""


class HandlerStuck(S2SError):
    """A call of a handler, a job or an order does not return, although its deadline is over and its SQL was cancelled.

    :param task: the task of the pool that runs the call.
    :param subject: the subject of the call.
    """

    def __init__(self, task: Any, subject: Any, text: str) -> None:
        super().__init__(text)
        self.task = task
        self.subject = subject


class WireError(S2SError):
    """An ``s2s.error`` that we send (docs/protocol.rst, "Errors").

    :param message: one sentence for people; it never holds a secret or the peer's data beyond a name.
    :param details: members of ``details`` in addition to ``retryable``.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool] = False
    #: Whether the link is closed after the answer.
    closes: bool = False
    #: Whether the answer is signed. Only the answer to a frame that fails before its MAC is verified is unsigned.
    signed: ClassVar[bool] = True
    #: Whether the error is about our state and not about the frame. Such errors are logged as counts, not one by one.
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
    """The frame failed before its MAC was verified.

    The answer has a fixed text and no ``auth`` and ``ack_of``. Then the link is closed.
    """

    closes = True
    signed = False


class BadJson(Unsigned):
    """The frame is not one strict JSON object; ``details.rule`` names the broken rule (see
    :mod:`s2s.protocol.canonical`).
    """

    code = "bad_json"

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(text, rule=rule)


class TooLarge(Unsigned):
    """The length prefix exceeds ``frame_size_limit``."""

    code = "toolarge"
    text = "the frame is longer than the frame_size_limit"


class AuthRequired(Unsigned):
    """There is no ``auth`` member."""

    code = "auth_required"
    text = "the envelope has no auth member"


class AuthBad(Unsigned):
    """``auth`` is malformed, its key is unknown or not active, or the MAC is wrong; the answer does not say which."""

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
    """The type is unknown, or is not served by this side."""

    code = "unsupported_type"


class UnknownCommand(WireError):
    """No handler serves the ``cmd_type``."""

    code = "unknown_command"


class IdemConflict(WireError):
    """The ``idem_key`` was used before with another content."""

    code = "idem_conflict"


class StaleVersion(WireError):
    """The database does not have the version."""

    code = "stale_version"


class NotFound(WireError):
    """The object that the request names does not exist."""

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
    """A bound is reached; no valid entry is removed to make room."""

    code = "overloaded"
    retryable = True
    passing = True


class DbUnavailable(WireError):
    """The database is not available, or the outcome of a COMMIT is unknown."""

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
    """An unexpected exception; our log has ``details.incident`` beside the traceback."""

    code = "internal_error"
    retryable = True
    text = "something went wrong here; the incident is in our log"


def _leaves(cls: type[WireError]) -> list[type[WireError]]:
    below = [leaf for sub in cls.__subclasses__() for leaf in _leaves(sub)]
    return below or [cls]


#: Every wire code and its class.
BY_CODE: dict[str, type[WireError]] = {leaf.code: leaf for leaf in _leaves(WireError)}
