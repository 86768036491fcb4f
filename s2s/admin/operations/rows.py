"""Operations on rows that operators manage, for commands and for the outbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from s2s.admin.operations.operation import (
    LONG_BODY_BYTES,
    Operation,
    OperationReply,
    OperationRequest,
    OperationSteps,
    Rule,
    members,
)
from s2s.errors import NotFound, NotReady, StaleVersion
from s2s.store.driver import Cursor
from s2s.store.tables import actions
from s2s.store.tables.actions import Action, RowOutcome

T = TypeVar("T")

#: The schema of the id of a row.
ROW_ID: Final[Rule] = {"type": "integer", "minimum": 1, "maximum": 2**53 - 1}
CMD_TYPE: Final[Rule] = {"type": "string", "maxLength": 64, "description": "Only commands of this type."}
#: Maximum steps of one request for all dead rows.
MOST_STEPS: Final = 100


@dataclass(frozen=True)
class Wording:
    """The texts for the rows of a table.

    :param noun: the noun for a row.
    :param done: the text for each outcome of a :class:`s2s.store.tables.actions.RowOutcome` that is done.
    :param obstacles: the obstacle for each outcome that is not done, and the verbs of the possible actions.
    """

    noun: str
    done: Mapping[str, str]
    obstacles: Mapping[str, tuple[str, tuple[str, ...]]]

    def tell(self, fate: RowOutcome, command: str = "{verb}") -> str:
        """Return one line about the outcome for a row.

        :param command: the format of a suggested action, with ``{verb}`` and ``{id}``.
        """
        if fate.is_done:
            return f"{self.noun} {fate.id}: {self.done[fate.outcome]}"
        why, verbs = self.obstacles[fate.outcome]
        cure = ", or ".join(command.format(verb=verb, id=fate.id) for verb in verbs)
        return f"{self.noun} {fate.id}: {why}{f': {cure}' if cure else ''}"


@dataclass(frozen=True)
class RowOutcomes:
    """The outcome for each row that the request named."""

    items: list[RowOutcome]


@dataclass(frozen=True)
class BulkOutcome:
    """The outcome of a request for all dead rows.

    :param count: the number of rows that were changed.
    :param is_all: no dead row is left of those before the request; ``False``: repeat the request.
    """

    count: int
    is_all: bool


@dataclass(frozen=True)
class RowOperations:
    """The operations that perform one action on rows of one table.

    :param some: the operation on several rows by their ids.
    :param one: the operation on one row.
    """

    some: Operation[RowOutcomes]
    one: Operation[RowOutcome]

    @property
    def both(self) -> tuple[Operation[Any], ...]:
        """Both operations."""
        return (self.some, self.one)


def show(
    name: str, path: str, member: str, words: Wording, row: type[T], find: Callable[..., T | None]
) -> Operation[T]:
    """Declare the operation that shows one row.

    :param member: the path parameter of its id.
    :param find: returns the row: ``find(txn, id)``.
    """

    def begin(ask: OperationRequest) -> OperationSteps[T]:
        row_id = ask.path_params[member]
        found: T | None = yield lambda txn: find(txn, row_id)
        if found is None:
            missing, _ = words.obstacles[actions.MISSING]
            raise NotFound(f"there is no {words.noun} {row_id}{missing.removeprefix('there is none')}")
        return OperationReply(found)

    where = {member: ROW_ID}
    return Operation(
        name,
        "GET",
        path,
        "observer",
        f"Show all of one {words.noun}",
        row,
        begin,
        path_params=where,
        refusals=(NotFound,),
    )


def act(
    action: Action,
    path: str,
    words: Wording,
    summary: str,
    params: Callable[[Cursor], dict[str, Any]] = lambda _: {},
) -> RowOperations:
    """Declare the operations that perform one action on rows.

    :param path: the path of the list.
    :param summary: the summary of the operations, with ``{}`` for the rows.
    :param params: returns the further parameters of the action's statement.
    """

    def on_some(txn: Cursor, ids: list[int]) -> list[RowOutcome]:
        return actions.act(txn, action, ids, **params(txn))

    def some(ask: OperationRequest) -> OperationSteps[RowOutcomes]:
        ids = list(dict.fromkeys(ask.body["ids"]))
        return OperationReply(RowOutcomes((yield lambda txn: on_some(txn, ids))))

    def one(ask: OperationRequest) -> OperationSteps[RowOutcome]:
        [fate] = yield lambda txn: on_some(txn, [ask.path_params[action.id]])
        if fate.is_done:
            return OperationReply(fate)
        if fate.outcome == actions.MISSING:
            raise NotFound(words.tell(fate))
        if fate.outcome == actions.LOCKED:
            raise NotReady(words.tell(fate), retry_after_ms=1000)
        raise StaleVersion(words.tell(fate), state=fate.outcome)

    noun = words.noun.replace(" ", "_")
    ids = {"type": "array", "items": ROW_ID, "minItems": 1, "maxItems": actions.STEP_ROWS}
    return RowOperations(
        Operation(
            f"{action.verb}_{noun}s",
            "POST",
            f"{path}/{action.verb}",
            "operator",
            summary.format(f"{words.noun}s by their ids"),
            RowOutcomes,
            some,
            body=members({"ids": ids}, "ids"),
            body_bytes=LONG_BODY_BYTES,
        ),
        Operation(
            f"{action.verb}_{noun}",
            "POST",
            f"{path}/{{{action.id}}}/{action.verb}",
            "operator",
            summary.format(f"one {words.noun}"),
            RowOutcome,
            one,
            path_params={action.id: ROW_ID},
            refusals=(NotFound, NotReady, StaleVersion),
        ),
    )


def act_on_dead(
    action: Action,
    path: str,
    words: Wording,
    summary: str,
    params: Callable[[Cursor], dict[str, Any]] = lambda _: {},
) -> Operation[BulkOutcome]:
    """Declare the operation that performs one action on all dead rows; see :func:`act`."""

    def dead(ask: OperationRequest) -> OperationSteps[BulkOutcome]:
        count = after = 0
        for _ in range(MOST_STEPS):
            step = partial(on_dead, after, ask.body.get("cmd_type"))
            changed: list[int] = yield step
            if not changed:
                return OperationReply(BulkOutcome(count, True))
            count += len(changed)
            after = changed[-1]
        return OperationReply(BulkOutcome(count, False))

    def on_dead(after: int, cmd_type: str | None, txn: Cursor) -> list[int]:
        return actions.act_on_dead(txn, action, after, cmd_type, **params(txn))

    return Operation(
        f"{action.verb}_dead_{words.noun.replace(' ', '_')}s",
        "POST",
        f"{path}/{action.verb}-dead",
        "operator",
        summary.format(f"all dead {words.noun}s"),
        BulkOutcome,
        dead,
        body=members({"cmd_type": CMD_TYPE}),
    )
