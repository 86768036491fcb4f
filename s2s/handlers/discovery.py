"""Find command handlers and jobs: the built-in ones, and those of other distributions in :mod:`s2s.plugins`.

The modules are found as Twisted's ``getPlugins`` finds them, but without that function: it writes a cache file beside
every plug-in, and reports a broken plug-in by a traceback.
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

#: The numbers of characters kept of a long complaint: of its beginning, which names the plug-in, and of its end, which
#: names the cure.
_HEAD: Final = 200
_TAIL: Final = 95


@dataclass(frozen=True)
class Found:
    """The command handlers and jobs that were found.

    :param commands: the command handlers by type name, the built-in ones first.
    :param jobs: the jobs by name, the built-in ones first.
    :param complaints: a line for each plug-in that is left out, with its name, the error and the cure.
    """

    commands: Mapping[str, CommandHandler]
    jobs: Mapping[str, Job]
    complaints: Sequence[str]


def discover(
    command_types: Iterable[CommandHandler] = commands.BUILTIN, job_types: Iterable[Job] = jobs.BUILTIN
) -> Found:
    """Load every plug-in, in the order of the module names. A broken plug-in does not stop the others.

    :param command_types: the built-in command handlers, whose names no plug-in can take.
    :param job_types: the built-in jobs, likewise.
    """
    found_commands, found_jobs = commands.registry(command_types), jobs.registry(job_types)
    complaints: list[str] = []
    names: list[str] = []
    with _left_out(f"directory of {plugins.__name__}", complaints):  # the directory may be unreadable
        names.extend(module.name for module in getModule(plugins.__name__).iterModules())
        complaints.extend(_line(f"plug-in {path} is left out: {why}") for path, why in _passed_over())
    for name in sorted(names):
        # The output of a plug-in goes to stderr, since it is no part of a command's output. Code of the plug-in also
        # runs for the text of its exception, for properties of its members, such as a schema, and for the test whether
        # a member is a plug-in.
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
    """Return the result of :func:`discover`. Only the first call in this process loads the plug-ins."""
    return discover()


def _passed_over() -> Iterator[tuple[Path, str]]:
    """Yield the files and directories that the search ignores silently, and why."""
    for place in plugins.__path__:
        for path in sorted(Path(place).glob("*.py")):
            if not path.stem.isidentifier():
                yield path, "its name is none of a Python module: rename it, with _ in place of what is no letter"
    for entry in sys.path:
        directory = Path(entry, *plugins.__name__.split("."))
        # The directory of another copy of s2s contains only __init__.py.
        if str(directory) not in plugins.__path__ and {each.name for each in directory.glob("*.py")} > {"__init__.py"}:
            yield directory, "it has an __init__.py: remove that file"


def _is_new(value: Any, interface: Any, known: Mapping[str, Any]) -> bool:
    """Return whether a value is a plug-in of this kind that was not found under another name.

    :raises zope.interface.Invalid: the value is a plug-in that violates the interface.
    """
    # Identity instead of "in", which would call the plug-in's own comparison.
    if not interface.providedBy(value) or any(value is one for one in known.values()):
        return False
    return bool(verifyObject(IPlugin, value) and verifyObject(interface, value))


def _check(kind: CommandHandler) -> None:
    """Refuse a schema of anything but objects, which no push can satisfy, and an async handler, which never runs."""
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
    """Convert an exception that is raised inside to a complaint."""
    try:
        yield
    except (KeyboardInterrupt, TooLong):
        raise
    except OperatorError as error:
        complaints.append(_line(f"plug-in {where} is left out: {error}"))
    except BaseException as error:  # a plug-in may well call sys.exit() when it is imported
        said = f"plug-in {where} is left out: {type(error).__name__}: {_first_paragraph(error)}"
        complaints.append(_line(f"{said}: mend it, or uninstall what it came with"))


def _first_paragraph(error: BaseException) -> str:
    """Return the first paragraph of an exception's text. A validator adds long quotations in further paragraphs."""
    try:
        return str(error).partition("\n\n")[0]
    except Exception:  # the exception is the plug-in's own, or quotes one of its objects
        return "it does not say why"


def _line(text: str) -> str:
    """Return the text as one printable line for logs and terminals, without the middle of a long text."""
    line = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return line if len(line) <= _HEAD + 5 + _TAIL else f"{line[:_HEAD]} ... {line[-_TAIL:]}"
