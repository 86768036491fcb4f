"""Errors as problem details: :mod:`s2s.admin.http.problems`."""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.http.problems import CONTENT_TYPE, STATUS, Problem, problem
from s2s.admin.operations.operation import encode
from s2s.errors import (
    BY_CODE,
    BadJson,
    BadPayload,
    DatabaseUnavailable,
    IdemConflict,
    InternalError,
    LinkLost,
    NotFound,
    Overloaded,
    Refused,
    StatementRefused,
)


class ProblemTests(SynchronousTestCase):
    """Each exception becomes one response."""

    def test_codes(self) -> None:
        """Each error code of the link has a problem with its HTTP status, the error's text and its ``retryable``."""
        self.assertEqual(set(STATUS), set(BY_CODE))
        for code, kind in BY_CODE.items():
            error = BadJson("syntax", "no") if kind is BadJson else kind("no")
            said = problem(error)
            self.assertEqual(said.status, STATUS[code])
            self.assertEqual((said.body["code"], said.body["type"]), (code, f"urn:s2s:error:{code}"))
            self.assertEqual((said.body["status"], said.body["detail"]), (said.status, "no"))
            self.assertEqual(said.body["retryable"], kind.retryable)
            json.loads(encode(said.body))
        self.assertEqual(CONTENT_TYPE, "application/problem+json")

    def test_details(self) -> None:
        """Details are members of the problem and never replace a standard member; a pause is also a header."""
        said = problem(
            BadPayload("no", path="/body/x", status=1, type="x", title="x", code="x", detail="x", instance="x")
        )
        self.assertEqual((said.body["path"], said.body["status"], said.body["code"]), ("/body/x", 422, "bad_payload"))
        self.assertNotIn("instance", said.body)
        self.assertEqual(problem(Overloaded("no", retry_after_ms=1500)).headers["Retry-After"], "2")
        self.assertEqual(problem(IdemConflict("no", order_id="o1")).body["order_id"], "o1")
        already = Problem(NotFound("no"), 410)
        self.assertIs(problem(already), already)

    def test_of_an_engine(self) -> None:
        """An error of an engine keeps its code and details; one that an engine should not send becomes a 502."""
        said = problem(Refused("paused", "x", {"retryable": False, "engine": "e1", "retry_after_ms": 10, "message": 5}))
        self.assertEqual((said.status, said.body["code"], said.body["engine"]), (409, "paused", "e1"))
        self.assertEqual((said.body["retryable"], said.headers["Retry-After"]), (False, "1"))
        for code, status in (
            ("not_ready", 409), ("shutting_down", 409), ("overloaded", 503), ("db_unavailable", 503),
            ("deadline_exceeded", 504), ("internal_error", 502), ("bad_payload", 502), ("unsupported_type", 502),
            ("unsupported_version", 502), ("bad_envelope", 502), ("unknown_command", 502), ("not_found", 502),
        ):  # fmt: skip
            said = problem(Refused(code, "no", {}))
            self.assertEqual((said.status, said.body["code"]), (status, code))
        for code in ("bad_json", "of_another_release", "x\n"):
            said = problem(Refused(code, "no\x1b[2J", {}))
            self.assertEqual((said.status, said.body["code"]), (502, "internal_error"))
            self.assertTrue(said.body["detail"].isprintable())

    def test_the_database(self) -> None:
        """An unavailable database is a 503 to retry; a lost link is a 504 with an unknown outcome."""
        said = problem(DatabaseUnavailable("the password is hunter2"))
        self.assertEqual((said.status, said.body["code"], said.headers["Retry-After"]), (503, "db_unavailable", "1"))
        self.assertNotIn("hunter2", str(said.body))
        said = problem(LinkLost("the link was lost"))
        self.assertEqual((said.status, said.body["code"], said.body["retryable"]), (504, "deadline_exceeded", True))

    def test_surprises(self) -> None:
        """An unexpected error reveals only the incident number, under which it is logged."""
        for error in (ValueError("hunter2"), StatementRefused("hunter2"), KeyError("hunter2")):
            said = problem(error)
            self.assertEqual(
                (said.status, said.body["code"], said.body["detail"]), (500, "internal_error", InternalError.text)
            )
            self.assertNotIn("hunter2", str(said.body))
            self.assertRegex(said.body["incident"], "^[0-9a-f]{16}$")
        self.assertEqual(len(self.flushLoggedErrors()), 2)  # the refused statement is logged without a traceback
