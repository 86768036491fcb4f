"""Follow a log file that another process writes and rotates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


class LogTail:
    """The lines that are written to a file from now on.

    :param path: the file, which need not exist yet. Its present content is skipped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = b""
        self._file: BinaryIO | None = None
        self._open(os.SEEK_END)

    def lines(self) -> list[str]:
        """Return the lines that were finished since the last call, without line ends; never wait."""
        found: list[str] = []
        while self._file is not None or self._open():
            rotated = self._rotated()  # checked before the rest is read: later lines go to the new file
            found += self._rest()
            if not rotated:
                break
            self.close()
        return found

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, whence: int = os.SEEK_SET) -> bool:
        try:
            self._file = self._path.open("rb")
        except FileNotFoundError:
            return False
        self._file.seek(0, whence)
        return True

    def _rotated(self) -> bool:
        """Whether the path names another file than the open one."""
        assert self._file is not None
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _rest(self) -> list[str]:
        assert self._file is not None
        *whole, self._part = (self._part + self._file.read()).split(b"\n")
        return [line.decode(errors="replace") for line in whole]
