"""When a role's process ends: on a signal, with its parent, or because it cannot start."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, Final, NoReturn

from twisted.internet.error import ReactorNotRunning
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

#: Set by whoever starts us with a pipe for stdin: its end is our order to stop, also when it was SIGKILL that ended it.
STOP_WITH_STDIN: Final = "S2S_STOP_WITH_STDIN"

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


def watch(reactor: Any) -> None:
    """Take SIGTERM and SIGINT as a shutdown that ends with exit code 0, and the end of stdin where we are told so.

    Twisted's own handler, which it sets when the reactor starts, would let the process die of the signal once all is
    stopped.
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
    """
    _log.error("{why}", why=why)
    print(f"{os.path.basename(sys.argv[0])}: {why}", file=sys.__stderr__)
    raise SystemExit(1)
