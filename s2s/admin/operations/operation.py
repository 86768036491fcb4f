"""The declaration of an operation, a request that an operator may make (docs/api.rst).

An operation consists of steps and does no I/O. It is a generator that yields either a plain function of a cursor, which
runs in one transaction, or a :class:`WaitFor`. A server runs the steps on its pool and never blocks
(:mod:`s2s.admin.http.operation_runner`); the command line runs the same steps on a connection of its own
(:mod:`s2s.cli.backend`). The declaration is data, which the HTTP API, its OpenAPI document and the client read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from s2s.errors import (
    BadPayload,
    CommitLost,
    DbUnavailable,
    DeadlineExceeded,
    DeadlinePassed,
    Forbidden,
    NotFound,
    WireError,
)
from s2s.protocol.catalogue import BY_NAME, COMMAND_PUSH
from s2s.protocol.catalogue.schema import Schema
from s2s.store.access import Access, allows
from s2s.store.cursor import Unreadable
from s2s.store.driver import Cursor

T = TypeVar("T")
R = TypeVar("R")

#: The JSON Schema of one member of an object.
Rule = Mapping[str, Any]
Step = Callable[[Cursor], Any]


@dataclass(frozen=True)
class WaitFor:
    """A step that waits.

    :param look: returns those of some ids for which the wait is over; it may be called with the ids of several waits.
    :param ids: the wait ends when it is over for all of these ids.
    :param seconds: the maximum time of the wait.
    """

    look: Callable[[Cursor, Sequence[Any]], Collection[Any]]
    ids: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class OperationReply(Generic[R]):
    """The result of an operation.

    :param status: the HTTP status, one of those that the operation declares.
    :param location: the path of the resource that was created.
    :param body: the value as JSON, if a step has encoded it already.
    """

    value: R
    status: int = 200
    location: str | None = None
    body: bytes | None = None


class Left(Exception):
    """Thrown into the steps when the client has disconnected: they may yield one more function, to clean up."""


#: Steps that are part of other steps.
Part = Generator[Step | WaitFor, Any, T]
OperationSteps = Part[OperationReply[R]]


def drop_none(members: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the members without those that are ``None``, which count as not given."""
    return {name: value for name, value in (members or {}).items() if value is not None}


@dataclass(frozen=True)
class OperationRequest:
    """One request.

    :param actor: the caller, for the audit.
    :param path_params: the parameters of the path, by name.
    :param idem_key: the ``Idempotency-Key`` of an order.
    """

    actor: str
    access: Access
    path_params: Mapping[str, Any] = field(default_factory=dict)
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = field(default_factory=dict, repr=False)
    idem_key: str | None = None


def members(rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
    """Return the schema of an object with these members and no others."""
    return {
        "type": "object",
        "properties": dict(rules),
        "required": list(required),
        "additionalProperties": False,
    }


NOTHING: Final[Mapping[str, Any]] = members({})
#: The schema of an ``Idempotency-Key`` is that of a command's ``idem_key``.
IDEM_KEY: Final = Schema(BY_NAME[COMMAND_PUSH].request_schema.document["properties"]["idem_key"])


#: Maximum lengths of bodies, in bytes: for most operations, whose parsing takes at most 0.3 ms of the reactor's time;
#: for those with a long text or many ids; and for those whose text has no limit of its own, as long as the longest
#: frame.
BODY_BYTES: Final = 16_384
LONG_BODY_BYTES: Final = 65_536
MOST_BODY_BYTES: Final = 262_144


@dataclass(frozen=True)
class Operation(Generic[R]):
    """The declaration of one operation.

    :param name: the operationId in the OpenAPI document.
    :param path: the path, with ``{member}`` for each entry of ``path_params``.
    :param access: the lowest role of a token that may use it.
    :param summary: one sentence, without the full stop.
    :param reply: the type of the reply's value, or its JSON Schema.
    :param begin: starts the steps of a request whose members are valid.
    :param path_params: the schemas of the path parameters; a path that they refuse is not found.
    :param query: the schemas of the query's members, which are all optional.
    :param body: the schema of the body; an empty object for an operation without a body.
    :param body_bytes: the maximum length of the body; a longer one is refused before it is read.
    :param refusals: its errors, in addition to those of every operation.
    :param statuses: its success statuses and their descriptions.
    :param takes_key: whether it takes an ``Idempotency-Key``.
    :param is_list: whether it may read many rows. The lists of operators wait for each other; control requests never
        wait for them.
    :param refused: records that a request was refused before it began.
    """

    name: str
    method: Literal["GET", "POST", "PUT"]
    path: str
    access: Access
    summary: str
    reply: Any = field(repr=False)
    begin: Callable[[OperationRequest], OperationSteps[R]] = field(repr=False)
    path_params: Mapping[str, Rule] = field(default_factory=dict, repr=False)
    query: Mapping[str, Rule] = field(default_factory=dict, repr=False)
    body: Mapping[str, Any] = field(default_factory=lambda: NOTHING, repr=False)
    body_bytes: int = BODY_BYTES
    refusals: tuple[type[WireError], ...] = ()
    statuses: Mapping[int, str] = field(default_factory=lambda: {200: "Done."}, repr=False)
    takes_key: bool = False
    is_list: bool = False
    refused: Callable[[Cursor, OperationRequest, WireError], None] | None = field(default=None, repr=False)
    path_params_schema: Schema = field(init=False, repr=False, compare=False)
    query_schema: Schema = field(init=False, repr=False, compare=False)
    body_schema: Schema = field(init=False, repr=False, compare=False)
    reply_schema: Schema | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path_params_schema", Schema(members(self.path_params, *self.path_params)))
        object.__setattr__(self, "query_schema", Schema(members(self.query)))
        object.__setattr__(self, "body_schema", Schema(self.body))
        object.__setattr__(self, "reply_schema", Schema(self.reply) if isinstance(self.reply, Mapping) else None)

    @property
    def is_write(self) -> bool:
        """Whether it may change data."""
        return self.access != "observer"

    def check(self, ask: OperationRequest) -> None:
        """Refuse a request that is not permitted or not valid.

        :raises NotFound: the path parameters violate their schema.
        :raises Forbidden: the token's role does not permit the operation.
        :raises BadPayload: the query or the body violates its schema.
        """
        if not self.path_params_schema.is_valid(dict(ask.path_params)):
            raise NotFound(f"there is nothing at {self.path} of this name")
        if not allows(ask.access, self.access):
            raise Forbidden(f"it takes a token of role {self.access}, and yours is of role {ask.access}")
        self.query_schema.check(dict(ask.query), "/query")
        self.body_schema.check(ask.body, "/body")


def perform(operation: Operation[R], ask: OperationRequest) -> OperationSteps[R]:
    """Return the steps of an operation, with its checks first."""
    try:
        operation.check(ask)
    except WireError as error:
        if operation.refused is not None and isinstance(error, (BadPayload, Forbidden)):
            refused, why = operation.refused, error
            yield lambda txn: refused(txn, ask, why)
        raise
    ask = replace(ask, query={**operation.query_schema.defaults, **ask.query})
    return (yield from operation.begin(ask))


def advance(steps: OperationSteps[R], came: Any, failed: Exception | None) -> Step | WaitFor | OperationReply[R]:
    """Send the result of the last step into the steps, and return the next step, or the reply at the end.

    :param came: the result of the last step.
    :param failed: the exception with which the last step failed; ``None``: it did not fail.
    """
    try:
        return steps.send(came) if failed is None else steps.throw(failed)
    except StopIteration as end:
        reply: OperationReply[R] = end.value
        return reply


def once(work: Callable[[Cursor, OperationRequest], R]) -> Callable[[OperationRequest], OperationSteps[R]]:
    """Make an operation's steps from one function, which runs in one transaction and returns the reply's value."""

    def begin(ask: OperationRequest) -> OperationSteps[R]:
        return OperationReply((yield lambda txn: work(txn, ask)))

    return begin


def run_non_idempotent(step: Callable[[Cursor], T], effect: str, **details: Any) -> Part[T]:
    """Run a step that a repeated request would perform a second time.

    :param effect: its effect in words, such as "the order was given".
    :raises WireError: it is unknown whether the step took effect, so the error is not retryable.
    """
    unknown = f"it is unknown whether {effect}: check before you repeat the request"
    try:
        came: T = yield step
    except CommitLost:
        raise DbUnavailable(f"the database was lost, and {unknown}", retryable=False, **details) from None
    except DeadlinePassed as error:
        raise DeadlineExceeded(f"{error}, and {unknown}", retryable=False, **details) from None
    return came


# --- JSON ------------------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """Encode a reply as JSON, with rows as objects and times in RFC 3339."""
    return msgspec.json.encode(value, enc_hook=_encode_other)


def encoded(data: bytes) -> Any:
    """Wrap encoded JSON, so that :func:`encode` includes it unchanged."""
    return msgspec.Raw(data)


def _encode_other(value: object) -> Any:
    if isinstance(value, Unreadable):
        # An object, because the API promises objects for the values of jsonb columns.
        return {"unreadable": str(value)}
    raise NotImplementedError(type(value).__name__)  # the exception that msgspec expects for an unsupported type


def decode(data: Any, operation: Operation[R]) -> R:
    """Convert parsed JSON to a reply of an operation.

    :raises ValueError: the data is not a reply of this operation.
    """
    if operation.reply_schema is not None:
        if not operation.reply_schema.is_valid(data):
            raise ValueError("the schema of the reply refuses it")
        return data  # type: ignore[no-any-return]
    read: R = msgspec.convert(data, operation.reply)
    return read
