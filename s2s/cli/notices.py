"""``s2s notices``: notices to the players."""

from __future__ import annotations

import click

from s2s.admin.operations import notices
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import before_option, json_option, limit_option, show


@click.group("notices")
def group() -> None:
    """List the notices to the players."""


@group.command(name="list")
@before_option("NOTICE_ID")
@limit_option
@with_backend
@json_option
def list_(backend: Backend, before: int | None, limit: int, as_json: bool) -> None:
    """List notices, the newest first."""
    found = rows(backend, notices.LIST, limit, before=before)
    show(found, ("notice_id", "scope", "severity", "message", "created_at"), as_json, "there are no notices")
