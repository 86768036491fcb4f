"""How many files and sockets this process may have open."""

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

#: What else is open: the database, logs, pipes, what is just being closed.
_OTHERS: Final = 500

#: The descriptor that Twisted gives up for a moment in order to refuse a connection. Without it a port refuses nothing,
#: and takes all of the reactor's time. Another thread may have taken it in that moment.
_RESERVATION: Final[Any] = tcp._reservedFD

_log: Final = Logger(namespace="s2s.roles.descriptors")


def allow() -> None:
    """Raise the soft limit, often 1024, to what our own bounds need, as far as the hard one lets us."""
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
    """Take over what every port says of connections that it cannot accept.

    :param scheduler: an ``IReactorTime``.
    """
    observer: Any = _Refusals(scheduler)
    tcp.Port._logger = _RESERVATION._log = Logger(observer=observer)


class _Refusals:
    """Connections that could not be accepted: one line a minute. Twisted has three for each."""

    def __init__(self, scheduler: Any) -> None:
        self._lines = LineQuota(scheduler, self._tell, most=1)

    def __call__(self, event: LogEvent) -> None:
        """Take an event of a port. It has an address where Twisted has closed a connection for want of a descriptor."""
        why = event.get("acceptError", "EMFILE" if "address" in event else "")
        if why == "EMFILE":
            _RESERVATION.reserve()
        if why and self._lines.may_tell(why):
            self._tell({why: 1})

    def _tell(self, untold: Mapping[str, int]) -> None:
        for why, count in untold.items():
            said = files.no_descriptor() if why == "EMFILE" else os.strerror(getattr(errno, why, 0))
            _log.error("connections that could not be accepted: {count}: {said}", count=count, said=said)
