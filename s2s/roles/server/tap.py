"""The twistd plug-in of ``twistd s2s-server``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from s2s.admin.http.service import POOL_THREADS
from s2s.errors import DatabaseError
from s2s.handlers.commands import CommandHandler
from s2s.roles import descriptors
from s2s.roles.endpoints import server_endpoint
from s2s.roles.options import HTTP, LISTEN, RoleOptions, between, make_deps, or_refuse, parameter
from s2s.roles.preflight import LOOK_S, when_ready
from s2s.roles.server.executor import Executor
from s2s.roles.server.inbox import Inbox
from s2s.roles.server.served_types import LiveServedTypes, texts
from s2s.roles.server.service import ListenSpec, Server
from s2s.store.pool import blocking
from s2s.store.tables import command_types

#: Database connections besides those of handlers: four for the inbox, claims, keys, configuration and control requests,
#: and those of the HTTP API.
_THREADS = 4 + POOL_THREADS
#: The option value that disables an endpoint.
_OFF = "off"


def _unless_off(reactor: Any, description: str) -> Any:
    return None if description == _OFF else server_endpoint(reactor, description)


def _hosts(text: str) -> list[str]:
    hosts = [host.strip() for host in text.split(",") if host.strip()]
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,253}", host):
            raise ValueError(f"{host!r} is no host name: write names without ports, such as s2s.example")
    return hosts


class Options(RoleOptions):
    """The server's options."""

    process_name = "s2s-server"
    endpoints = (("listen", server_endpoint, LISTEN), ("http", _unless_off, HTTP))
    optParameters = [
        parameter("listen", LISTEN, "endpoint that engines connect to"),
        parameter("http", HTTP, "endpoint of the HTTP API, or off"),
        parameter(
            "http-hosts", "", "names by which clients may call the HTTP API, beside localhost: a.example,b.example"
        ),
        parameter("executor-workers", 2, "batches of commands that run at once, 0 to 32; 0: none here"),
    ]
    coercions = {"executor-workers": between(0, 32), "http-hosts": _hosts}


def makeService(options: Options) -> Any:
    """Create the server's service. It opens no endpoint before it starts."""
    return or_refuse(lambda: _make(options))


def _make(options: Options) -> Any:
    descriptors.allow()
    workers = options["executor-workers"]
    deps, [listen, http] = make_deps(options, "server", "server", _THREADS, workers)
    descriptors.watch(deps.clock.scheduler)
    served = deps.plugins.commands
    executor = Executor(
        deps.database,
        deps.handlers,
        served,
        deps.identity.boot_id,
        workers=workers,
        clock=deps.clock.scheduler,
    )
    types = LiveServedTypes(deps.database, deps.clock, served, _declare(deps.url, served))
    inbox = Inbox(deps.database, served, executor.wake, deps.counters, types=types)
    return Server(
        deps,
        ListenSpec(listen, options["listen"], "listen"),
        inbox,
        executor,
        http and ListenSpec(http, options["http"], "http"),
        options["http-hosts"],
        types,
    )


def _declare(url: str, served: Mapping[str, CommandHandler]) -> dict[str, str]:
    """Declare the command types and read the known ones, before the server accepts anything.

    The server also starts if the database accepts no writes yet; it then declares the types later.
    """
    with suppress(DatabaseError), blocking(url, within_s=LOOK_S) as txn:
        command_types.declare(txn, texts(served))
    return when_ready(lambda: _known(url))


def _known(url: str) -> dict[str, str]:
    with blocking(url, within_s=LOOK_S) as txn:
        return command_types.read(txn)
