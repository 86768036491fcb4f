"""The states of an engine (docs/protocol.rst, "States of an engine")."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import NotReady, ShuttingDown
from s2s.roles.engine.state import EngineState, guard


class ConditionTests(SynchronousTestCase):
    """:class:`EngineState`."""

    def test_states(self) -> None:
        """Each state follows from the wanted state, the jobs in progress, and whether the shutdown has begun."""
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
        """A job that raises an error is no longer in progress."""
        condition = EngineState()
        condition.wanted = "paused"
        with self.assertRaises(ZeroDivisionError), condition.job():
            raise ZeroDivisionError
        self.assertEqual(condition.state, "paused")

    def test_guards(self) -> None:
        """A starting engine refuses everything for now; a draining engine refuses new work."""
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
