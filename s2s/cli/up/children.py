"""What ``s2s up`` keeps alive: a role as a twistd process, and PostgreSQL with its guardian."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from s2s.cli.up.log_tail import LogTail
from s2s.errors import OperatorError
from s2s.roles.shutdown import CUT_S, GRACE_S, STOP_WITH_STDIN
from s2s.runtime import watchdog

#: What a role takes that is told to end, with all that follows its grace; one that takes longer than this hangs.
_ENDS_S = GRACE_S + 2 * CUT_S + 2.0
#: PostgreSQL writes out what it has in memory; its guardian's patience, and every step of its stop, fit into this.
_DATABASE_ENDS_S = 60.0
#: The pauses before a dead role is started again, in seconds: the first, the longest, and the life that makes it new.
_PAUSE_S, _PAUSE_MAX_S, _LONG_LIFE_S = 0.5, 10.0, 30.0
#: A line of interest in a twistd log, and one that says why the process ends.
_NEWS = re.compile(r"\S+T(\d\d:\d\d:\d\d)\S* \[s2s\.runtime\.status_log#\w+\] (.+)")
_REASON = re.compile(r"\S+ \[\S*#(?:critical|error)\] (.*\S.*)")


class DatabaseProcess:
    """PostgreSQL with its guardian (:mod:`s2s.store.embedded.lease`), which stops it when we die.

    :param lock: a file descriptor that the guardian inherits.
    :param say: takes lines about it.
    """

    def __init__(self, state_dir: Path, lock: int, say: Callable[[str], None]) -> None:
        self._state_dir = state_dir
        self._lock = lock
        self._say = say
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start it, or join it where it runs.

        :returns: its URL.
        :raises OperatorError: the guardian's.
        """
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "s2s.store.embedded.lease", "--guard", str(self._state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(self._lock,),
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        assert self._guard.stderr is not None
        word, _, url = self._guard.stdout.readline().decode().strip().partition(" ")
        if word != "ready":
            _, said = self._guard.communicate()
            # It never ran, so it has not died, and is not started again.
            self._guard = None
            raise OperatorError(said.decode().strip().rpartition("\n")[2])
        return url

    def poll(self) -> None:
        """Start it again where it or its guardian has died."""
        if self._guard is not None and self._guard.poll() is not None:
            self._guard.communicate()
            self._say("died unasked, starts again")
            self.start()

    def stop(self) -> None:
        """Stop it; a guardian that died just now has left it running."""
        with suppress(OperatorError):
            self.poll()
        if self._guard is None:
            return
        if not _end(self._guard, _DATABASE_ENDS_S):
            self._say(f"its guardian did not end within {_DATABASE_ENDS_S:g} s and was killed")
        self._guard.communicate()


class RoleProcess:
    """One role, started again when it dies unasked.

    :param name: what people call it; its log is ``NAME.log`` in the state directory.
    :param argv: the twistd plugin's name and its options.
    :param environment: variables beside our own; a database URL goes here, since argv is for everybody to read.
    :param keep: file descriptors that it inherits.
    :param say: takes lines about it.
    :ivar pid: the process that runs, or ran last.
    :ivar over: it ended by itself with exit 0, which is final (protocol, "The engine").
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        state_dir: Path,
        environment: Mapping[str, str],
        keep: Sequence[int],
        say: Callable[[str], None],
    ) -> None:
        log = state_dir / f"{name}.log"
        self.name = name
        self.pid = 0
        self.over = False
        self._argv = [str(twistd()), "--nodaemon", "--pidfile=", f"--logfile={log}", *argv]
        self._environment = {**os.environ, **environment, STOP_WITH_STDIN: "1"}
        self._keep = keep
        self._say = say
        self._tail = LogTail(log)
        self._lines: deque[str] = deque(maxlen=200)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as we do
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = _PAUSE_S
        self._started = self._due = 0.0

    def start(self) -> None:
        """Start it in a session of its own: a Ctrl-C at the terminal is for us alone, who stop in order."""
        self._output.seek(0)
        self._output.truncate()
        self._lines.clear()
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._output,
            env=self._environment,
            pass_fds=self._keep,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def status_log(self) -> Iterator[tuple[str, str]]:
        """Give what it wrote for people since the last call: the time of day, and the text."""
        for line in self._tail.lines():
            self._lines.append(line)
            if match := _NEWS.fullmatch(line):
                yield match[1], match[2]

    def poll(self, *, first: bool) -> None:
        """See whether it lives, and start it again when the pause after its death is over.

        :param first: nothing has worked yet, so an exit with an error is the operator's to mend.
        :raises OperatorError: that error.
        """
        now = time.monotonic()
        if self.over:
            return
        if self._process is None:
            if now >= self._due:
                self.start()
                self._say(f"started again, pid {self.pid}")
            return
        code = self._process.poll()
        if code is None:
            return
        self._forget()
        if code == 0:
            self.over = True
            self._say("ended with exit 0, which is final: it is not started again")
            return
        if first and code > 0:
            raise OperatorError(self._reason(code))
        if now - self._started >= _LONG_LIFE_S:
            self._pause_s = _PAUSE_S
        self._due = now + self._pause_s
        how = f"exit {code}: {self._reason(code)}" if code > 0 else watchdog.meaning(signal.Signals(-code))
        self._say(f"died unasked ({how}), starts again in {self._pause_s:g} s")
        self._pause_s = min(self._pause_s * 2, _PAUSE_MAX_S)

    def stop(self) -> None:
        """Tell it to shut down, and wait for it."""
        if self._process is None:
            return
        if not _end(self._process, _ENDS_S):
            self._say(f"did not end within {_ENDS_S:g} s and was killed")
        self._forget()

    def _forget(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None

    def _reason(self, code: int) -> str:
        """Find the line that says why it ended: what it said to the terminal, else its log."""
        list(self.status_log())
        self._output.seek(0)
        said = [line.strip() for line in self._output.read().decode(errors="replace").splitlines() if line.strip()]
        logged = [match[1] for line in self._lines if (match := _REASON.match(line))]
        return (said or logged or [f"the {self.name} ended with exit {code}; its log says more"])[-1]


def twistd() -> Path:
    """Find the ``twistd`` that belongs to this Python.

    :raises OperatorError: there is none.
    """
    program = Path(sys.executable).with_name("twistd")
    if not os.access(program, os.X_OK):
        raise OperatorError(f"there is no program {program}: run: pip install --force-reinstall twisted")
    return program


def _end(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    """Stop a process with SIGTERM, and after ``patience_s`` seconds with SIGKILL.

    :returns: whether it ended by itself.
    """
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True
