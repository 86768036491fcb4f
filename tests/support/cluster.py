"""A test's own PostgreSQL, which the test can stop, kill and freeze."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg2

from s2s.store.embedded import postmaster
from tests.support.postgres import memory_directory, migrate


class Cluster:
    """One PostgreSQL server. Every method blocks."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="s2s-cluster-", dir=memory_directory())).resolve()
        self._directory.chmod(0o755)
        self.start()

    @property
    def _data(self) -> Path:
        return self._directory / "postgres"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        self.url, self._process = postmaster.start(self._data)

    def migrate(self) -> None:
        """Make the tables."""
        connection = psycopg2.connect(self.url)
        migrate(connection)
        connection.close()

    def stop(self) -> None:
        """Stop it at once: every connection is lost, and uncommitted changes are lost."""
        running = postmaster.find(self._data)
        if running is not None and self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: an immediate shutdown, as a crash would be
            self._process.wait(20)

    def kill(self) -> None:
        """Kill all of its processes by SIGKILL."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self._process is not None
        self._process.wait(20)

    def freeze(self) -> None:
        """Suspend its processes: connections stay open, and nothing answers."""
        self._frozen = [process for process in self._processes() if not process.suspend()]

    def thaw(self) -> None:
        """Resume its processes."""
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        assert self._process is not None
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def remove(self) -> None:
        """Stop it, and remove its directory."""
        self.stop()
        shutil.rmtree(self._directory)
