"""``s2s notices``: what players were told."""

from __future__ import annotations

import click

from s2s.cli.common import before_option, json_option, limit_option, show
from s2s.cli.door import Door, rows, with_door
from s2s.operations import notices as operations


@click.group()
def notices() -> None:
    """Look at the notices that the players were given."""


@notices.command(name="list")
@before_option("NOTICE_ID")
@limit_option
@with_door
@json_option
def list_(door: Door, before: int | None, limit: int, as_json: bool) -> None:
    """List notices, the newest first."""
    found = rows(door, operations.LIST, limit, before=before)
    show(found, ("notice_id", "scope", "severity", "message", "created_at"), as_json, "there are no notices")
