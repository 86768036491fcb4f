"""Garbage collection of reference cycles that hold much memory in few objects: :mod:`s2s.runtime.memory`."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from s2s.handlers.commands import BUILTIN, Command, CommandHandler
from s2s.roles.server.executor import Executor
from s2s.runtime import memory
from s2s.runtime.memory import GROWTH, Memory
from s2s.store.driver import Cursor
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class _Large:
    """A reference cycle that holds some megabytes."""

    def __init__(self, size: int) -> None:
        self.body = bytearray(b"x" * size)
        self.itself = self


class MemoryTests(SynchronousTestCase):
    """:class:`Memory`."""

    def setUp(self) -> None:
        """Disable Python's automatic garbage collection."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)

    def test_growth(self) -> None:
        """Cycles of any generation are collected when the process has grown by ``GROWTH``, and not before."""
        for generation in (0, 2):
            with self.subTest(generation=generation):
                watched = Memory()
                small = weakref.ref(_Large(1 << 20))
                watched.check()
                self.assertIsNotNone(small())
                large = _Large(2 * GROWTH)
                gone = weakref.ref(large)
                if generation:
                    gc.collect()
                del large
                watched.check()
                self.assertIsNone(gone())
                gc.collect()

    def test_what_is_in_use(self) -> None:
        """Growth by memory that is in use causes one collection, and not one at each check."""
        watched, kept = Memory(), bytearray(b"x" * (2 * GROWTH))
        watched.check()
        looks: list[Any] = []
        self.patch(gc, "collect", looks.append)
        watched.check()
        self.assertEqual((looks, len(kept)), ([], 2 * GROWTH))

    def test_without_proc(self) -> None:
        """Without ``/proc`` the check does nothing."""
        self.patch(memory, "_STATM", memory._STATM.with_name("nowhere"))
        Memory().check()


class _Keeps(CommandHandler):
    cmd_type = "test.keeps"
    schema = {"type": "object"}
    alive: list[Any] = []

    def run(self, txn: Cursor, command: Command) -> None:
        body = _Large(8 << 20)
        self.alive.append(weakref.ref(body))
        raise ValueError("it cannot be done")


class HandlerTests(DatabaseTestCase):
    """Handlers that leave large cycles."""

    async def test_they_are_collected(self) -> None:
        """Of 64 failed commands that leave 8 MiB each, fewer than 32 are in memory at the end."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload)"
            " select 'test.keeps', i, '{}' from generate_series(1, 64) i"
        )
        gc.disable()
        self.addCleanup(gc.enable)
        database, handlers = self.pools("s2s-run")
        kind = _Keeps()
        running = Executor(
            database, handlers, {kind.cmd_type: kind, **{each.cmd_type: each for each in BUILTIN}}, "boot-1"
        )
        running.start()
        self.addCleanup(running.stop)
        await poll(lambda: len(kind.alive) >= 64, "the commands")
        self.assertLess(sum(each() is not None for each in kind.alive), 32)
