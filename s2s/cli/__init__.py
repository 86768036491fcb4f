"""The ``s2s`` command.

Each group of commands has one module.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from s2s import __version__
from s2s.cli.audit import audit
from s2s.cli.broadcast import broadcast
from s2s.cli.certs import group as certs
from s2s.cli.commands import group as commands
from s2s.cli.config import group as config
from s2s.cli.db import db
from s2s.cli.engine import engine
from s2s.cli.jobs import jobs
from s2s.cli.keys import group as keys
from s2s.cli.notices import group as notices
from s2s.cli.order import order
from s2s.cli.outbox import group as outbox
from s2s.cli.plugins import plugins
from s2s.cli.tokens import group as tokens
from s2s.cli.up import up
from s2s.cli.world import world
from s2s.runtime import files, signals, streams

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

#: The errors of a write to a full disk, to a reader or a terminal that is gone, or to a closed stream.
_UNWRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE, errno.EIO, errno.EBADF)


class _Program(click.Group):
    """The console script, which exits with an error line and a code even if its output cannot be written."""

    _is_terminated = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run as the process's main program; tests call :meth:`main`."""
        signals.reset()
        # Process 1 of a container does not receive a signal that it does not handle.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)
        if "stdout" in streams.prepare():
            print("Error: stdout is closed: open it, such as by >/dev/null", file=sys.stderr)
            code: Any = 1
        elif wrong := streams.not_utf8():
            print(f"Error: an argument or a variable is not UTF-8: {wrong}: use a UTF-8 terminal", file=sys.stderr)
            code = 1
        else:
            try:
                code = self.main(*args, **options)
            except SystemExit as end:
                code = end.code
            except OSError as error:
                if not _is_of_output(error):
                    raise
                # Shell completion failed to write, or even the error line could not be written.
                streams.say(f"Error: {_unwritten(error)}")
                code = 1
        if not streams.abandon(sys.stdout):
            code = code or 1
        streams.abandon(sys.stderr)
        if self._is_terminated:
            # End by the signal itself, so that the parent sees it. Process 1 ignores it and continues to its exit.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            code = 128 + signal.SIGTERM
        # Skip Python's own exit, which would wait for the threads and atexit functions that a plug-in has left behind.
        os._exit(code if isinstance(code, int) else bool(code))

    def _terminate(self, _: int, __: object) -> None:
        self._is_terminated = True
        raise KeyboardInterrupt

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the arguments, or print the help."""
        with _writing():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _writing():
            return super().invoke(ctx)


def _is_of_output(error: OSError) -> bool:
    return error.errno in _UNWRITABLE and error.filename is None


def _unwritten(error: OSError) -> str:
    return f"the output cannot be written, {error.strerror}: the command may be done: look before it is repeated"


@contextmanager
def _writing() -> Iterator[None]:
    """Report in one line that the output cannot be written, or that the working directory was removed."""
    try:
        yield
    except OSError as error:
        if not files.is_here():
            raise click.ClickException("the working directory was removed: change to another one") from None
        if not _is_of_output(error):
            raise
        streams.abandon(sys.__stdout__)
        raise click.ClickException(_unwritten(error)) from None


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="s2s")
def main() -> None:
    """Run and operate an s2s link: a signed, durable connection of a server and an engine."""


for _command in COMMANDS:
    main.add_command(_command)
