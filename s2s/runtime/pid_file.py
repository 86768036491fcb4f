"""The pid file of a role in the background, locked by the process that it names.

The lock shows whether the file is stale: the kernel releases it with the process, while the pid in the file may belong
to any process by now, in a container even to this one. twistd would trust the pid, so twistd never handles the file.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import stat
from contextlib import suppress

from s2s.errors import OperatorError
from s2s.runtime.forks import keep_from_children

#: Bytes of the file that are read. A pid has at most 7 digits on Linux.
_MOST_BYTES = 64


class PidFile:
    """The pid file of this process, and of its forks.

    :raises OperatorError: another process holds the file, or it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        try:
            self._descriptor = self._take()
        except OSError as error:
            raise self._unusable(error) from None
        # The lock lasts until every process that has the descriptor ends.
        keep_from_children(lambda: [self._descriptor])
        # A fork also removes the file when it exits normally.
        atexit.register(self._remove)
        # Also write before the fork: a full disk is then reported on the terminal, and the space for the pid is
        # reserved.
        self.write()

    def write(self) -> None:
        """Write the pid of this process; call this again after the fork.

        :raises OperatorError: it cannot be written.
        """
        pid = b"%d\n" % os.getpid()
        try:
            # Do not truncate first, because that would release the reserved disk space.
            os.pwrite(self._descriptor, pid, 0)
            os.ftruncate(self._descriptor, len(pid))
        except OSError as error:
            raise self._unusable(error) from None

    def _take(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._lock(descriptor)
                # The previous owner may have removed the file in between.
                if self._is(descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        # A power loss may leave NUL bytes.
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
        with suppress(OSError):  # a daemon's new user may have no access to the directory
            if self._is(self._descriptor):
                os.unlink(self._path)
