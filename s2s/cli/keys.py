"""``s2s keys``: the signing keys in the table s2s_keys (docs/protocol.rst, "Keys")."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from s2s.admin.operations import lists
from s2s.cli.backend import Backend, rows, with_backend
from s2s.cli.common import ALL, database_options, json_option, one_line_errors, show, transaction
from s2s.errors import OperatorError
from s2s.protocol.signing import KEY_ID, KEY_ROLES, decode_secret, random_secret
from s2s.runtime import files
from s2s.store.driver import Cursor
from s2s.store.tables import keys, rotation


@click.group("keys")
def group() -> None:
    """Make, list, activate and retire the signing keys."""


@group.command()
@click.option("--key-id", required=True, metavar="ID", help="1 to 64 of A-Z a-z 0-9 _ . -")
@click.option("--role", type=click.Choice(KEY_ROLES), required=True, help="The role whose messages it may sign.")
@click.option(
    "--secret-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the secret in base64, at least 32 bytes; without the option a random secret is made.",
)
@click.option("--note", default="", help="A remark for people.")
@click.option("--show-secret", is_flag=True, help="Print the secret, for a peer that does not share this database.")
@database_options
@json_option
@one_line_errors
def add(
    key_id: str,
    role: str,
    secret_file: Path | None,
    note: str,
    show_secret: bool,
    database: str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Add a key.

    It verifies from now on, and signs when it is activated. The first key of a role signs at once.
    """
    if not KEY_ID.fullmatch(key_id):
        raise OperatorError(f"the key id {key_id!r} cannot be used: take 1 to 64 of A-Z a-z 0-9 _ . -")
    secret = random_secret() if secret_file is None else _read_secret(secret_file)
    with transaction(database, state_dir, "keys.add") as txn:
        keys.add(txn, key_id, secret, role, note)
    told = {"key_id": key_id, "role": role, **({"key_b64": secret} if show_secret else {})}
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(f"added key {key_id} for {role}")
        if show_secret:
            click.echo(secret)


def _read_secret(path: Path) -> str:
    # Programs such as openssl break long base64 texts into lines.
    lines = files.read_text(path, "the secret file").split()
    secret = "".join(lines)
    try:
        decode_secret(secret)
    except ValueError as error:
        many = f" (its {len(lines)} lines count as one secret)" if len(lines) > 1 else ""
        raise OperatorError(f"the secret file {path} cannot be used: {error}{many}") from None
    return secret


@group.command(name="list")
@with_backend
@json_option
def list_(backend: Backend, as_json: bool) -> None:
    """List the keys and the current use of each, without their secrets."""
    found = rows(backend, lists.KEYS, ALL)
    columns = ("key_id", "role", "status", "active_from", "active_to", "note")
    show(found, columns, as_json, "there are no keys: make one with: s2s keys add --key-id ID --role any")


@group.command()
@click.argument("key_id")
@database_options
@json_option
@one_line_errors
def activate(key_id: str, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Sign with this key from now on.

    The key that signed before still verifies: retire it next.
    """
    _take("keys.activate", rotation.activate, key_id, database, state_dir, as_json)


@group.command()
@click.argument("key_id")
@database_options
@json_option
@one_line_errors
def retire(key_id: str, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Stop signing with this key.

    It verifies for 60 s more, so that messages on their way are accepted.
    """
    _take("keys.retire", rotation.retire, key_id, database, state_dir, as_json)


@group.command()
@click.argument("key_id")
@database_options
@json_option
@one_line_errors
def revoke(key_id: str, database: str | None, state_dir: Path, as_json: bool) -> None:
    """Revoke a key at once, such as a stolen one.

    It neither signs nor verifies, and the links whose peers signed with it close.
    """
    _take("keys.revoke", rotation.revoke, key_id, database, state_dir, as_json)


def _take(
    action: str,
    step: Callable[[Cursor, str], rotation.Change],
    key_id: str,
    database: str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    with transaction(database, state_dir, action) as txn:
        change = step(txn, key_id)
    click.echo(json.dumps(asdict(change), indent=2) if as_json else change.text)
    if change.warning is not None:
        click.echo(f"warning: {change.warning}", err=True)
