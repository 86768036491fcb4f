"""Collecting the cycles of foreign code by the memory that they hold, where Python counts objects alone.

A role lets Python look for cycles after 20,000 new objects (:func:`s2s.roles.base.tune_gc`). An exception
that a handler keeps makes a cycle of its frame, which may hold megabytes in a few objects.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Final

#: Bytes by which the memory of the process may grow until cycles are looked for.
GROWTH: Final = 64 << 20
_STATM: Final = Path("/proc/self/statm")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """The memory of the process at the last look. In any thread."""

    def __init__(self) -> None:
        self._least = _resident()

    def check(self) -> None:
        """Collect cycles if the process has grown by :data:`GROWTH`. Takes about 10 us otherwise."""
        now = _resident()
        self._least = min(self._least, now)
        if now < self._least + GROWTH:
            return
        # The younger objects first: the others are many.
        for generation in (1, 2):
            gc.collect(generation)
            if _resident() < self._least + GROWTH:
                break
        self._least = _resident()


def _resident() -> int:
    """Return the resident memory in bytes; 0 where the operating system does not say."""
    try:
        return int(_STATM.read_text("ascii").split()[1]) * _PAGE
    except OSError:
        return 0
