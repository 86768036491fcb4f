"""s2s: a signed, durable link between a player-facing server and a simulation engine.

The names of this package are those that the authors of plug-ins need (docs/plugins.rst).
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from s2s.errors import BadPayload as BadPayload
    from s2s.errors import NotFound as NotFound
    from s2s.errors import WireError as WireError
    from s2s.handlers.commands import BatchCommandHandler as BatchCommandHandler
    from s2s.handlers.commands import Command as Command
    from s2s.handlers.commands import CommandHandler as CommandHandler
    from s2s.handlers.jobs import Job as Job
    from s2s.handlers.jobs import JobRun as JobRun
    from s2s.handlers.orders import OrderHandler as OrderHandler
    from s2s.handlers.orders import OrderRun as OrderRun
    from s2s.handlers.report import Report as Report
    from s2s.handlers.run import Outcome as Outcome
    from s2s.handlers.run import Unfinished as Unfinished
    from s2s.protocol.settings import Setting as Setting
    from s2s.store.access import Access as Access
    from s2s.store.driver import Cursor as Cursor
    from s2s.store.migrations import Migrations as Migrations

__version__ = version("txs2s")

#: The module of each public name. A name is imported when it is first used: the parts of this package import the
#: package first, and most programs need few of its names.
_HOMES: Final = {
    "Access": "s2s.store.access",
    "BadPayload": "s2s.errors",
    "BatchCommandHandler": "s2s.handlers.commands",
    "Command": "s2s.handlers.commands",
    "CommandHandler": "s2s.handlers.commands",
    "Cursor": "s2s.store.driver",
    "Job": "s2s.handlers.jobs",
    "JobRun": "s2s.handlers.jobs",
    "Migrations": "s2s.store.migrations",
    "NotFound": "s2s.errors",
    "OrderHandler": "s2s.handlers.orders",
    "OrderRun": "s2s.handlers.orders",
    "Outcome": "s2s.handlers.run",
    "Report": "s2s.handlers.report",
    "Setting": "s2s.protocol.settings",
    "Unfinished": "s2s.handlers.run",
    "WireError": "s2s.errors",
}
__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - the values are strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
