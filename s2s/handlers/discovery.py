"""Find plug-ins: the built-in ones, those of other distributions in :mod:`s2s.plugins`, and those of the bundled world.

The modules are found as Twisted's ``getPlugins`` finds them, but without that function: it writes a cache file beside
every plug-in, and reports a broken plug-in by a traceback.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from twisted.plugin import IPlugin
from twisted.python.modules import getModule
from zope.interface.verify import verifyObject

from s2s import plugins
from s2s.errors import OperatorError
from s2s.handlers import commands, jobs, orders, report
from s2s.handlers.commands import CommandHandler, ICommandHandler
from s2s.handlers.import_timer import TooLong, bounded
from s2s.handlers.jobs import IJob, Job
from s2s.handlers.orders import IOrderHandler, OrderHandler
from s2s.handlers.report import Report
from s2s.protocol.catalogue import Catalogue, with_orders
from s2s.protocol.catalogue.schema import Schema
from s2s.protocol.names import by_name
from s2s.protocol.settings import SETTINGS, Setting, Value, check_setting
from s2s.store import migrations
from s2s.store.migrations import Migrations

#: The module of the bundled world, which is loaded last: a plug-in replaces the member of the same kind and name.
WORLD: Final = "s2s.world"

#: The numbers of characters kept of a long complaint: of its beginning, which names the plug-in, and of its end, which
#: names the cure.
_HEAD: Final = 200
_TAIL: Final = 95


@dataclass(frozen=True)
class _Kind:
    """One kind of plug-in.

    :param noun: the noun for one of them.
    :param key: the attribute that holds its name.
    :param type: the interface that it provides, or its class.
    :param registry: returns some of them by name; raises :class:`OperatorError` for one that cannot be used.
    :param builtin: those of s2s itself, whose names no plug-in can take.
    """

    noun: str
    key: str
    type: Any
    registry: Callable[[Iterable[Any]], dict[str, Any]]
    builtin: Sequence[Any] = ()

    def has(self, value: Any) -> bool:
        """Return whether a value is a plug-in of this kind.

        :raises zope.interface.Invalid: the value violates the interface.
        """
        if isinstance(self.type, type):
            return isinstance(value, self.type)
        return bool(self.type.providedBy(value) and verifyObject(IPlugin, value) and verifyObject(self.type, value))


#: By the member of :class:`Found`.
KINDS: Final = {
    "commands": _Kind("command", "cmd_type", ICommandHandler, commands.registry, commands.BUILTIN),
    "jobs": _Kind("job", "job_type", IJob, jobs.registry),
    "orders": _Kind("order", "rpc", IOrderHandler, orders.registry, orders.BUILTIN),
    "reports": _Kind("report", "name", Report, report.registry),
    "settings": _Kind("setting", "key", Setting, lambda all: by_name(all, "setting", "key", check_setting), SETTINGS),
    "migrations": _Kind(
        "migrations",
        "schema",
        Migrations,
        lambda all: by_name(all, "migrations", "schema", migrations.check_declaration),
    ),
}


@dataclass(frozen=True)
class Found:
    """The plug-ins that were found, each kind by name, the built-in ones first.

    :param complaints: a line for each plug-in that is left out, with its name, the error and the cure.
    :param replaced: the plug-ins of the bundled world that another plug-in replaces, each as the name of the mapping
        here and its own name.
    :param sources: the module of each plug-in that is not built in: that of its class or, for a plain declaration, the
        one that declares it.
    """

    commands: Mapping[str, CommandHandler] = field(default_factory=dict)
    jobs: Mapping[str, Job] = field(default_factory=dict)
    orders: Mapping[str, OrderHandler] = field(default_factory=dict)
    reports: Mapping[str, Report] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    migrations: Mapping[str, Migrations] = field(default_factory=dict)
    complaints: Sequence[str] = ()
    replaced: frozenset[tuple[str, str]] = frozenset()
    sources: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @functools.cached_property
    def catalogue(self) -> Catalogue:
        """The message types of a peer with these order handlers."""
        return with_orders(map(orders.message_type, self.orders.values()))

    @property
    def defaults(self) -> dict[str, Value]:
        """The default of each setting."""
        return {key: setting.default for key, setting in self.settings.items()}


def discover(world: bool = True) -> Found:
    """Load every plug-in, in the order of the module names. A broken plug-in does not stop the others.

    :param world: load the bundled world, after all others.
    """
    found = {member: kind.registry(kind.builtin) for member, kind in KINDS.items()}
    replaced: set[tuple[str, str]] = set()
    sources: dict[tuple[str, str], str] = {}
    complaints: list[str] = []
    names: list[str] = []
    with _left_out(f"directory of {plugins.__name__}", complaints):  # the directory may be unreadable
        names.extend(module.name for module in getModule(plugins.__name__).iterModules())
        complaints.extend(_line(f"plug-in {path} is left out: {why}") for path, why in _passed_over())
    for name in [*sorted(names), *([WORLD] if world else ())]:
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
                    _refuse_class(attribute, value)
                    for member, kind in KINDS.items():
                        known = found[member]
                        # Identity instead of "in", which would call the plug-in's own comparison.
                        if not kind.has(value) or any(value is each for each in known.values()):
                            continue
                        its = member, getattr(value, kind.key)
                        if name == WORLD and its[1] in known:
                            replaced.add(its)
                            continue
                        _check(value)
                        found[member] = kind.registry([*known.values(), value])
                        sources[its] = name if isinstance(kind.type, type) else type(value).__module__
    return Found(**found, complaints=complaints, replaced=frozenset(replaced), sources=sources)


@functools.cache
def installed(world: bool = True) -> Found:
    """Return the result of :func:`discover`. Only the first call in this process loads the plug-ins."""
    return discover(world)


def _passed_over() -> Iterator[tuple[Path, str]]:
    """Yield the files and directories that the search ignores silently, and why."""
    for place in plugins.__path__:
        for path in sorted(Path(place).glob("*.py")):
            if not path.stem.isidentifier():
                yield path, "its name is not the name of a Python module: rename it with letters, digits and _"
    for entry in sys.path:
        directory = Path(entry, *plugins.__name__.split("."))
        # The directory of another copy of s2s contains only __init__.py.
        if str(directory) not in plugins.__path__ and {each.name for each in directory.glob("*.py")} > {"__init__.py"}:
            yield directory, "it has an __init__.py: remove that file"


def _refuse_class(attribute: str, value: Any) -> None:
    """Refuse a class that is assigned to a name other than its own: its instance was meant."""
    bases = (CommandHandler, Job, OrderHandler)
    if isinstance(value, type) and issubclass(value, bases) and attribute != value.__name__:
        raise OperatorError(f"it is the class {value.__name__} and no instance of it: write {value.__name__}()")


def _check(value: Any) -> None:
    """Refuse a schema of anything but objects, which no push can satisfy, and an async handler, which never runs."""
    if ICommandHandler.providedBy(value):
        schema = value.schema
        if not isinstance(schema, Mapping) or schema.get("type") != "object":
            raise OperatorError('its schema is not one of an object: write a JSON Schema with "type": "object"')
        Schema(schema)
    for method in filter(None, (getattr(value, name, None) for name in ("run", "run_batch"))):
        if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
            raise OperatorError(
                f"its {method.__name__}() is async or a generator, and runs in a thread: write a plain def"
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
        complaints.append(_line(f"{said}: mend it, or uninstall its package"))


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
