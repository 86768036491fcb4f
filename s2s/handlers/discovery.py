"""Command types and jobs: the built-in ones, and those that other distributions put into :mod:`s2s.plugins`.

The modules are found as Twisted's own ``getPlugins`` finds them, but not by it: that writes a cache file beside every
plug-in, and tells of a broken one by a traceback.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twisted.plugin import IPlugin
from twisted.python.modules import getModule
from zope.interface.verify import verifyObject

from s2s import plugins
from s2s.errors import OperatorError
from s2s.handlers import commands, jobs
from s2s.handlers.commands import CommandHandler, ICommandHandler
from s2s.handlers.import_timer import TooLong, bounded
from s2s.handlers.jobs import IJob, Job
from s2s.protocol.catalogue.schema import Schema

#: Characters of a complaint: so many of its beginning, which names the plug-in, and of its end, which names the cure.
_HEAD: Final = 200
_TAIL: Final = 95


@dataclass(frozen=True)
class Found:
    """What there is.

    :param commands: the command types by name, the built-in ones first.
    :param jobs: the jobs by name, the built-in ones first.
    :param complaints: a line for each plug-in that is left out: which, what is wrong, what to do.
    """

    commands: Mapping[str, CommandHandler]
    jobs: Mapping[str, Job]
    complaints: Sequence[str]


def discover(
    command_types: Iterable[CommandHandler] = commands.BUILTIN, job_types: Iterable[Job] = jobs.BUILTIN
) -> Found:
    """Load every plug-in, in the order of their modules' names. A broken one stops no other.

    :param command_types: the built-in ones; no plug-in takes the name of one.
    :param job_types: likewise.
    """
    found_commands, found_jobs = commands.registry(command_types), jobs.registry(job_types)
    complaints: list[str] = []
    names: list[str] = []
    with _left_out(f"directory of {plugins.__name__}", complaints):  # one that may not be read
        names.extend(module.name for module in getModule(plugins.__name__).iterModules())
        complaints.extend(_line(f"plug-in {path} is left out: {why}") for path, why in _passed_over())
    for name in sorted(names):
        # What a plug-in prints is no part of a command's output. Its own code are also the text of its exception, the
        # properties of its members, such as a schema, and what says that they are plug-ins.
        with (
            redirect_stdout(sys.stderr),
            _left_out(name, complaints),
            bounded(name),
            _left_out(name, complaints),
        ):
            module = importlib.import_module(name)
            for attribute, value in list(vars(module).items()):
                with _left_out(f"{name}.{attribute}", complaints):
                    if _is_new(value, ICommandHandler, found_commands):
                        _check(value)
                        found_commands = commands.registry([*found_commands.values(), value])
                    if _is_new(value, IJob, found_jobs):
                        found_jobs = jobs.registry([*found_jobs.values(), value])
    return Found(found_commands, found_jobs, complaints)


@functools.cache
def installed() -> Found:
    """Return what :func:`discover` finds, which loads every plug-in, at the first call in this process."""
    return discover()


def _passed_over() -> Iterator[tuple[Path, str]]:
    """Yield what the search passes over without a word, and why."""
    for place in plugins.__path__:
        for path in sorted(Path(place).glob("*.py")):
            if not path.stem.isidentifier():
                yield path, "its name is none of a Python module: rename it, with _ in place of what is no letter"
    for entry in sys.path:
        directory = Path(entry, *plugins.__name__.split("."))
        # Another copy of s2s has nothing else there.
        if str(directory) not in plugins.__path__ and {each.name for each in directory.glob("*.py")} > {"__init__.py"}:
            yield directory, "it has an __init__.py: remove that file"


def _is_new(value: Any, interface: Any, known: Mapping[str, Any]) -> bool:
    """Whether it is a plug-in of this kind that was not seen under another name.

    :raises zope.interface.Invalid: it is one that does not keep what the interface promises.
    """
    # Not "in": that would ask the plug-in whether it is equal.
    if not interface.providedBy(value) or any(value is one for one in known.values()):
        return False
    return bool(verifyObject(IPlugin, value) and verifyObject(interface, value))


def _check(kind: CommandHandler) -> None:
    """Refuse a schema of anything but objects, which no push could satisfy, and an async handler, which never runs."""
    schema = kind.schema
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise OperatorError('its schema is not one of an object: write a JSON Schema with "type": "object"')
    Schema(schema)
    for method in (kind.run, kind.run_batch):
        if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
            raise OperatorError(
                f"its {method.__name__}() is async or a generator, and runs in a thread: write a plain one"
            )


@contextmanager
def _left_out(where: str, complaints: list[str]) -> Iterator[None]:
    """Make a complaint of whatever is raised inside."""
    try:
        yield
    except (KeyboardInterrupt, TooLong):
        raise
    except OperatorError as error:
        complaints.append(_line(f"plug-in {where} is left out: {error}"))
    except BaseException as error:  # a plug-in may well call sys.exit() where it is imported
        said = f"plug-in {where} is left out: {type(error).__name__}: {_first_paragraph(error)}"
        complaints.append(_line(f"{said}: mend it, or uninstall what it came with"))


def _first_paragraph(error: BaseException) -> str:
    """Say what an exception says; in further paragraphs a validator quotes all that it knows."""
    try:
        return str(error).partition("\n\n")[0]
    except Exception:  # the exception is the plug-in's own, or quotes one of its objects
        return "it does not say why"


def _line(text: str) -> str:
    """Make one line that a log and a terminal can bear; of a long one its middle is left out."""
    line = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return line if len(line) <= _HEAD + 5 + _TAIL else f"{line[:_HEAD]} ... {line[-_TAIL:]}"
