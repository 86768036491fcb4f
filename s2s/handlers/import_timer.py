"""A time limit for loading a plug-in, which is foreign code that runs before a role listens."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Final, cast

from s2s.errors import OperatorError
from s2s.runtime import streams

#: Seconds after which a line reports that loading takes long, and after which loading is interrupted.
TELL_S: Final = 5.0
IMPORT_S: Final = 60.0
#: Seconds after which the process is ended if loading cannot be interrupted, since it runs in C.
EXIT_S: Final = 90.0


class TooLong(BaseException):
    """Interrupts foreign code. Only :func:`bounded` handles it."""


@contextmanager
def bounded(name: str) -> Iterator[None]:
    """Interrupt the code inside when it takes too long.

    Only the main thread receives signals, and it has one timer: in other threads, and if the timer is in use as inside
    another import, this function does nothing.

    :param name: the name of the plug-in, for messages.
    :raises OperatorError: the code took :data:`IMPORT_S`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0):
        yield
        return
    ticks = 0

    def tick(_: int, __: FrameType | None) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 1:
            streams.say(f"plug-in {name} has been loading for {TELL_S:g} s, and is left out after {IMPORT_S:g} s")
        # Raised again at each further tick, since code that catches every exception may go on.
        if ticks * TELL_S >= IMPORT_S:
            raise TooLong

    before = signal.signal(signal.SIGALRM, tick)
    try:
        signal.setitimer(signal.ITIMER_REAL, TELL_S, TELL_S)
        _exit_later()
        yield
    except TooLong:
        raise OperatorError(
            f"its import, or a property of its plug-ins, did not return within {IMPORT_S:g} s: mend it, or"
            " uninstall its package"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _exit_later() -> None:
    # The call raises RuntimeError without stderr, and ValueError if stderr is no file.
    with suppress(OSError, ValueError, RuntimeError, AttributeError):
        faulthandler.dump_traceback_later(EXIT_S, exit=True, file=cast("IO[str]", sys.__stderr__))
