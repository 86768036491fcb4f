"""``s2s plugins``: the command types and jobs that are installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from s2s.cli.common import json_option, show
from s2s.handlers import commands, jobs
from s2s.handlers.discovery import discover


@dataclass(frozen=True)
class _Row:
    kind: str
    name: str
    source: str
    schedule: str | None = None


@click.group()
def plugins() -> None:
    """Look at the command types and jobs that are installed."""


@plugins.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List command types and jobs, and what is wrong with those that are left out."""
    found = discover()
    rows = [
        *(_Row("command", name, _source(kind, commands.BUILTIN)) for name, kind in found.commands.items()),
        *(_Row("job", name, _source(kind, jobs.BUILTIN), kind.schedule) for name, kind in found.jobs.items()),
    ]
    show(rows, ("kind", "name", "source", "schedule"), as_json, "there are none")
    for complaint in found.complaints:
        click.echo(complaint, err=True)


def _source(kind: object, builtin: tuple[Any, ...]) -> str:
    """Return the module that defines a plug-in; for the bundled ones, the name of the package."""
    return "s2s" if any(kind is one for one in builtin) else type(kind).__module__
