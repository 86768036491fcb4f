"""The pid file of a role in the background, locked by the process that it names.

The lock tells whether the file is stale: the kernel drops it with the process, while the pid in the file may be that of
any process by now, in a container even our own. twistd would believe the pid, so the file is never left to it.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import stat
from contextlib import suppress

from s2s.errors import OperatorError

#: Bytes of a file that are read. A pid has 7 digits at most on Linux.
_MOST_BYTES = 64


class PidFile:
    """The file of this process, and of what it forks.

    :raises OperatorError: another process has it, or it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        try:
            self._descriptor = self._take()
        except OSError as error:
            raise self._unusable(error) from None
        # A fork, too, removes it when it ends in order.
        atexit.register(self._remove)
        # Before the fork as well: a disk that is full is told on the terminal, and the place of the pid is ours then.
        self.write()

    def write(self) -> None:
        """Write our pid; once more after the fork.

        :raises OperatorError: it cannot be written.
        """
        pid = b"%d\n" % os.getpid()
        try:
            # Truncated first, it would give its place on the disk away.
            os.pwrite(self._descriptor, pid, 0)
            os.ftruncate(self._descriptor, len(pid))
        except OSError as error:
            raise self._unusable(error) from None

    def _take(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
                # Its last owner may have removed it in between.
                if self._is(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        # A loss of power may leave NUL bytes.
        content = os.pread(descriptor, _MOST_BYTES, 0).strip(b"\0 \t\r\n") if is_file else b"-"
        if not re.fullmatch(rb"\d*", content):
            raise self._refusal("is no pid file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = f"process {content.decode()}, which runs" if content else "a process that starts"
            raise self._refusal(f"is that of {running}: stop it, or run in another directory") from None

    def _unusable(self, error: OSError) -> OperatorError:
        return self._refusal(f"cannot be used: {error.strerror}")

    def _refusal(self, why: str) -> OperatorError:
        return OperatorError(f"the pid file {self._path} {why}: name another --pidfile")

    def _is(self, descriptor: int) -> bool:
        """Whether the path names the file of a descriptor."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _remove(self) -> None:
        with suppress(OSError):  # the directory may be out of reach for the user that a daemon became
            if self._is(self._descriptor):
                os.unlink(self._path)
