"""The processes that ``s2s up`` keeps running: each role as a twistd process, and PostgreSQL with its guardian."""

from __future__ import annotations

import fcntl
import os
import re
import select
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

#: Seconds that a stopped role needs, including its grace period and the steps after it; a role that takes longer hangs.
_ENDS_S = GRACE_S + 2 * CUT_S + 2.0
#: Seconds in which PostgreSQL ends: it writes out its memory, and its guardian's patience and every step of its stop
#: fit.
_DATABASE_ENDS_S = 60.0
#: Bytes of a role's output besides its log, after which all of it is dropped, and bytes at its end that are read.
_OUTPUT_BYTES, _REASON_BYTES = 10_000_000, 65_536
#: Seconds that one read of a starting guardian waits for its output.
_LOOK_S = 0.2
#: Seconds: the first and the longest pause before a dead role is started again, and the life that resets the pause.
_PAUSE_S, _PAUSE_MAX_S, _LONG_LIFE_S = 0.5, 10.0, 30.0
#: A status line in a twistd log, and a line that states why the process ends.
_NEWS = re.compile(r"\S+T(\d\d:\d\d:\d\d)\S* \[s2s\.runtime\.status_log#\w+\] (.+)")
_REASON = re.compile(r"\S+ \[\S*#(?:critical|error)\] (.*\S.*)")


class DatabaseProcess:
    """PostgreSQL with its guardian (:mod:`s2s.store.embedded.lease`), which stops PostgreSQL when we die.

    :param lock: a file descriptor that the guardian inherits.
    :param say: called with lines about it.
    """

    def __init__(self, state_dir: Path, lock: int, say: Callable[[str], None]) -> None:
        self._state_dir = state_dir
        self._lock = lock
        self._say = say
        self._guard: subprocess.Popen[bytes] | None = None
        #: Whether this guardian is ready, and whether any guardian was, in which case the server may run.
        self._is_ready = self._was_ready = False
        #: The unfinished line of this guardian's stdout, and of its stderr.
        self._word = self._line = b""

    def start(self, check: Callable[[], object] = lambda: None) -> str:
        """Start the server, or join it if it runs.

        :param check: called repeatedly during the start; its exception ends the start.
        :returns: the server's URL.
        :raises OperatorError: the guardian's error.
        """
        self._spawn()
        while not (url := self._look(_LOOK_S)):
            check()
        return url

    def poll(self) -> None:
        """Restart the server if it or its guardian has died; do not wait.

        :raises OperatorError: the server could not be started again.
        """
        if self._guard is None:
            return
        if not self._is_ready:
            self._look(0.0)
        elif self._guard.poll() is not None:
            self._guard.communicate()
            self._say("died unasked, starts again")
            self._spawn()

    def stop(self) -> None:
        """Stop the server. It outlives a dead guardian, so first wait until a new guardian is ready."""
        with suppress(OperatorError):
            self.poll()
            until = time.monotonic() + _DATABASE_ENDS_S
            while self._was_ready and not self._is_ready and time.monotonic() < until:
                self._look(_LOOK_S)
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if not _end(guard, _DATABASE_ENDS_S):
            self._say(f"its guardian did not end within {_DATABASE_ENDS_S:g} s and was killed")
        guard.communicate()

    def _spawn(self) -> None:
        self._is_ready = False
        self._word = self._line = b""
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "s2s.store.embedded.lease", "--guard", str(self._state_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(self._lock,),
            start_new_session=True,
        )

    def _look(self, wait_s: float) -> str:
        """Read a starting guardian's output, and forward its lines about waits.

        :returns: the URL when it is ready; empty: it is not ready yet.
        :raises OperatorError: it has ended.
        """
        guard = self._guard
        assert guard is not None
        assert guard.stdout is not None
        assert guard.stderr is not None
        heard, _, _ = select.select([guard.stdout, guard.stderr], [], [], wait_s)
        if guard.stderr in heard:
            self._line += os.read(guard.stderr.fileno(), select.PIPE_BUF)
            while self._line.startswith(b"waiting ") and b"\n" in self._line:
                line, _, self._line = self._line.partition(b"\n")
                self._say(line.decode(errors="replace"))
        if guard.stdout in heard:
            part = os.read(guard.stdout.fileno(), select.PIPE_BUF)
            self._word += part
            if not part:
                _, rest = guard.communicate()
                # Forget this guardian, so that it is not started again.
                self._guard = None
                raise OperatorError((self._line + rest).decode(errors="replace").strip().rpartition("\n")[2])
        word, end, _ = self._word.partition(b"\n")
        if not end:
            return ""
        self._is_ready = self._was_ready = True
        return word.decode().partition(" ")[2].strip()


class RoleProcess:
    """One role, started again when it dies by itself.

    :param name: the role's name for operators; its log is ``NAME.log`` in the state directory.
    :param argv: the twistd plugin's name and its options.
    :param environment: variables in addition to our own. A database URL belongs here, since every user can read argv.
    :param keep: file descriptors that the role inherits.
    :param say: called with lines about the role.
    :ivar pid: the process that runs, or ran last.
    :ivar over: the role ended by itself with exit 0, which is final (protocol, "States of an engine").
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
        #: The end of the output that was removed from the file.
        self._end_of_output = b""
        self._output = tempfile.TemporaryFile(dir=state_dir, buffering=0)  # noqa: SIM115 - lives as long as we do
        # Append, so that the role writes at the end even after the file was truncated.
        fcntl.fcntl(self._output, fcntl.F_SETFL, fcntl.fcntl(self._output, fcntl.F_GETFL) | os.O_APPEND)
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = _PAUSE_S
        self._started = self._due = 0.0

    def start(self) -> None:
        """Start the role in a session of its own, so that a Ctrl-C only reaches us, and we stop the roles in order."""
        self._end_of_output = b""
        self._output.truncate(0)
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
        """Yield the status lines since the last call: the time of day, and the text."""
        for line in self._tail.lines():
            self._lines.append(line)
            if match := _NEWS.fullmatch(line):
                yield match[1], match[2]

    def poll(self, *, first: bool) -> None:
        """Check whether the role lives, and start it again when the pause after its death is over.

        :param first: no link has come up yet, so an exit with an error is the operator's to fix.
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
            if os.fstat(self._output.fileno()).st_size > _OUTPUT_BYTES:
                # The role may have written its reason already, and end now.
                self._end_of_output = self._read_end()
                self._output.truncate(0)
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
        """Tell the role to shut down, and wait for it."""
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

    def _read_end(self) -> bytes:
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - _REASON_BYTES))
        return self._output.read()

    def _reason(self, code: int) -> str:
        """Return the line that states why the role ended: from its output, else from its log."""
        list(self.status_log())
        output = self._end_of_output + self._read_end()
        said = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        logged = [match[1] for line in self._lines if (match := _REASON.match(line))]
        return (said or logged or [f"the {self.name} ended with exit {code}; its log says more"])[-1]


def twistd() -> Path:
    """Return the path of the ``twistd`` that belongs to this Python.

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
