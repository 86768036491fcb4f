"""Bounds and their counters."""

from __future__ import annotations

import ast
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import s2s
from s2s.protocol.limits import MET, Counters


class CountersTests(SynchronousTestCase):
    """:class:`Counters`."""

    def test_met(self) -> None:
        """A bound that is reached is counted by its name, and an unknown name is a programming error."""
        counters = Counters()
        for _ in range(3):
            counters.meet("line")
        self.assertEqual(counters.met, {"line": 3})
        self.assertRaises(AssertionError, counters.meet, "no such bound")

    def test_every_bound_is_met_somewhere(self) -> None:
        """Each name in the list is used where its bound is enforced, and no other name is used."""
        said: set[str] = set()
        for path in Path(s2s.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "meet":
                    said |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        # The session returns which of its two timeouts has expired, and the link counts it.
        self.assertEqual(said | {"proof", "frame"}, set(MET))
