"""``twistd s2s-server``."""

from __future__ import annotations

from typing import Any

from twisted.internet.endpoints import serverFromString

from s2s.commands import BUILTIN, registry
from s2s.executor import Executor
from s2s.inbox import Inbox
from s2s.keys import LiveKeys
from s2s.options import LISTEN, Foundation, RoleOptions, between, or_refuse, parameter
from s2s.server import Server

#: Connections beside those of the executor's workers: inbox, keys, and one to spare.
_THREADS = 3


class Options(RoleOptions):
    """The server's options."""

    process_name = "s2s-server"
    endpoint = ("listen", serverFromString, LISTEN)
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
    base = Foundation(options, "server", "server", _THREADS + workers)
    types = registry(BUILTIN)
    executor = Executor(base.database, types, base.identity.boot_id, workers=workers, clock=base.reactor)
    inbox = Inbox(base.database, types, executor.wake)
    live_keys = LiveKeys(base.database, base.clock, base.rows)
    return Server(
        base.endpoint,
        options["listen"],
        base.identity,
        base.bounds,
        base.database,
        live_keys,
        inbox,
        executor,
        base.url,
        base.clock,
    )
