"""Hooks and settings of the interpreter that foreign code may change for every thread of the process.

A hook that fails ends each new thread before its work. Debuggers and libraries that report errors set such hooks when
they are imported: these stay.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

#: The cure for threads that a hook ends.
CURE: Final = (
    "a plug-in has set a hook of all threads that fails, as by threading.settrace, threading.setprofile or"
    " threading.excepthook: mend or uninstall the plug-in, and start this process again"
)


def _for_all(name: str) -> Callable[[Any], object]:
    """Return a function that sets a hook of new threads and, from Python 3.12 on, of all threads."""
    write: Callable[[Any], object] = getattr(threading, f"{name}_all_threads", None) or getattr(threading, name)
    return write


def _attribute(module: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return partial(getattr, module, name), partial(setattr, module, name)


#: The function that reads each hook or setting, and the one that sets it.
_SHARED: Final[tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...]] = (
    (threading.gettrace, _for_all("settrace")),
    (threading.getprofile, _for_all("setprofile")),
    _attribute(threading, "excepthook"),
    _attribute(sys, "excepthook"),
    _attribute(sys, "unraisablehook"),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.getswitchinterval, sys.setswitchinterval),
)


class SharedHooks:
    """The hooks and settings of the process at the time of this object's creation."""

    def __init__(self) -> None:
        self._values = [read() for read, _ in _SHARED]

    def restore(self) -> None:
        """Set each one that has changed to its value at the time of the creation."""
        for (read, write), value in zip(_SHARED, self._values, strict=True):
            if read() != value:
                write(value)
