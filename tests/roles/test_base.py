"""What both roles do to their process (:mod:`s2s.roles.base`)."""

from __future__ import annotations

import gc
import weakref

from twisted.trial.unittest import SynchronousTestCase

from s2s.roles.base import tune_gc


class CollectorTests(SynchronousTestCase):
    """Python's collector of cycles."""

    def test_it_is_spared(self) -> None:
        """What is there is not looked at again, and what is made later seldom; cycles that are left are found still."""

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
