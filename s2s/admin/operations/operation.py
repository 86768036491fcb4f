"""What an operation is: one thing that an operator may ask for (docs/api.rst).

An operation is steps, and no I/O: a generator that yields either a plain function of a cursor, to be run in one
transaction, or an :class:`WaitFor`, to be waited for. A server takes the steps on its pool and never blocks
(:mod:`s2s.admin.http.operation_runner`); the command line takes the same ones on a connection of its own
(:mod:`s2s.cli.backend`). Its declaration is data: the HTTP API, its OpenAPI document and the client read it.
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

#: The JSON Schema of one member.
Rule = Mapping[str, Any]
Step = Callable[[Cursor], Any]


@dataclass(frozen=True)
class WaitFor:
    """To be waited for.

    :param look: gives those of some ids for which the wait is over; it may be asked for the ids of several waits.
    :param ids: all of them must be over.
    :param seconds: no longer than that.
    """

    look: Callable[[Cursor, Sequence[Any]], Collection[Any]]
    ids: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Reply(Generic[R]):
    """What an operation came to.

    :param status: of HTTP, one that the operation declares.
    :param location: the path of what was made.
    :param body: the value as JSON, where a step has made it.
    """

    value: R
    status: int = 200
    location: str | None = None
    body: bytes | None = None


class Left(Exception):
    """Thrown into steps when nobody waits for them any more: they may yield one function more, which tidies up."""


#: Steps that are a part of others.
Part = Generator[Step | WaitFor, Any, T]
Steps = Part[Reply[R]]


def drop_none(members: Mapping[str, Any] | None) -> dict[str, Any]:
    """Leave out what is ``None``: it was not said."""
    return {name: value for name, value in (members or {}).items() if value is not None}


@dataclass(frozen=True)
class OperationRequest:
    """One request.

    :param actor: who asks, for the audit.
    :param where: the members of the path, by name.
    :param idem_key: of an order.
    """

    actor: str
    access: Access
    path_params: Mapping[str, Any] = field(default_factory=dict)
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = field(default_factory=dict, repr=False)
    idem_key: str | None = None


def members(rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
    """Make the schema of an object of these members and no others."""
    return {
        "type": "object",
        "properties": dict(rules),
        "required": list(required),
        "additionalProperties": False,
    }


NOTHING: Final[Mapping[str, Any]] = members({})
#: An ``Idempotency-Key`` is like a command's.
IDEM_KEY: Final = Schema(BY_NAME[COMMAND_PUSH].request_schema.document["properties"]["idem_key"])


#: The longest bodies, in bytes: of most operations, whose parsing takes 0.3 ms of the reactor's time at most; of those
#: that take a long text or many ids; and of those whose text has no bound of its own, as long as the longest frame.
BODY_BYTES: Final = 16_384
LONG_BODY_BYTES: Final = 65_536
MOST_BODY_BYTES: Final = 262_144


@dataclass(frozen=True)
class Operation(Generic[R]):
    """The declaration of one operation.

    :param name: what the OpenAPI document calls it.
    :param path: with ``{member}`` for each entry of ``path_params``.
    :param access: the least that a token must have.
    :param summary: one sentence, without its stop.
    :param reply: the type of what it comes to, or its JSON Schema.
    :param begin: begins the steps of a request whose members are valid.
    :param where: the schemas of the path's members; what they refuse is not found.
    :param query: the schemas of the query's members, of which each is optional.
    :param body: the schema of the body; an empty object where nothing is to be said.
    :param body_bytes: the longest body, which is refused by its length before it is read.
    :param refusals: what it may be refused with, beside what any may.
    :param statuses: those of its success, and what they mean.
    :param takes_key: whether it takes an ``Idempotency-Key``.
    :param is_list: whether it may read much: the lists of operators wait for each other, and steering never for them.
    :param refused: writes down that a request was refused before it began.
    """

    name: str
    method: Literal["GET", "POST", "PUT"]
    path: str
    access: Access
    summary: str
    reply: Any = field(repr=False)
    begin: Callable[[OperationRequest], Steps[R]] = field(repr=False)
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
        """Whether it may change anything."""
        return self.access != "observer"

    def check(self, ask: OperationRequest) -> None:
        """Refuse what may not be asked, or not so.

        :raises NotFound: the path names nothing.
        :raises Forbidden: the token's role does not include it.
        :raises BadPayload: the query or the body breaks its schema.
        """
        if not self.path_params_schema.is_valid(dict(ask.path_params)):
            raise NotFound(f"there is nothing at {self.path} of this name")
        if not allows(ask.access, self.access):
            raise Forbidden(f"it takes a token of role {self.access}, and yours is of role {ask.access}")
        self.query_schema.check(dict(ask.query), "/query")
        self.body_schema.check(ask.body, "/body")


def perform(operation: Operation[R], ask: OperationRequest) -> Steps[R]:
    """Take the steps of an operation, unless it is refused."""
    try:
        operation.check(ask)
    except WireError as error:
        if operation.refused is not None and isinstance(error, (BadPayload, Forbidden)):
            refused, why = operation.refused, error
            yield lambda txn: refused(txn, ask, why)
        raise
    ask = replace(ask, query={**operation.query_schema.defaults, **ask.query})
    return (yield from operation.begin(ask))


def advance(steps: Steps[R], came: Any, failed: Exception | None) -> Step | WaitFor | Reply[R]:
    """Take what the step before came to, and give the next one; or the reply, at the end.

    :param failed: why the step before failed, where it did.
    """
    try:
        return steps.send(came) if failed is None else steps.throw(failed)
    except StopIteration as end:
        reply: Reply[R] = end.value
        return reply


def once(work: Callable[[Cursor, OperationRequest], R]) -> Callable[[OperationRequest], Steps[R]]:
    """Make an operation's steps of one function: one transaction, and its result is the reply."""

    def begin(ask: OperationRequest) -> Steps[R]:
        return Reply((yield lambda txn: work(txn, ask)))

    return begin


def run_non_idempotent(step: Callable[[Cursor], T], what: str, **details: Any) -> Part[T]:
    """Take a step that would do something a second time if whoever asked did so again.

    :param what: what it does, in words, such as "the order was given".
    :raises WireError: it is not known whether it took effect, and so it must not be asked for again.
    """
    unknown = f"whether {what} is unknown: look before it is asked for again"
    try:
        came: T = yield step
    except CommitLost:
        raise DbUnavailable(f"the database was lost, and {unknown}", retryable=False, **details) from None
    except DeadlinePassed as error:
        raise DeadlineExceeded(f"{error}, and {unknown}", retryable=False, **details) from None
    return came


# --- JSON ------------------------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """Write a reply as JSON: rows as objects, times in RFC 3339."""
    return msgspec.json.encode(value, enc_hook=_encode_other)


def encoded(data: bytes) -> Any:
    """Return a value as which :func:`encode` writes JSON that was made before."""
    return msgspec.Raw(data)


def _encode_other(value: object) -> Any:
    if isinstance(value, Unreadable):
        # An object, as what stands in a jsonb column of ours is promised to be.
        return {"unreadable": str(value)}
    raise NotImplementedError(type(value).__name__)  # what msgspec wants to hear of a type that is not ours


def decode(data: Any, operation: Operation[R]) -> R:
    """Read a reply out of parsed JSON.

    :raises ValueError: it is none of this operation.
    """
    if operation.reply_schema is not None:
        if not operation.reply_schema.is_valid(data):
            raise ValueError("the schema of the reply refuses it")
        return data  # type: ignore[no-any-return]
    read: R = msgspec.convert(data, operation.reply)
    return read
