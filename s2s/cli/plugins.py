"""``s2s plugins``: the plug-ins that are installed."""

from __future__ import annotations

from dataclasses import dataclass

import click

from s2s.cli.common import json_option, show, world_option
from s2s.handlers.discovery import KINDS, WORLD, discover
from s2s.handlers.jobs import Job


@dataclass(frozen=True)
class _Row:
    """One plug-in.

    :param source: the module of its class, or the module that declares it; ``s2s`` for a built-in plug-in.
    :param replaces: the package with a plug-in of the same name, which this one replaces.
    """

    kind: str
    name: str
    source: str
    replaces: str | None
    schedule: str | None


@click.group()
def plugins() -> None:
    """List the installed command types, jobs, orders, reports, settings and migrations."""


@plugins.command(name="list")
@world_option
@json_option
def list_(no_world: bool, as_json: bool) -> None:
    """List the plug-ins, and the error of each that is left out; exit 1 if there is any."""
    found = discover(not no_world)
    rows = [
        _Row(
            kind.noun,
            name,
            found.sources.get((member, name), "s2s"),
            WORLD if (member, name) in found.replaced else None,
            value.schedule if isinstance(value, Job) else None,
        )
        for member, kind in KINDS.items()
        for name, value in getattr(found, member).items()
        # s2s config list shows the settings of s2s itself.
        if member != "settings" or (member, name) in found.sources
    ]
    show(rows, ("kind", "name", "source", "replaces", "schedule"), as_json, "there are none")
    for complaint in found.complaints:
        click.echo(complaint, err=True)
    if found.complaints:
        raise SystemExit(1)
