"""The states of an engine (docs/protocol.rst, "States of an engine")."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import NotReady, ShuttingDown
from s2s.roles.engine.state import EngineState, guard


class ConditionTests(SynchronousTestCase):
    """:class:`EngineState`."""

    def test_states(self) -> None:
        """Each state follows from what is wanted, what is in hand, and whether the end has begun."""
        condition = EngineState()
        self.assertEqual(condition.state, "starting")
        condition.wanted = "running"
        self.assertEqual(condition.state, "running")
        with condition.job(), condition.job():
            self.assertEqual(condition.state, "running")
            condition.wanted = "paused"
            self.assertEqual(condition.state, "pausing")
        self.assertEqual(condition.state, "paused")
        condition.is_draining = True
        self.assertEqual(condition.state, "draining")

    def test_a_job_that_fails(self) -> None:
        """A job that raises is out of hand too."""
        condition = EngineState()
        condition.wanted = "paused"
        with self.assertRaises(ZeroDivisionError), condition.job():
            raise ZeroDivisionError
        self.assertEqual(condition.state, "paused")

    def test_guards(self) -> None:
        """While starting everything is refused for now; while draining what would be new work."""
        condition = EngineState()
        taking = guard(condition.check_taking, lambda request: {"took": request})
        started = guard(condition.check_started, lambda request: {"took": request})
        for responder in (taking, started):
            self.assertRaises(NotReady, responder, "x")
        condition.wanted = "paused"
        for responder in (taking, started):
            self.assertEqual(responder("x"), {"took": "x"})  # type: ignore[arg-type]
        condition.is_draining = True
        self.assertRaises(ShuttingDown, taking, "x")
        self.assertEqual(started("x"), {"took": "x"})  # type: ignore[arg-type]
