"""Collect reference cycles of foreign code by the memory that they hold, because Python only counts objects.

A role makes Python look for cycles after 20,000 new objects (:func:`s2s.roles.base.tune_gc`). A stored exception of a
handler forms a cycle with its frame, which may hold megabytes in a few objects.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Final

#: Bytes of growth of the process's memory after which cycles are collected.
GROWTH: Final = 64 << 20
_STATM: Final = Path("/proc/self/statm")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """The memory of the process at the last check. Usable in any thread."""

    def __init__(self) -> None:
        self._least = _resident()

    def check(self) -> None:
        """Collect cycles if the process has grown by :data:`GROWTH`. Takes about 10 us otherwise."""
        now = _resident()
        self._least = min(self._least, now)
        if now < self._least + GROWTH:
            return
        # Collect the younger objects first, because there are many older ones.
        for generation in (1, 2):
            gc.collect(generation)
            if _resident() < self._least + GROWTH:
                break
        self._least = _resident()


def _resident() -> int:
    """Return the resident memory in bytes; 0 if the operating system does not report it."""
    try:
        return int(_STATM.read_text("ascii").split()[1]) * _PAGE
    except OSError:
        return 0
