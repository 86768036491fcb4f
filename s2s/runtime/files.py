"""Read the files that an operator names as a whole. A pipe without a writer fails after a bounded wait.

Also detect that a process has used up its file descriptors.
"""

from __future__ import annotations

import codecs
import errno
import os
import resource
import select
from pathlib import Path
from typing import Final

from s2s.errors import OperatorError

#: The most bytes of such a file: a secret or a URL has hundreds. The limit ends the read of a file such as /dev/zero.
MOST_BYTES: Final = 65_536
#: The advice for a lack of file descriptors.
RAISE_LIMIT: Final = "raise the limit, LimitNOFILE= of systemd or ulimit -n"
#: Seconds for which a pipe may be silent. A command that fetches a secret from a vault takes a few seconds.
SILENT_S: Final = 10.0


def read(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a file.

    :raises OSError: the file cannot be read, is too long, or is a pipe without input.
    """
    content = b""
    with open(path, "rb", buffering=0, opener=_at_once) as file:
        patience_ms = None if file.isatty() else SILENT_S * 1000
        poll = select.poll()  # unlike select(), it has no limit on descriptors
        poll.register(file, select.POLLIN)
        while len(content) <= most_bytes:
            if not poll.poll(patience_ms):
                raise TimeoutError(errno.ETIMEDOUT, f"nothing came through it within {SILENT_S:g} s")
            part = file.read(most_bytes + 1 - len(content))
            if part == b"":
                return content
            content += part or b""
    raise OSError(errno.EFBIG, "it is too long")


def read_text(path: Path, name: str, cure: str = "") -> str:
    """Return the text of a small file, without the white space around it.

    The text is UTF-8, or UTF-16 with its byte order mark, since editors on Windows write either.

    :param name: the name of the file in the error.
    :param cure: the end of the error.
    :raises OperatorError: the file cannot be read, or contains no such text; the error quotes nothing of it.
    """
    try:
        content = read(path)
        is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig").strip()
        if "\0" not in text:
            return text
        why = "it is binary, and no text"
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError:  # bytes that are no text, or a path with a NUL
        why = "it is not UTF-8 text"
    raise OperatorError(f"{name} cannot be read: {path}: {why}{cure}")


def read_line(path: Path, name: str, cure: str = "") -> str:
    """Return the text of a small file that has one line; see :func:`read_text`."""
    text = read_text(path, name, cure)
    if len(text.splitlines()) > 1:
        raise OperatorError(f"{name} cannot be used: {path}: it has more than one line{cure}")
    return text


def is_here() -> bool:
    """Whether the working directory exists."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def describe(error: OSError) -> str:
    """Return the operating system's message, with the file name if there is one."""
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def exhausted() -> str:
    """Return the message about a process without a free file descriptor; empty: there is one."""
    try:
        os.close(os.open(os.sep, os.O_RDONLY))
    except OSError as error:
        return no_descriptor() if error.errno == errno.EMFILE else ""
    return ""


def no_descriptor() -> str:
    """Return the message about a process that has run out of file descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"no file descriptor is left (limit {limit}): {RAISE_LIMIT}"
