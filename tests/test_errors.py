"""The tree of errors: the codes with the rules of the protocol, and errors received from a peer."""

from __future__ import annotations

import re
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from s2s import errors
from s2s.errors import BY_CODE, BadJson, InternalError, Refused, S2SError, TooBigToSend, Unsigned, WireError
from s2s.protocol import canonical
from s2s.protocol.catalogue import ERROR_SCHEMA

#: Section "Errors" of the protocol: code, retryable, closes the link, signed.
_TABLE = {
    "bad_json": (False, True, False),
    "toolarge": (False, True, False),
    "auth_required": (False, True, False),
    "auth_bad": (False, True, False),
    "forbidden": (False, True, True),
    "replay": (False, True, True),
    "ts_skew": (True, False, True),
    **dict.fromkeys(
        ("bad_envelope", "bad_payload", "unsupported_version", "unsupported_type", "unknown_command"),
        (False, False, True),
    ),
    **dict.fromkeys(("idem_conflict", "stale_version", "not_found"), (False, False, True)),
    **dict.fromkeys(("not_ready", "paused", "shutting_down", "overloaded", "db_unavailable"), (True, False, True)),
    **dict.fromkeys(("deadline_exceeded", "internal_error"), (True, False, True)),
}


def _make(cls: type[WireError], **details: Any) -> WireError:
    return BadJson("float", "a text") if cls is BadJson else cls("a text", **details)


class WireErrorTests(SynchronousTestCase):
    """Errors that are sent to a peer."""

    def test_the_table(self) -> None:
        """Every code of the protocol has one class, with the table's ``retryable``, ``closes`` and ``signed``."""
        made = {code: _make(cls) for code, cls in BY_CODE.items()}
        self.assertEqual({code: (e.retryable, e.closes, e.signed) for code, e in made.items()}, _TABLE)
        for code, cls in BY_CODE.items():
            self.assertEqual(cls.code, code)

    def test_payloads(self) -> None:
        """The payload of every error satisfies its schema, is canonical JSON, and contains ``retryable``."""
        for cls in BY_CODE.values():
            payload = _make(cls).payload()
            ERROR_SCHEMA.check(payload)
            canonical.dumps(payload)
            self.assertIs(payload["details"]["retryable"], cls.retryable)
            self.assertEqual(payload["message"], "a text")

    def test_details(self) -> None:
        """Details of an error are sent beside ``retryable``."""
        error = errors.Overloaded("full", limit=7, retry_after_ms=20)
        self.assertEqual(error.payload()["details"], {"retryable": True, "limit": 7, "retry_after_ms": 20})

    def test_fixed_texts(self) -> None:
        """An error that is sent before the MAC is verified has a default message."""
        for cls in Unsigned.__subclasses__():
            if cls is not BadJson:
                self.assertTrue(cls().message)
        self.assertTrue(InternalError(incident="x").message)

    def test_one_instance_can_close(self) -> None:
        """Setting ``closes`` of one error does not affect the next one."""
        third = errors.TsSkew()
        third.closes = True
        self.assertFalse(errors.TsSkew().closes)


class RefusedTests(SynchronousTestCase):
    """Errors that are received from a peer."""

    def test_retryable(self) -> None:
        """The peer's ``retryable`` decides, else the rule of the code; an unknown code is not retryable."""
        for code, details, expected in (
            ("overloaded", {}, True),
            ("overloaded", {"retryable": False}, False),
            ("bad_payload", {}, False),
            ("bad_payload", {"retryable": True}, True),
            ("new_code", {}, False),
            ("new_code", {"retryable": True}, True),
            ("paused", {"retryable": "no"}, True),
        ):
            self.assertIs(Refused(code, "", details).retryable, expected)

    def test_retry_after(self) -> None:
        """Only a non-negative integer is accepted as a pause."""
        pauses = [
            Refused("paused", "", {"retry_after_ms": said}).retry_after_ms for said in (0, 250, -1, True, "5", 1.5)
        ]
        self.assertEqual(pauses, [0, 250, None, None, None, None])
        self.assertIsNone(Refused("paused", "", {}).retry_after_ms)

    def test_text(self) -> None:
        """The text has the code and the peer's message, escaped and shortened."""
        self.assertEqual(str(Refused("paused", "come back", {})), "paused: come back")
        self.assertEqual(str(Refused("paused", "\x1b[2J\n", {})), r"paused: '\x1b[2J\n'")
        self.assertLess(len(str(Refused("paused", "x" * 5000, {}))), 250)


class TreeTests(SynchronousTestCase):
    """The tree as a whole."""

    def test_one_root(self) -> None:
        """Every error of the module is an S2SError."""
        for thing in vars(errors).values():
            if isinstance(thing, type) and issubclass(thing, Exception):
                self.assertTrue(issubclass(thing, S2SError), thing)

    def test_the_docstring_is_complete(self) -> None:
        """The tree printed in the module's docstring names every class."""
        words = set(re.findall(r"\w+", errors.__doc__ or ""))
        names = {
            name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, Exception)
        }
        self.assertEqual(names - words, set())

    def test_too_big(self) -> None:
        """The error of a frame that is too big has its size, the limit and the cure."""
        error = TooBigToSend(70000, 65536)
        self.assertEqual((error.size, error.limit), (70000, 65536))
        self.assertIn("--frame-size-limit", str(error))
