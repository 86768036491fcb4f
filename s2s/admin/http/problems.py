"""Errors as problem details (RFC 9457) with the error codes of the link (docs/api.rst, "Errors")."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import (
    BY_CODE,
    DatabaseUnavailable,
    DbUnavailable,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    Refused,
    S2SError,
    StatementRefused,
    UnknownOutcome,
    Unsigned,
    UnsupportedType,
    WireError,
    harmless,
)
from s2s.store import kept_rows, sqlstate

CONTENT_TYPE: Final = "application/problem+json"
#: The HTTP status of each error code.
STATUS: Final = {
    "bad_json": 400,
    "bad_envelope": 400,
    "unsupported_version": 400,
    "ts_skew": 400,
    "auth_required": 401,
    "auth_bad": 401,
    "forbidden": 403,
    "not_found": 404,
    "unsupported_type": 405,
    "replay": 409,
    "idem_conflict": 409,
    "stale_version": 409,
    "paused": 409,
    "not_ready": 409,
    "toolarge": 413,
    "bad_payload": 422,
    "unknown_command": 422,
    "internal_error": 500,
    "shutting_down": 503,
    "overloaded": 503,
    "db_unavailable": 503,
    "deadline_exceeded": 504,
}
#: The HTTP status of error codes by which an engine reports its state. Any other error of an engine is unexpected and
#: becomes 502.
_OF_AN_ENGINE: Final = {
    **{code: STATUS[code] for code in ("not_ready", "paused", "overloaded", "db_unavailable", "deadline_exceeded")},
    "shutting_down": 409,
}

_log: Final = Logger(namespace="s2s.admin.http")


class Problem(S2SError):
    """An error response.

    :param error: the corresponding error of the link.
    :param status: the HTTP status, if it differs from the one of the error code.
    :param headers: further headers of the response.
    """

    def __init__(self, error: WireError, status: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.status = status or STATUS[error.code]
        said = error.payload()
        details: dict[str, Any] = said["details"]
        self.body = {
            "type": f"urn:s2s:error:{error.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": error.message,
            "code": error.code,
            **{name: value for name, value in details.items() if name not in _OURS},
        }
        self.headers = dict(headers or {})
        pause_ms = details.get("retry_after_ms")
        if type(pause_ms) is int:
            self.headers["Retry-After"] = str(math.ceil(pause_ms / 1000))
        if self.status == 401:
            self.headers["WWW-Authenticate"] = 'Bearer realm="s2s"'


#: Members that no detail of an error may replace.
_OURS: Final = frozenset({"type", "title", "status", "detail", "code", "instance"})


def wrong_host() -> Problem:
    """Return the problem for a request with a foreign Host: a web page may use DNS rebinding to reach this server."""
    return Problem(Forbidden("the Host of the request is not a name of this server: see --http-hosts"), 421)


def wrong_media_type() -> Problem:
    """Return the problem for a body that is not declared as JSON."""
    return Problem(UnsupportedType("send the body as Content-Type: application/json"), 415)


def wrong_coding() -> Problem:
    """Return the problem for a compressed body."""
    return Problem(UnsupportedType("send the body without Content-Encoding: no coding is supported"), 415)


def problem(error: BaseException) -> Problem:
    """Convert any exception to a problem; an unexpected exception becomes an incident in the log."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, WireError):
        return Problem(error)
    if isinstance(error, Refused):
        return _by_engine(error)
    if isinstance(error, DatabaseUnavailable):
        return Problem(DbUnavailable(retry_after_ms=1000))
    if isinstance(error, UnknownOutcome):
        return Problem(DeadlineExceeded(str(error)))
    incident = secrets.token_hex(8)
    if isinstance(error, StatementRefused):
        # A traceback would add nothing.
        _log.error("incident {incident}: the database refuses a statement: {why}", incident=incident, why=str(error))
        if error.state == kept_rows.STATE:
            # The operator who reads the response can apply the cure.
            return Problem(InternalError(sqlstate.with_cure(error), incident=incident))
    else:
        _log.failure("incident {incident}", Failure(error), incident=incident)
    return Problem(InternalError(incident=incident))


def _by_engine(error: Refused) -> Problem:
    known = BY_CODE.get(error.code)
    if known is None or issubclass(known, Unsigned):
        return Problem(InternalError(f"the engine refused, {harmless(error.code)}: {harmless(error.message)}"), 502)
    said = known(error.message)
    said.details = {**error.details, "retryable": error.retryable}
    return Problem(said, _OF_AN_ENGINE.get(error.code, 502))
