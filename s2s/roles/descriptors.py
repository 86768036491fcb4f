"""The limit of file descriptors of this process."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Mapping
from typing import Any, Final

from twisted.internet import tcp
from twisted.logger import LogEvent, Logger

from s2s.admin.http.site import MOST_CONNECTIONS
from s2s.link.factory import MAX_LINKS
from s2s.runtime import files
from s2s.runtime.line_quota import LineQuota

#: The descriptors for everything but links and HTTP connections: the database, logs, pipes, connections being closed.
_OTHERS: Final = 500

#: The descriptor that Twisted closes for a moment in order to refuse a connection. Without it a port cannot refuse a
#: connection, and takes all of the reactor's time. Another thread may have taken the descriptor in that moment.
_RESERVATION: Final[Any] = tcp._reservedFD

_log: Final = Logger(namespace="s2s.roles.descriptors")


def allow() -> None:
    """Raise the soft limit, often 1024, to the number that the limits of s2s need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_LINKS + MOST_CONNECTIONS + _OTHERS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            _log.warn(
                "the limit of file descriptors is {allowed}, and as many links and HTTP connections as may be need"
                " {wanted}: {cure}",
                allowed=allowed,
                wanted=wanted,
                cure=files.RAISE_LIMIT,
            )


def watch(scheduler: Any) -> None:
    """Take over the log events of every port about connections that it cannot accept.

    :param scheduler: an ``IReactorTime``.
    """
    observer: Any = _Refusals(scheduler)
    tcp.Port._logger = _RESERVATION._log = Logger(observer=observer)


class _Refusals:
    """Logs the connections that could not be accepted, one line a minute. Twisted would log three lines for each."""

    def __init__(self, scheduler: Any) -> None:
        self._lines = LineQuota(scheduler, self._tell, most=1)

    def __call__(self, event: LogEvent) -> None:
        """Handle a log event of a port. It has an address if Twisted closed a connection for lack of a descriptor."""
        why = event.get("acceptError", "EMFILE" if "address" in event else "")
        if why == "EMFILE":
            _RESERVATION.reserve()
        if why and self._lines.may_tell(why):
            self._tell({why: 1})

    def _tell(self, untold: Mapping[str, int]) -> None:
        for why, count in untold.items():
            said = files.no_descriptor() if why == "EMFILE" else os.strerror(getattr(errno, why, 0))
            _log.error("connections that could not be accepted: {count}: {said}", count=count, said=said)
