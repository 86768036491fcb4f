"""The PostgreSQL that starts by itself if no database is named: for development, tests and ``s2s up``.

Each process that uses the server holds a shared ``flock`` on ``STATE_DIR/postgres.lock``. The kernel releases it when
the process dies, for whatever reason, and a fork inherits it. A process that can make its lock exclusive is the last
user, and stops the server.

``python -m s2s.store.embedded.lease --guard STATE_DIR`` holds a share until its stdin ends, so that the death of its
parent stops PostgreSQL, even after a SIGKILL (:mod:`s2s.cli.up.supervisor`).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from s2s.errors import OperatorError
from s2s.runtime import files, signals
from s2s.runtime.streams import LateLine
from s2s.store.embedded import postmaster

#: Seconds that a start waits for another process to start or stop the server, which may first run initdb or a recovery.
_OTHERS_S = 2 * postmaster.STARTING_S
#: Seconds during which a guardian tries to be the last user: the roles that use the server have 5 s to drain.
GUARD_PATIENCE_S = 15.0


class Lease:
    """A share in the running server; :func:`join` returns one.

    :ivar url: a libpq URL of the database ``postgres``; it contains no secret.
    """

    def __init__(self, url: str, data: Path, lock: int, process: subprocess.Popen[bytes] | None) -> None:
        self.url = url
        self._data = data
        self._lock: int | None = lock
        #: The server process, if it is our child, so that we must reap it.
        self._process = process

    @property
    def is_running(self) -> bool:
        """Whether the server's process lives."""
        return postmaster.find(self._data) is not None

    def trim_log(self) -> None:
        """Keep the server's log within its limit; call this about every minute."""
        postmaster.trim_log(self._data)

    def leave(self, patience_s: float = 0.0) -> bool:
        """Release the share; the last user stops the server. A second call does nothing.

        :param patience_s: seconds to wait for the other users to leave first.
        :returns: whether this process was the last user.
        """
        lock, self._lock = self._lock, None
        if lock is None:
            return False
        deadline = time.monotonic() + patience_s
        try:
            # A refused upgrade has already released our share, so one of two processes that leave at once is the last.
            while not _try_exclusive(lock):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.1)
            postmaster.stop(self._data)
            if self._process is not None:
                with suppress(subprocess.TimeoutExpired):  # it may survive even SIGKILL while its disk hangs
                    self._process.wait(postmaster.STOPPING_S)
            return True
        finally:
            os.close(lock)


def join(state_dir: Path) -> Lease:
    """Take a share in the PostgreSQL under ``state_dir``, which is created and started if necessary. Blocks.

    :param state_dir: its parent directories are created as well.
    :raises OperatorError: the package is not installed, the directory is not writable, or PostgreSQL does not start.
    """
    try:
        state_dir = Path(os.path.realpath(state_dir))
        str(state_dir).encode()
        data = state_dir / "postgres"
        state_dir.mkdir(parents=True, exist_ok=True)
        with _locked(state_dir / "postgres.start.lock"):
            lock = share(state_dir)
            try:
                url, process = postmaster.start(data)
                return Lease(url, data, lock, process)
            except KeyboardInterrupt:
                # The server may run by now.
                with suppress(ImportError):
                    Lease("", data, lock, None).leave()
                raise
            except BaseException:
                os.close(lock)
                raise
    except UnicodeEncodeError:
        raise OperatorError(
            f"the path of the embedded PostgreSQL is not UTF-8: {str(state_dir)!a}: name another --state-dir"
        ) from None
    except OSError as error:
        if error.filename is None and not files.is_here():
            raise OperatorError(
                "the working directory was removed: change to another one, or name a database with --database"
            ) from error
        raise OperatorError(
            f"the embedded PostgreSQL cannot use {state_dir} ({files.describe(error)}): "
            "name a directory of your own with --state-dir (and with TMPDIR), or a database with --database"
        ) from error


def share(state_dir: Path) -> int:
    """Take a share without starting the server, for a child process to inherit: the server runs while the child lives.

    While another process stops the server, this waits.

    :returns: a file descriptor. The share ends when every copy of it is closed.
    :raises OperatorError: the wait took too long.
    """
    lock = os.open(state_dir / "postgres.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(lock, fcntl.LOCK_SH, f"stops the PostgreSQL in {state_dir}")
    except BaseException:
        os.close(lock)
        raise
    return lock


def _try_exclusive(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the exclusive ``flock`` on a file; wait for it."""
    with path.open("ab") as file:
        _take(file.fileno(), fcntl.LOCK_EX, f"starts the PostgreSQL in {path.parent}")
        yield


def _take(lock: int, kind: int, other: str) -> None:
    """Take a ``flock``; wait for it.

    :param other: the activity of the process that holds it.
    :raises OperatorError: the wait took too long.
    """
    late = LateLine(f"waiting for another process, which {other}")
    deadline = time.monotonic() + _OTHERS_S
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            late.look()
        if time.monotonic() >= deadline:
            raise OperatorError(
                f"another process {other}, for {_OTHERS_S:g} s by now: end it, or name another --state-dir"
            )
        time.sleep(0.02)


def guard(state_dir: Path) -> None:
    """Join, print ``ready URL`` to stdout, and hold the share until stdin ends or SIGTERM arrives.

    :raises OperatorError: as :func:`join`, or the server ended by itself.
    :raises KeyboardInterrupt: SIGTERM arrived before the server was ready; the server is ended.
    """
    signals.reset()
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Let SIGTERM interrupt the start, because a recovery may take minutes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lease = join(state_dir)
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        print("ready", lease.url, flush=True)
        stdin = sys.stdin.fileno()
        while lease.is_running:
            heard, _, _ = select.select([stdin, told], [], [], 1.0)
            if told in heard or (stdin in heard and not os.read(stdin, 4096)):
                lease.leave(GUARD_PATIENCE_S)
                return
            lease.trim_log()
        raise OperatorError(f"the PostgreSQL in {state_dir} ended unasked; postgres.log beside its data says why")
    finally:
        lease.leave()


if __name__ == "__main__":
    _arguments = argparse.ArgumentParser(
        prog="python -m s2s.store.embedded.lease", description="Keep the embedded PostgreSQL."
    )
    _arguments.add_argument("--guard", type=Path, required=True, metavar="STATE_DIR", help="join until stdin ends")
    try:
        guard(_arguments.parse_args().guard)
    except OperatorError as _error:
        sys.exit(str(_error))
    except KeyboardInterrupt:
        sys.exit("interrupted before the PostgreSQL was ready")
