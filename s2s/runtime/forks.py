"""Child processes that foreign code forks: they must not keep the sockets, locks and signal handlers of the role.

A child that outlives a killed role would hold its port, its links and its sessions of the database open, so that no
other process could take over. Programs that are started with ``exec`` inherit none of these.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

_sources: list[Callable[[], Iterable[int]]] = []
_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2),
    *(signal.SIGALRM, signal.SIGVTALRM, signal.SIGIO),
)


def keep_from_children(descriptors: Callable[[], Iterable[int]]) -> None:
    """Register file descriptors that a forked child must not keep.

    :param descriptors: returns them; called in the child, and its errors are ignored.
    """
    _sources.append(descriptors)


def watch() -> None:
    """Let every child that is forked from now on give up the registered descriptors and signal handlers."""
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    null = os.open(os.devnull, os.O_RDWR)
    for source in _sources:
        with suppress(Exception):
            for descriptor in list(source()):
                with suppress(OSError):
                    # Not closed: libpq and the reactor would later use the number for another file.
                    os.dup2(null, descriptor, inheritable=False)
    os.close(null)
