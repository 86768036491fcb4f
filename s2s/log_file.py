"""The log files that twistd writes: bounded, and opened anew when they were moved away.

twistd opens its log by itself, for a plugin and for a tac file, and keeps every rotated file. Its
:class:`~twisted.python.logfile.LogFile` gets its bounds here once the role runs. ``--logger`` and ``--syslog`` keep
their meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

from twisted.logger import Logger, globalLogPublisher
from twisted.python.logfile import LogFile

_log = Logger(namespace="s2s.log_file")


def bound(file_bytes: int, old_files: int) -> None:
    """Bound every log file that is open.

    :param file_bytes: a file of this size is rotated.
    :param old_files: rotated files that are kept; older ones are removed at the next rotation.
    """
    for file in _files():
        file.rotateLength = file_bytes
        file.maxRotatedFiles = old_files


def reopen() -> None:
    """Open every log file anew by its path, for a program that has moved it away; make it where it is missing."""
    for file in _files():
        try:
            # LogFile.reopen() closes the old file first: without a new one nothing could be logged any more.
            with open(file.path, "ab"):
                pass
        except OSError as error:
            _log.error("the log {path} cannot be opened anew: {why}", path=file.path, why=error.strerror)
        else:
            file.reopen()


def descriptor() -> int:
    """Return the file descriptor of the log file, or of stderr where there is none."""
    return next((int(file._file.fileno()) for file in _files()), 2)


def _files() -> Iterator[LogFile]:
    """Find the log files among the observers, which Twisted does not list in public."""
    for observer in globalLogPublisher._observers:
        file = getattr(observer, "_outFile", None)
        if isinstance(file, LogFile):
            yield file
