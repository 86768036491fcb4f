"""``s2s audit``: the actions, their actors and their results (docs/protocol.rst, "Audit")."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import click

from s2s.admin.operations import lists
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import before_option, json_option, limit_option, show, words
from s2s.store.tables.audit import Entry


@dataclass(frozen=True)
class _Line:
    """An audit entry as a terminal line."""

    audit_id: int
    at: datetime
    actor: str
    action: str
    told: str


@click.command()
@click.option("--actor", help="Show only actions of this actor, such as cli:alice or key:k1.")
@click.option("--action", help="Show only this action, such as config.set or s2s.engine.pause.")
@click.option("--subject", help="Show only actions on this order, setting, key or engine.")
@before_option("AUDIT_ID")
@limit_option
@with_backend
@json_option
def audit(
    backend: Backend,
    actor: str | None,
    action: str | None,
    subject: str | None,
    before: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the actions with their actors and results, the newest first. No role can change or remove an entry."""
    found = rows(backend, lists.AUDIT, limit, actor=actor, action=action, subject=subject, before=before)
    lines = found if as_json else [_line(entry) for entry in found]
    show(lines, ("audit_id", "at", "actor", "action", "told"), as_json, "there is nothing in the audit")


def _line(entry: Entry) -> _Line:
    return _Line(entry.audit_id, entry.at, entry.actor, entry.action, _told(entry))


def _told(entry: Entry) -> str:
    """Return the subject, the parameters and the result of an action."""
    done = " ".join(filter(None, (entry.subject, words(entry.params))))
    return done if entry.result is None else f"{done} -> {words(entry.result)[1:-1]}"
