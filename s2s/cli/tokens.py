"""``s2s tokens``: access to the HTTP API (docs/api.rst, "Tokens")."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from s2s.cli.common import database_options, json_option, one_line_errors, show, transaction
from s2s.errors import OperatorError
from s2s.store.access import ACCESS, NAME, Access
from s2s.store.tables import tokens


@click.group("tokens")
def group() -> None:
    """Make, list and revoke the tokens of the HTTP API."""


@group.command()
@click.argument("name", required=False)
@click.option(
    "--role",
    type=click.Choice(ACCESS),
    required=True,
    help="observer: read; operator: control, too; admin: change settings and the world, too.",
)
@click.option("--note", default="", help="A remark for people.")
@click.option(
    "--days", type=click.IntRange(1, 3650), help="Days for which it is valid; without the option it does not expire."
)
@click.option(
    "--to",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to a new file that only you can read.",
)
@database_options
@json_option
@one_line_errors
def add(
    name: str | None,
    role: Access,
    note: str,
    days: int | None,
    path: Path | None,
    database: str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Make a token called NAME, and print it once: only its hash is stored.

    Without NAME a name is made. The audit log names the token as the actor.
    """
    name = name or f"{role}-{secrets.token_hex(4)}"
    if not NAME.fullmatch(name):
        raise OperatorError(f"the name {name!r} cannot be used: take 1 to 64 of A-Z a-z 0-9 _ . -")
    with _new_file(path) as write, transaction(database, state_dir) as txn:
        token = tokens.add(txn, name, role, note, days)
        write(token)
    if as_json:
        told = {"name": name, "role": role, **({"token": token} if path is None else {"token_file": str(path)})}
        click.echo(json.dumps(told, indent=2))
    elif path is None:
        click.echo(f"the token {name} is shown this once:", err=True)
        click.echo(token)
    else:
        click.echo(f"the token {name} is in {path}")


@contextmanager
def _new_file(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Create a file that only its owner can read, and yield a function that writes a line to it; remove it on failure.

    :raises OperatorError: the file cannot be written, or exists.
    """
    if path is None:
        yield lambda _: None
        return

    def write(line: str) -> None:
        with _told(path):
            left = f"{line}\n".encode()
            while left:
                left = left[os.write(descriptor, left) :]

    with _told(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield write
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OperatorError(f"the token file {path} cannot be written, {error.strerror}: name another one") from None


@group.command(name="list")
@database_options
@json_option
@one_line_errors
def list_(database: str | None, state_dir: Path, as_json: bool) -> None:
    """List the tokens without their secrets."""
    with transaction(database, state_dir) as txn:
        found = tokens.list_public(txn)
    columns = ("name", "role", "is_expired", "expires_at", "created_at", "created_by", "note")
    show(found, columns, as_json, "there are no tokens: make one with: s2s tokens add NAME --role observer")


@group.command()
@click.argument("name")
@database_options
@json_option
@one_line_errors
def revoke(name: str, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Revoke the token called NAME. Servers refuse it at once."""
    with transaction(database, state_dir) as txn:
        if not tokens.revoke(txn, name):
            raise OperatorError(f"there is no token {name!r}: see them with: s2s tokens list")
    click.echo(json.dumps({"name": name, "revoked": True}) if as_json else f"the token {name} is revoked")
