"""``twistd s2s-server``."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger

from s2s.discovery import discover
from s2s.endpoints import server_endpoint
from s2s.executor import Executor
from s2s.inbox import Inbox
from s2s.options import LISTEN, RoleOptions, between, make_basis, or_refuse, parameter
from s2s.server import Server

#: Connections beside those of the executor's workers: inbox, keys and configuration, steering.
_THREADS = 3

_log = Logger()


class Options(RoleOptions):
    """The server's options."""

    process_name = "s2s-server"
    endpoint = ("listen", server_endpoint, LISTEN)
    optParameters = [
        parameter("listen", LISTEN, "endpoint that engines connect to"),
        parameter("executor-workers", 2, "batches of commands that run at once, 0 to 32; 0: none here"),
    ]
    coercions = {"executor-workers": between(0, 32)}


def makeService(options: Options) -> Any:
    """Make the server's service; nothing is connected before it starts."""
    return or_refuse(lambda: _make(options))


def _make(options: Options) -> Any:
    workers = options["executor-workers"]
    basis, endpoint = make_basis(options, "server", "server", _THREADS + workers)
    found = discover()
    for complaint in found.complaints:
        _log.error("{complaint}", complaint=complaint)
    executor = Executor(
        basis.database, found.commands, basis.identity.boot_id, workers=workers, clock=basis.clock.scheduler
    )
    inbox = Inbox(basis.database, found.commands, executor.wake, basis.counters)
    return Server(basis, endpoint, options["listen"], inbox, executor)
