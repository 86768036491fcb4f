"""The twistd plug-in of ``twistd s2s-engine``."""

from __future__ import annotations

import re
import socket
from typing import Any

from s2s.roles.endpoints import client_endpoint
from s2s.roles.engine import order_runner, scheduler
from s2s.roles.engine.relay import Relay
from s2s.roles.engine.service import Engine
from s2s.roles.options import CONNECT, RoleOptions, make_deps, or_refuse, parameter

#: Database connections besides those of jobs and orders: for relay, sweep, keys and configuration, audit, and polling.
_THREADS = 5


def _name(text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,200}", text):
        raise ValueError("a name has 1 to 200 printable ASCII characters and no space")
    return text


class Options(RoleOptions):
    """The engine's options."""

    process_name = "s2s-engine"
    endpoints = (("connect", client_endpoint, CONNECT),)
    optParameters = [
        parameter("connect", CONNECT, "endpoint of the server"),
        parameter("name", f"engine-{socket.gethostname()}"[:200], "name of this engine for operators"),
    ]
    coercions = {"name": _name}


def makeService(options: Options) -> Any:
    """Create the engine's service. It connects to no server before it starts."""
    return or_refuse(lambda: _make(options))


def _make(options: Options) -> Any:
    deps, [endpoint] = make_deps(options, "engine", options["name"], _THREADS, scheduler.LINES + order_runner.LINES)
    return Engine(deps, endpoint, options["connect"], Relay(deps.database, deps.clock))
