"""When a role's process ends: on a signal, with its parent, or because it cannot start."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, Final, NoReturn

from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

from s2s.errors import OperatorError

#: Set by whoever starts us with a pipe for stdin: its end is our order to stop, also when it was SIGKILL that ended it.
STOP_WITH_STDIN: Final = "S2S_STOP_WITH_STDIN"

#: What a stop may take, in seconds, before the process ends all the same (protocol, "s2s.engine.shutdown").
GRACE_S: Final = 5.0

_log = Logger(namespace="s2s.lifetime")


@implementer(IReadDescriptor)
class _Parent:
    """Stdin, until it ends."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def fileno(self) -> int:
        return 0

    def doRead(self) -> None:
        if not os.read(0, 4096):
            self._reactor.removeReader(self)
            stop(self._reactor, "the parent process is gone or told us to")

    def connectionLost(self, reason: object) -> None:
        stop(self._reactor, "stdin is gone")

    def logPrefix(self) -> str:
        return "stdin"


def stop(reactor: Any, why: str) -> None:
    """Stop the process in order."""
    with suppress(ReactorNotRunning):  # told twice
        reactor.stop()
        _log.info("stopping: {why}", why=why)
        # A thread whose database hangs can be neither cancelled nor joined. What it has not committed is rolled back.
        cut = threading.Timer(GRACE_S, _cut)
        cut.daemon = True
        cut.start()


def _cut() -> None:
    _log.error("not everything ended within {grace:g} s of the stop: leaving it", grace=GRACE_S)
    os._exit(0)


def watch(reactor: Any) -> None:
    """Take SIGTERM and SIGINT as a shutdown that ends with exit code 0, and the end of stdin where we are told so.

    Twisted's own handler, which it sets when the reactor starts, would let the process die of the signal once all is
    stopped. To be called when a service starts: after the fork, whose parent must stay killable.
    """

    def on_signal(number: int, _frame: object) -> None:
        reactor.callFromThread(stop, reactor, signal.Signals(number).name)

    def take_signals() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    take_signals()
    reactor.callWhenRunning(take_signals)
    if os.environ.get(STOP_WITH_STDIN):
        reactor.callWhenRunning(reactor.addReader, _Parent(reactor))


def refuse(why: str) -> NoReturn:
    """End the process before it has started, with one line for the operator.

    The line goes to the log, where a daemon leaves it, and to the terminal: Twisted's stderr is the log as well.

    :raises SystemExit: in the foreground, so that no traceback follows.
    :raises OperatorError: in a daemon, whose waiting parent Twisted tells of exceptions alone.
    """
    _log.error("{why}", why=why)
    print(f"{os.path.basename(sys.argv[0])}: {why}", file=sys.__stderr__)
    if os.path.samestat(os.fstat(2), os.stat(os.devnull)):
        raise OperatorError(why)
    raise SystemExit(1)
