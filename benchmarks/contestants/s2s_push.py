"""Our durable push: a real server, which answers after the COMMIT and runs no commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.contestants import _link
from benchmarks.load import Load, Meter, Place
from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.roles.shutdown import STOP_WITH_STDIN

TWISTD = str(Path(sys.executable).with_name("twistd"))


def serve(place: Place) -> None:
    """Replace this process by the server, with its executor off."""
    become("s2s-server", place, "--listen", f"tcp:{place.port}:interface=127.0.0.1", "--http", "off",
           "--executor-workers", "0")  # fmt: skip


def become(role: str, place: Place, *options: str) -> None:
    """Replace this process by a role, which ends when stdin ends."""
    os.environ |= {DATABASE_VARIABLE: place.url, STOP_WITH_STDIN: "1"}
    os.execv(TWISTD, [TWISTD, "--nodaemon", "--pidfile=", "--logfile=/dev/null", role, *options])  # noqa: S606


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Push."""
    _link.drive(place, load, meter)
