"""The log files that twistd writes: limit their size, reopen moved files, and report lost events.

twistd opens its log by itself, for a plugin and for a tac file, and keeps every rotated file. This module limits its
:class:`~twisted.python.logfile.LogFile` once the role runs. ``--logger`` and ``--syslog`` keep their meaning.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO, cast

from twisted.logger import FileLogObserver, Logger, globalLogPublisher
from twisted.python import threadable
from twisted.python.logfile import LogFile

from s2s.errors import OperatorError
from s2s.runtime import streams

_log = Logger(namespace="s2s.runtime.log_file")


def bound(file_bytes: int, old_files: int) -> None:
    """Limit the size of every open log file, and count the lost events from now on.

    :param file_bytes: the size at which a file is rotated.
    :param old_files: the number of rotated files that are kept; older ones are removed at the next rotation.
    """
    # A file at the process's own size limit accepts no further event, so rotate at half of that limit.
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    for file in _files():
        file.rotateLength = file_bytes if limit == resource.RLIM_INFINITY else min(file_bytes, max(1, limit // 2))
        file.maxRotatedFiles = old_files
        file.__class__ = _CountedFile  # because twistd has created the object
        cast("_CountedFile", file).check_place()
    for observer in _observers():
        if observer._outFile is sys.__stdout__:
            observer._outFile = cast("IO[Any]", _CountedStream(sys.__stdout__))


class _Counted:
    """A log that reports how many events it lost once it can be written again.

    Twisted would report nothing, because its own reports go to the same log.
    """

    _lost = 0
    _why = ""

    def write(self, event: str) -> None:
        """Write an event, whose text begins with its time."""
        told = ""
        if self._lost:
            told = (
                f"{event.partition(' ')[0]} [s2s.runtime.log_file#error] events lost before this line: {self._lost}: "
                f"the log could not be written: {self._why}\n"
            )
        try:
            self._append((told + event).encode(errors="backslashreplace"))
        except OSError as error:
            self._lost += 1
            self._why = str(error.strerror)
        else:
            self._lost = 0

    def _append(self, text: bytes) -> None:
        """Append some text.

        :raises OSError: it cannot be written.
        """
        raise NotImplementedError


class _CountedFile(_Counted, LogFile):
    """A log file that accepts each event as a whole or not at all."""

    synchronized = ["write"]  # together with rotate(), which is synchronized already
    write = _Counted.write
    #: Whether the path leads to the file. False after a chroot, or if the user may not search its directories.
    _is_in_reach = True

    def check_place(self) -> None:
        """Warn of a file that this process cannot rotate: in another user's directory or outside its root directory."""
        self._is_in_reach = os.path.exists(self.path)
        if not (os.access(self.directory, os.W_OK) and os.access(self.path, os.W_OK)):
            _log.warn(
                "the log {path} cannot be rotated by this user or from this root directory, and grows without a bound: "
                "let the user write its directory, or log to stdout",
                path=self.path,
            )

    def _append(self, text: bytes) -> None:
        if self._is_in_reach and self.shouldRotate():  # type: ignore[no-untyped-call]
            with suppress(OSError):  # if the rotation fails, write to the file all the same
                self.rotate()  # type: ignore[no-untyped-call]
            self._leave_removed()
        if self._file.closed:  # after a rotation that failed half-way
            self._openFile()  # type: ignore[no-untyped-call]
        start = self._file.seek(0, os.SEEK_END)  # another program may have truncated the file
        try:
            while text:  # a disk that fills up accepts a part, and raises at the next write
                text = text[self._file.write(text) :]
        except OSError:
            with suppress(OSError):
                self._file.seek(start)
                self._file.truncate()
            raise
        self.size = self._file.tell()

    def _leave_removed(self) -> None:
        """Reopen the path if the file was removed or moved away: such a file cannot be rotated and has no size limit.

        :raises OSError: the path cannot be opened, for example because its directory is gone.
        """
        try:
            os.stat(self.path)
        except FileNotFoundError:
            removed = self._file
            self._openFile()  # type: ignore[no-untyped-call]
            removed.close()
        except OSError:
            pass  # it is unknown whether the file exists


class _CountedStream(_Counted):
    """The log on stdout, unbuffered: a buffer would keep text that a full disk refused, and raise at each later event.

    An event that finds no room in the pipe in time is lost: waiting for a stalled reader would block the reactor.
    """

    synchronized = ["write"]
    write = _Counted.write

    def __init__(self, stream: TextIO) -> None:
        self._descriptor = stream.fileno()
        self._is_torn = False
        #: Seconds that the next event waits for the reader: 0 after an event that waited, until there is room at once.
        self._patience_s = streams.ROOM_S

    def _append(self, text: bytes) -> None:
        if self._is_torn:
            text = b"\n" + text
        began = time.monotonic()
        until = began + self._patience_s
        while text:
            if not streams.has_room(self._descriptor, max(0.0, until - time.monotonic())):
                self._patience_s = 0.0
                raise OSError(errno.EAGAIN, "nobody reads it")
            written = os.write(self._descriptor, text[: select.PIPE_BUF])
            text = text[written:]
            self._is_torn = bool(text)
        has_waited = time.monotonic() > began + streams.ROOM_S / 10
        self._patience_s = 0.0 if has_waited else streams.ROOM_S

    def flush(self) -> None:
        """Do nothing: an event is written at once."""


threadable.synchronize(_CountedFile, _CountedStream)


def append(path: str, text: str = "") -> None:
    """Append to a file as twistd will do, so that an error is reported to the user.

    :raises OSError: the file cannot be written.
    :raises OperatorError: the path is not a regular file.
    """
    is_file = not Path(path).is_fifo()  # opening one would wait for a reader
    if is_file:
        with open(path, "ab", buffering=0) as file:
            is_file = file.seekable()
            if is_file:
                file.write(text.encode())
    if not is_file:
        raise OperatorError(f"{path} is a pipe or a terminal, and no log file: leave --logfile out to log to stdout")


def reopen() -> bool:
    """Reopen every log file by its path, because another program has moved it away; create it if it is missing.

    :returns: whether that succeeded. Otherwise the old file stays in use, and stderr gets a line too, because the old
        file may be deleted.
    """
    is_done = True
    for file in _files():
        try:
            # LogFile.reopen() closes the old file first: without a new one, nothing could be logged any more.
            append(file.path)
        except (OSError, OperatorError) as error:
            is_done = False
            why = error.strerror if isinstance(error, OSError) else error
            line = f"the log {file.path} cannot be opened anew, and the old file is written to: {why}"
            _log.error("{line}", line=line)
            streams.say(line)
        else:
            file.reopen()
    return is_done


def descriptor() -> int:
    """Return the file descriptor of the log file, or of stderr if there is none."""
    return next((int(file._file.fileno()) for file in _files()), 2)


def _files() -> Iterator[LogFile]:
    return (observer._outFile for observer in _observers() if isinstance(observer._outFile, LogFile))


def _observers() -> list[FileLogObserver]:
    """List the observers that write to a file; Twisted has no public list of them."""
    return [observer for observer in globalLogPublisher._observers if isinstance(observer, FileLogObserver)]
