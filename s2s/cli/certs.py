"""``s2s certs``: a private certificate authority for links over TLS."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click
from twisted.internet.endpoints import quoteStringArgument

from s2s.cli.common import one_line_errors
from s2s.roles import certs


@click.group("certs")
def group() -> None:
    """Make certificates for links over TLS."""


@group.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="NAME_OR_IP",
    help="A host name or IP address of a server; may be repeated.",
)
@click.option("--engine", "engines", multiple=True, metavar="NAME", help="The name of an engine; may be repeated.")
@click.option(
    "--days", type=click.IntRange(1, 3650), default=825, show_default=True, help="Days for which they are valid."
)
@click.option("--renew", is_flag=True, help="Replace the certificates and keys that exist.")
@one_line_errors
def make(directory: Path, servers: tuple[str, ...], engines: tuple[str, ...], days: int, renew: bool) -> None:
    """Make certificates in DIR, signed by the authority in DIR, which is made if DIR has none."""
    directory = directory.absolute()
    made = certs.make(directory, servers, engines, days, datetime.now(timezone.utc), renew=renew)
    # Twisted's tls: endpoint accepts no IPv6 address.
    host = next((name for name in servers if ":" not in name), "SERVER")
    for file in made:
        click.echo(f"made {file}")
        key, roots = file.with_suffix(".key"), directory / certs.ROOTS
        if file.name == "server.pem":
            said = _endpoint("ssl", "4321", privateKey=key, certKey=file, trustRoots=roots)
            click.echo(f"  twistd s2s-server --listen '{said}'")
        else:
            said = _endpoint("tls", host, "4321", certificate=file, privateKey=key, trustRoots=roots)
            click.echo(f"  twistd s2s-engine --connect '{said}'")


def _endpoint(*alone: str, **named: Path) -> str:
    """Return one of Twisted's endpoint strings."""
    quoted = [quoteStringArgument(each) for each in alone]
    return ":".join([*quoted, *(f"{name}={quoteStringArgument(str(path))}" for name, path in named.items())])
