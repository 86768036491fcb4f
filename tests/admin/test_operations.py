"""Operations: their checks, steps and pages: :mod:`s2s.admin.operations.operation` and its pages."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.admin import operations
from s2s.admin.operations import commands, engines, notices, orders, pages
from s2s.admin.operations.operation import (
    Operation,
    OperationReply,
    OperationRequest,
    WaitFor,
    advance,
    decode,
    encode,
    members,
    perform,
)
from s2s.admin.operations.pages import Page, after_key, page
from s2s.errors import (
    BadPayload,
    CommitLost,
    DatabaseUnavailable,
    DbUnavailable,
    DeadlineExceeded,
    DeadlinePassed,
    Forbidden,
    NotFound,
    Overloaded,
    StatementRefused,
    UnknownOutcome,
    WireError,
)
from s2s.store.access import ACCESS
from s2s.store.cursor import Unreadable, read_json
from s2s.store.tables.commands_admin import CommandRow
from s2s.store.tables.engines import EngineRow
from tests.support.installed import FOUND, OPERATIONS, ORDERS

_TXN: Any = object()

_TICK = orders.operation(FOUND.orders["admin.engine.force_tick.v1"])


def _operation(begin: Callable[[OperationRequest], Any], **more: Any) -> Operation[Any]:
    said: dict[str, Any] = {
        "path_params": {"id": {"type": "integer", "minimum": 1}},
        "query": {"wait": {"type": "number", "maximum": 5, "default": 2}, "word": {"type": "string"}},
        "body": members({"n": {"type": "integer"}}, "n"),
        **more,
    }
    return Operation("x", "POST", "/v1/x/{id}", "operator", "Do it", {"type": "object"}, begin, **said)


class PerformTests(SynchronousTestCase):
    """Running the steps of an operation."""

    def steps(self, operation: Operation[Any], **ask: Any) -> Any:
        """Start an operation."""
        said: dict[str, Any] = {"path_params": {"id": 1}, "body": {"n": 1}, "access": "operator", **ask}
        return perform(operation, OperationRequest("me", **said))

    def test_defaults(self) -> None:
        """Absent query parameters get the defaults of the schema; given ones stay."""
        seen = []

        def begin(ask: OperationRequest) -> Any:
            seen.append(dict(ask.query))
            yield lambda _: None
            return OperationReply({})

        for query in ({}, {"wait": 1, "word": "a"}):
            next(self.steps(_operation(begin), query=query))
        self.assertEqual(seen, [{"wait": 2}, {"wait": 1, "word": "a"}])

    def test_refused(self) -> None:
        """An invalid path, role, query or body is refused before the first step, in this order."""

        def begin(ask: OperationRequest) -> Any:
            raise AssertionError("it has begun")
            yield

        for ask, error, at in (
            ({"path_params": {"id": 0}, "access": "observer"}, NotFound, None),
            ({"access": "observer", "query": {"wait": 9}}, Forbidden, None),
            ({"query": {"wait": 9}, "body": {}}, BadPayload, "/query/wait"),
            ({"query": {"x": 1}}, BadPayload, "/query/x"),
            ({"body": {}}, BadPayload, "/body/n"),
            ({"body": []}, BadPayload, "/body"),
        ):
            refused = self.assertRaises(error, next, self.steps(_operation(begin), **ask))
            self.assertEqual(refused.details.get("path"), at)

    def test_told(self) -> None:
        """An operation that records refusals does so in a step of its own, and is refused afterwards."""
        told: list[Any] = []

        def tell(txn: Any, ask: OperationRequest, error: WireError) -> None:
            told.append((txn, ask.actor, error.code))

        for ask, code in (({"access": "observer"}, "forbidden"), ({"body": {}}, "bad_payload")):
            steps = self.steps(_operation(lambda _: iter(()), refused=tell), **ask)
            next(steps)(_TXN)
            self.assertEqual(told.pop(), (_TXN, "me", code))
            self.assertRaises((Forbidden, BadPayload), steps.send, None)
        self.assertRaises(
            NotFound, next, self.steps(_operation(lambda _: iter(()), refused=tell), path_params={"id": 0})
        )
        self.assertEqual(told, [])

    def test_an_engine_without_a_name(self) -> None:
        """A control request for an engine without a name is refused in one line with the cure."""
        for operation in (engines.HEALTH, engines.PAUSE_ENGINE, engines.RESUME_ENGINE, engines.SWEEP_ENGINE):
            body = {"since_ts": 0} if operation is engines.SWEEP_ENGINE else {"reason": "x"}
            body = {} if operation is engines.HEALTH else body
            steps = perform(operation, OperationRequest("me", "operator", {"name": ""}, body=body))
            error = self.assertRaises(NotFound, next, steps)
            self.assertIn("it has to give a name in its health ack", error.message)


class OnceTests(SynchronousTestCase):
    """Steps that are not idempotent and may have taken effect."""

    def begin(self, operation: Operation[Any], body: Any, **ask: Any) -> Any:
        """Start an operation, and return the steps with the first one taken."""
        steps = perform(operation, OperationRequest("me", "admin", body=body, **ask))
        next(steps)
        return steps

    def test_unknown(self) -> None:
        """Without a key a lost outcome is not retryable, and names the id of an order; with a key it is retryable."""
        tick, broadcast = _TICK, notices.BROADCAST
        for lost, said in ((CommitLost("x"), DbUnavailable), (DeadlinePassed("x"), DeadlineExceeded)):
            for operation, body in (
                (tick, {"job_type": "decay"}),
                (broadcast, {"scope": "global", "message": "Hello", "severity": "info", "ttl_s": 60}),
            ):
                error = self.assertRaises(said, self.begin(operation, body).throw, lost)
                details = error.payload()["details"]
                self.assertIs(details.pop("retryable"), False)
                self.assertEqual(list(details), ["order_id"] if operation is tick else [])
                self.assertIn(details.get("order_id", ""), str(error))
            error = self.assertRaises(type(lost), self.begin(tick, {"job_type": "decay"}, idem_key="k").throw, lost)

    def test_not_begun(self) -> None:
        """A step that certainly had no effect may be retried."""
        for lost in (DatabaseUnavailable("x"), DeadlineExceeded(), Overloaded()):
            steps = self.begin(
                notices.BROADCAST, {"scope": "global", "message": "Hello", "severity": "info", "ttl_s": 60}
            )
            self.assertIs(self.assertRaises(type(lost), steps.throw, lost), lost)

    def test_given(self) -> None:
        """An order that is stored is returned with status 202, whatever error the wait for it has."""
        now = datetime.now(timezone.utc)
        row = orders.OrderView(
            "1", "x", {}, "me", None, "queued", None, None, 0, None, None, now, None, None, progress=None
        )
        for lost in (Overloaded(), DeadlinePassed("x"), DatabaseUnavailable("x"), StatementRefused("x")):
            for later in (False, True):
                steps = self.begin(
                    _TICK,
                    {"job_type": "decay"},
                    query={"wait": 5},
                )
                self.assertIsInstance(steps.send((row, True)), WaitFor)
                if later:
                    steps.send(None)
                reply = self.assertRaises(StopIteration, steps.throw, lost).value
                self.assertEqual((reply.status, reply.value, reply.location), (202, row, "/v1/orders/1"))

    def test_asked(self) -> None:
        """A control request that was sent has an unknown outcome, whatever error the wait for its answer has."""
        for lost in (Overloaded(), DeadlinePassed("x"), DatabaseUnavailable("x"), StatementRefused("x")):
            steps = self.begin(engines.PAUSE_ENGINE, {"reason": "x"}, path_params={"name": "e"})
            steps.send(None)
            steps.send([EngineRow("e", "running", "", "k1", None, None, None)])
            self.assertIsInstance(steps.send({("e", "k1"): 1}), WaitFor)
            self.assertRaises(UnknownOutcome, steps.throw, lost)


class PageTests(SynchronousTestCase):
    """Paging of lists."""

    @given(
        sizes=st.lists(st.integers(0, 40), max_size=40),
        limit=st.integers(1, 12),
        most=st.integers(1, 200),
        chunk=st.integers(1, 9),
    )
    def test_model(self, sizes: list[int], limit: int, most: int, chunk: int) -> None:
        """All pages make up the list; none exceeds the limit of rows, or that of bytes by more than a row."""
        rows = [{"id": at, "text": "x" * size} for at, size in enumerate(sizes, 1)]
        self.patch(pages, "PAGE_BYTES", most)
        self.patch(pages, "_CHUNK_ROWS", chunk)

        def read(limit: int, before: str | None) -> list[Any]:
            self.assertLessEqual(limit, chunk)
            return rows[int(before or 0) :][:limit]

        found: list[Any] = []
        cursor = None
        while True:
            one: Page[Any] = page(read, lambda row: str(row["id"]), limit, cursor)
            self.assertLessEqual(len(one.items), limit)
            self.assertLess(sum(len(encode(row)) for row in one.items[:-1]), most)
            found += one.items
            if one.next_cursor is None:
                break
            self.assertTrue(one.items)
            cursor = one.next_cursor
        self.assertEqual(found, rows)

    def test_long_rows_are_read_a_few_at_once(self) -> None:
        """Long rows are read a few at a time, little beyond the page; short rows take few statements."""
        for size, most, statements in ((100_000, 30, 6), (10, 501, 12)):
            asked: list[int] = []

            def read(limit: int, before: str | None, size: int = size, asked: list[int] = asked) -> list[Any]:
                asked.append(limit)
                return [{"id": int(before or 0) + at, "text": "x" * size} for at in range(1, limit + 1)]

            one = page(read, lambda row: str(row["id"]), 500, None)
            self.assertLessEqual(sum(asked), most)
            self.assertLessEqual(len(asked), statements)
            self.assertEqual(len(one.items), min(500, -(-pages.PAGE_BYTES // size)))

    def test_json_is_made_in_the_steps(self) -> None:
        """The JSON of each row is encoded once, in a step; the reply only joins the parts."""
        rows = [{"id": at, "text": "x"} for at in range(30, 0, -1)]
        encoded: list[Any] = []

        class _Listed:
            key = "id"

            def floor(self, txn: Any, before: int | None) -> int | None:
                return max(1, (before or 31) - 10)

            def read(self, txn: Any, limit: int, before: str | None, floor: int) -> list[Any]:
                return [_Row(**row) for row in rows if floor <= row["id"] < int(before or 31)][:limit]

        @dataclass
        class _Row:
            id: int
            text: str

        def note(value: Any) -> bytes:
            encoded.append(value)
            return encode(value)

        self.patch(pages, "encode", note)
        self.patch(pages, "time_limit", nullcontext)
        listed: Any = _Listed()
        steps = pages.in_stretches(listed)(OperationRequest("me", "observer", query={"limit": 25}))
        came: Any = None
        while not isinstance(step := advance(steps, came, None), OperationReply):
            assert callable(step)
            before = len(encoded)
            came = step(_TXN)
            self.assertEqual(len(encoded) - before, len(came.items))
        self.assertEqual((len(step.value.items), len(encoded)), (25, 26))
        self.assertEqual(step.body, encode(step.value))

    @given(st.lists(st.text(max_size=3), unique=True), st.integers(1, 5))
    def test_short_lists(self, names: list[str], limit: int) -> None:
        """A list that is read as a whole is paged by its keys, whatever characters they contain."""
        found: list[str] = []
        cursor = None
        while True:
            one = page(partial(after_key, names, str), str, limit, cursor)
            found += one.items
            cursor = one.next_cursor
            if cursor is None:
                break
        self.assertEqual(found, sorted(names))


class JsonTests(SynchronousTestCase):
    """Rows as JSON."""

    def test_round_trip(self) -> None:
        """A row stays equal when it is encoded and decoded."""
        at = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
        row = CommandRow(5, "a.b", "k", {"n": [1.5, None, "\u00e9"]}, 100, at, "ready", 0, 0, None, at, None)
        self.assertEqual(decode(json.loads(encode(row)), commands.SHOW), row)
        later = {**json.loads(encode(row)), "of_a_later_release": 1}
        self.assertEqual(decode(later, commands.SHOW), row)
        self.assertRaises(ValueError, decode, {"cmd_id": 5}, commands.SHOW)

    def test_what_cannot_be_read(self) -> None:
        """JSON that Python cannot read is encoded as a placeholder; an object of an unknown type is an error."""
        self.assertEqual(encode({"a": Unreadable()}), b'{"a":{"unreadable":"(JSON that cannot be read)"}}')
        said = b'{"a":{"unreadable":"(JSON that cannot be read: it is nested deeper than 32 levels)"}}'
        self.assertEqual(encode({"a": read_json("[" * 4000 + "]" * 4000)}), said)
        self.assertRaises(NotImplementedError, encode, object())


class DeclarationTests(SynchronousTestCase):
    """The declarations of operations."""

    def test_all_are_listed(self) -> None:
        """Every operation of a module of s2s.admin.operations is in OPERATIONS, with a unique name."""
        made = set()
        for path in Path(operations.__file__).parent.glob("*.py"):
            module = importlib.import_module(f"s2s.admin.operations.{path.stem}")
            for value in vars(module).values():
                if isinstance(value, Operation):
                    made.add(value.name)
                elif isinstance(value, dict) and value and all(isinstance(each, Operation) for each in value.values()):
                    made.update(each.name for each in value.values())
        listed = [operation.name for operation in OPERATIONS]
        self.assertEqual(len(listed), len(set(listed)))
        self.assertEqual(made - set(listed), set())

    def test_orders(self) -> None:
        """Each order of the catalogue has an operation, with the order's schema except for its id."""
        given_ = {operation.path: operation for operation in OPERATIONS if operation.takes_key}
        self.assertEqual(set(given_), {f"/v1/orders/{rpc}" for rpc in ORDERS})
        for operation in given_.values():
            self.assertNotIn("order_id", operation.body["properties"])
            self.assertFalse(operation.body["additionalProperties"])

    def test_observers(self) -> None:
        """Observers may use every GET and the health check of an engine, and no other operation."""
        for operation in OPERATIONS:
            self.assertIn(operation.access, ACCESS)
            reads = operation.method == "GET" or operation.name == "health_engine"
            self.assertEqual(not operation.is_write, reads, operation)
