"""Signal settings inherited from a parent: :mod:`s2s.runtime.signals`, and every entry point of a process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from s2s.runtime import signals
from tests.support.roles import PATIENCE_S, TWISTD, environment

_ROOT = Path(__file__).parents[2]
#: A parent that ignores SIGCHLD and blocks every signal that can be blocked.
_PARENT = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""
#: A module that writes the signal settings of a process to a file at its end.
_TELL = """
import atexit, os, signal
def tell():
    with open(os.environ["TOLD"], "w") as file:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        print(len(blocked), signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN, file=file)
end = os._exit
def tell_and_end(code):
    tell()
    end(code)
os._exit = tell_and_end
atexit.register(tell)
"""


class ResetTests(SynchronousTestCase):
    """Each kind of process, started by a parent that blocks all signals."""

    def left(self, *argv: str) -> str:
        """Start a program, and return the number of blocked signals and whether SIGCHLD is ignored at its end."""
        directory = Path(self.mktemp()).resolve()
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(_TELL)
        told = directory / "told"
        done = subprocess.run(
            [sys.executable, "-c", _PARENT, *argv],
            env=environment(PYTHONPATH=f"{directory}:{_ROOT}", TOLD=str(told), S2S_DATABASE_URL=""),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        self.assertTrue(told.exists(), done.stderr)
        return told.read_text().strip()

    def test_the_parent(self) -> None:
        """A process without the reset inherits the parent's settings."""
        blocked, is_ignored = self.left(sys.executable, "-c", "").split()
        self.assertGreater(int(blocked), 50)
        self.assertEqual(is_ignored, "True")

    def test_programs(self) -> None:
        """The command line, the guardian of the database and both roles unblock all signals and reset SIGCHLD."""
        for argv in (
            [str(Path(sys.executable).with_name("s2s")), "--version"],
            [sys.executable, "-m", "s2s.store.embedded.lease", "--guard", "/dev/null/x"],
            [TWISTD, "-n", "--pidfile=", "s2s-server"],
            [TWISTD, "-n", "--pidfile=", "s2s-engine"],
            [TWISTD, "--pidfile=", "-noy", str(_ROOT / "tac" / "server.tac")],
            [TWISTD, "--pidfile=", "-noy", str(_ROOT / "tac" / "engine.tac")],
        ):
            with self.subTest(argv=argv):
                self.assertEqual(self.left(*argv), "0 False")

    def test_a_handler(self) -> None:
        """An existing handler of SIGCHLD stays."""
        self.addCleanup(signal.signal, signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))

        def handler(*_: object) -> None:
            """Do nothing."""

        signal.signal(signal.SIGCHLD, handler)
        signals.reset()
        self.assertIs(signal.getsignal(signal.SIGCHLD), handler)
