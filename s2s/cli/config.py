"""``s2s config``: the settings of a running link (docs/protocol.rst, "Configuration")."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Final

import click

from s2s.admin.operations import config
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import ALL, before_option, json_option, limit_option, show
from s2s.errors import NotFound, OperatorError, Refused
from s2s.protocol.settings import Value, read_as

_WANTED: Final = {"boolean": "true or false", "integer": "a whole number"}


@click.group("config")
def group() -> None:
    """List and change the settings. Every process uses a change at once."""


@group.command(name="list")
@with_backend
@json_option
def list_(backend: Backend, as_json: bool) -> None:
    """List the settings with their bounds."""
    found = rows(backend, config.LIST, ALL)
    lines = found if as_json else [replace(row, value=_text(row.value)) for row in found]
    show(lines, ("key", "value", "min", "max", "version", "description"), as_json, "there are no settings")


def _text(value: Value) -> str:
    """Write a value as ``s2s config set`` takes it."""
    return value or "(empty)" if isinstance(value, str) else json.dumps(value)


@group.command(name="set")
@click.argument("key")
@click.argument("value")
@with_backend
@json_option
def set_(backend: Backend, key: str, value: str, as_json: bool) -> None:
    """Set KEY to VALUE. Every process uses it at once, and logs it."""
    try:
        kind = backend.call(config.SHOW, path_params={"key": key}).type
        wanted = read_as(kind, value)
        if wanted is None:
            raise OperatorError(f"{key} is {_WANTED[kind]}, not {value!r}")
        found = backend.call(config.SET, path_params={"key": key}, body={"value": wanted})
    except Refused as error:
        if error.code == NotFound.code:
            raise OperatorError(f"there is no setting {key!r}: see them with: s2s config list") from None
        raise OperatorError(error.message) from None
    if as_json:
        told = {"key": key, "value": wanted, "version": found.version, "changed": found.changed}
        click.echo(json.dumps(told))
    elif found.changed:
        click.echo(f"{key} is {_text(wanted)}, version {found.version}")
    else:
        click.echo(f"{key} is {_text(wanted)} already")
    if found.hint:
        click.echo(found.hint, err=True)


@group.command()
@click.option("--key", help="Show only changes of this setting.")
@before_option("VERSION")
@limit_option
@with_backend
@json_option
def history(backend: Backend, key: str | None, before: int | None, limit: int, as_json: bool) -> None:
    """List the changes, the newest first."""
    found = rows(backend, config.HISTORY, limit, key=key, before=before)
    columns = ("version", "key", "old_value", "new_value", "actor", "changed_at")
    show(found, columns, as_json, "nothing was ever changed")
