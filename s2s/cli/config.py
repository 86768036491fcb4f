"""``s2s config``: the settings of a running link (docs/protocol.rst, "Configuration")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click

from s2s.cli.common import (
    actor,
    database_options,
    json_option,
    limit_option,
    one_line_errors,
    read_as,
    show,
    transaction,
)
from s2s.errors import OperatorError
from s2s.store import config as table

_WANTED: Final = {"boolean": "true or false", "integer": "a whole number"}


@click.group()
def config() -> None:
    """Look at and change the settings, of which every process is told at once."""


@config.command(name="list")
@database_options
@json_option
@one_line_errors
def list_(database: str | None, state_dir: Path, as_json: bool) -> None:
    """List the settings with their bounds."""
    with transaction(database, state_dir) as txn:
        found = table.list_settings(txn)
    show(found, ("key", "value", "min", "max", "version", "description"), as_json, "there are no settings")


@config.command(name="set")
@click.argument("key")
@click.argument("value")
@database_options
@json_option
@one_line_errors
def set_(key: str, value: str, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Set KEY to VALUE. Every process uses it at once and says so in its log."""
    with transaction(database, state_dir) as txn:
        types = {row.key: row.type for row in table.list_settings(txn)}
        if key not in types:
            raise OperatorError(f"there is no setting {key!r}: see them with: s2s config list")
        wanted = read_as(types[key], value)
        if wanted is None:
            raise OperatorError(f"{key} is {_WANTED[types[key]]}, not {value!r}")
        version = table.change(txn, key, wanted, actor())
        in_force = table.read(txn).version
    if as_json:
        click.echo(json.dumps({"key": key, "value": wanted, "version": in_force, "changed": version is not None}))
    elif version is None:
        click.echo(f"{key} is {value} already")
    else:
        click.echo(f"{key} is {value}, version {version}")


@config.command()
@click.option("--key", help="Only of this setting.")
@limit_option
@database_options
@json_option
@one_line_errors
def history(key: str | None, limit: int, database: str | None, state_dir: Path, as_json: bool) -> None:
    """List the changes, the newest first."""
    with transaction(database, state_dir) as txn:
        found = table.history(txn, key, limit)
    columns = ("version", "key", "old_value", "new_value", "actor", "changed_at")
    show(found, columns, as_json, "nothing was ever changed")
