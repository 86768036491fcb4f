"""Files that an operator names are read whole. A pipe without a writer ends with an error after a bounded wait.

A process may also have all the files and sockets open that its limit allows.
"""

from __future__ import annotations

import errno
import os
import resource
import select
from pathlib import Path
from typing import Final

#: Bytes that such a file may have: a secret or a URL has hundreds. The bound ends the read of one such as /dev/zero.
MOST_BYTES: Final = 65_536
#: The cure of too few file descriptors.
RAISE_LIMIT: Final = "raise the limit, LimitNOFILE= of systemd or ulimit -n"
#: Seconds of silence that a pipe may have. A command that fetches a secret from a vault takes a few seconds.
SILENT_S: Final = 10.0


def read(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Read a file.

    :raises OSError: it cannot be read, is too long, or is a pipe through which nothing comes.
    """
    content = b""
    with open(path, "rb", buffering=0, opener=_at_once) as file:
        patience_ms = None if file.isatty() else SILENT_S * 1000
        poll = select.poll()  # it has no bound of descriptors
        poll.register(file, select.POLLIN)
        while len(content) <= most_bytes:
            if not poll.poll(patience_ms):
                raise TimeoutError(errno.ETIMEDOUT, f"nothing came through it within {SILENT_S:g} s")
            part = file.read(most_bytes + 1 - len(content))
            if part == b"":
                return content
            content += part or b""
    raise OSError(errno.EFBIG, "it is too long")


def is_here() -> bool:
    """Whether the working directory exists."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def describe(error: OSError) -> str:
    """Return what the operating system says, with the file where there is one."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _at_once(path: str, flags: int) -> int:
    """Open a file, without a wait for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def exhausted() -> str:
    """Return the line about a process without a file descriptor left; empty: one is left."""
    try:
        os.close(os.open(os.sep, os.O_RDONLY))
    except OSError as error:
        return no_descriptor() if error.errno == errno.EMFILE else ""
    return ""


def no_descriptor() -> str:
    """Return the line about a process that has found no file descriptor left."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"no file descriptor is left (limit {limit}): {RAISE_LIMIT}"
