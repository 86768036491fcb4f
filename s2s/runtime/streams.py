"""The standard streams of a process, which may be closed, full, broken, or not UTF-8."""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import suppress
from typing import Any, AnyStr, Final

from twisted.logger import LoggingFile

_NAMES: Final = ("stdin", "stdout", "stderr")
#: Seconds that a line waits for room in its pipe, socket or terminal: a working reader makes room within milliseconds,
#: and the reactor is blocked meanwhile.
ROOM_S: Final = 0.1
#: Seconds that a wait at the start lasts before it is reported.
LATE_S: Final = 5.0
#: The terminal of a daemon that has not started yet: twistd replaces descriptor 2 by /dev/null before the start.
_terminal: Final[list[int]] = []
#: The most characters of a logged line: output without line breaks would otherwise accumulate in memory.
LONGEST_LINE: Final = 16_384


class _LineLog(LoggingFile):
    """A stream whose text is logged as lines, none longer than :data:`LONGEST_LINE`."""

    #: The number of characters of the unfinished line.
    _open = 0

    def write(self, message: AnyStr) -> None:
        """Log each finished line."""
        text = message if isinstance(message, str) else message.decode(self.encoding, "backslashreplace")
        for number, line in enumerate(text.split("\n")):
            if number:
                self._end_line()
            for start in range(0, len(line), LONGEST_LINE):
                piece = line[start : start + LONGEST_LINE]
                if self._open + len(piece) > LONGEST_LINE:
                    self._end_line()
                super().write(piece)
                self._open += len(piece)

    def _end_line(self) -> None:
        super().write("\n")
        self._open = 0


def bound_lines() -> None:
    """Limit the length of the log lines that Twisted makes of printed text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is LoggingFile:
            setattr(sys, name, _LineLog(stream.log, stream.level, stream.encoding))


def prepare() -> list[str]:
    """Make the streams safe: no text fails because of its characters, and no file takes a closed stream's place.

    :returns: the names of the streams that were closed.
    """
    closed = [name for name in _NAMES if getattr(sys, name) is None]
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    return closed


def not_utf8() -> str:
    """Return the first argument or variable that is not UTF-8, as ASCII with escapes; empty: all are UTF-8.

    Only our variables and those of libpq are checked.
    """
    ours = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("S2S_", "PG"))]
    for text in [*sys.argv[1:], *ours]:
        try:
            # Check the bytes themselves: in an ASCII locale Python has not decoded them.
            os.fsencode(text).decode()
        except UnicodeDecodeError:
            # Return only the name, because a variable may hold a password.
            return text.partition("=")[0].encode("ascii", "backslashreplace").decode()
    return ""


def has_room(descriptor: int, wait_s: float) -> bool:
    """Return whether up to ``select.PIPE_BUF`` bytes can be written without waiting for a reader.

    ``O_NONBLOCK`` is no alternative: it would also apply to every other process with the same pipe or terminal.

    :param wait_s: seconds to wait for room.
    """
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    return bool(room.poll(wait_s * 1000))


def offer(text: str) -> None:
    """Write a line to stdout, unless the reader of its pipe stands still: a start does not wait for it.

    :raises OSError: it cannot be written.
    """
    if has_room(sys.stdout.fileno(), ROOM_S):
        print(text, flush=True)


def keep_terminal() -> None:
    """Let :func:`say` reach the present stderr also after the process has become a daemon."""
    with suppress(OSError):  # stderr is closed
        _terminal.append(os.dup(2))


def leave_terminal() -> bool:
    """Close the stderr that :func:`keep_terminal` has kept: a pipe would stay open as long as the daemon runs.

    :returns: whether there was one.
    """
    was_kept = bool(_terminal)
    while _terminal:
        os.close(_terminal.pop())
    return was_kept


def say(line: str) -> None:
    """Write a line to the original stderr, even if Twisted has replaced ``sys.stderr``.

    If there is no stderr, or it has no reader, the line is lost.
    """
    with suppress(OSError, ValueError):
        if _terminal:
            if has_room(_terminal[0], ROOM_S):
                os.write(_terminal[0], f"{line}\n".encode("utf-8", "backslashreplace"))
        elif sys.__stderr__ is not None and has_room(sys.__stderr__.fileno(), ROOM_S):
            print(line, file=sys.__stderr__, flush=True)


class LateLine:
    """A line about a wait, printed once to stderr when the wait has lasted :data:`LATE_S`."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._due = time.monotonic() + LATE_S

    def look(self) -> None:
        """Print the line if it is due; call this repeatedly while the wait lasts."""
        if time.monotonic() >= self._due:
            self._due = float("inf")
            say(self._line)


def abandon(stream: Any) -> bool:
    """Flush a stream; if that fails, drop its content: Python would fail again as it exits, with exit code 120.

    :returns: whether everything was written.
    """
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return False
    return True
