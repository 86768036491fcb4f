"""The effects of both roles on their process (:mod:`s2s.roles.base`)."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from s2s.roles.base import Role, tune_gc
from s2s.roles.shutdown import Shutdown


class StopTests(SynchronousTestCase):
    """The stop of a role."""

    def test_each_step_has_a_name(self) -> None:
        """While a stop waits for a part of the role, its lifetime names that part."""
        parts: dict[str, Deferred[None]] = {name: Deferred() for name in ("listener", "watch", "handlers", "database")}
        shutdown = Shutdown(mock.Mock())
        role: Any = mock.Mock(_shutdown=shutdown, _summaries=[], _drain=lambda: succeed(None))
        role._listener.stop, role._handlers.stop = (lambda: parts["listener"]), (lambda: parts["handlers"])
        role._database.stop = lambda: parts["database"]
        role._watches = [mock.Mock(stop=lambda: parts["watch"])]
        stopping = Deferred.fromCoroutine(Role._stop(role))
        steps = []
        for waited in parts.values():
            steps.append(shutdown.step)
            waited.callback(None)
        self.successResultOf(stopping)
        self.assertEqual(
            steps,
            [
                "the connection of notifications",
                "looks at the database",
                "handlers, jobs and orders, and their connections",
                "our own statements, and their connections",
            ],
        )


class CollectorTests(SynchronousTestCase):
    """The garbage collector of Python."""

    def test_it_is_spared(self) -> None:
        """Existing objects are not scanned again, and new ones seldom; unreachable cycles are still found."""

        class Node:
            pass

        self.addCleanup(gc.set_threshold, *gc.get_threshold())
        self.addCleanup(gc.unfreeze)
        tune_gc()
        self.assertGreater(gc.get_freeze_count(), 10_000)
        self.assertLess(len(gc.get_objects()), gc.get_freeze_count())
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        left = weakref.ref(node)
        del node
        made = [[] for _ in range(gc.get_threshold()[0] - 1000)]  # type: ignore[var-annotated]
        self.assertIsNotNone(left(), "a window full of objects is no reason to look")
        made += [[] for _ in range(2000)]
        self.assertIsNone(left())
