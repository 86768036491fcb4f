"""The console script ``s2s``: one module for each group of commands, listed in :data:`COMMANDS`."""

from __future__ import annotations

import click

from s2s import __version__
from s2s.cli.audit import audit
from s2s.cli.broadcast import broadcast
from s2s.cli.certs import certs
from s2s.cli.commands import commands
from s2s.cli.config import config
from s2s.cli.db import db
from s2s.cli.engine import engine
from s2s.cli.jobs import jobs
from s2s.cli.keys import keys
from s2s.cli.notices import notices
from s2s.cli.order import order
from s2s.cli.outbox import outbox
from s2s.cli.plugins import plugins
from s2s.cli.tokens import tokens
from s2s.cli.up import up
from s2s.cli.world import world

COMMANDS = (
    up,
    engine,
    order,
    jobs,
    world,
    broadcast,
    notices,
    commands,
    outbox,
    config,
    keys,
    tokens,
    audit,
    certs,
    plugins,
    db,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="s2s")
def main() -> None:
    """Run and look after an s2s link: a signed, durable connection of a server and an engine."""


for _command in COMMANDS:
    main.add_command(_command)
