"""The command line options that both roles share. Each can be set by an environment variable, as for a tac file."""

from __future__ import annotations

import atexit
import os
import pwd
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python import usage
from twisted.python.reflect import namedAny
from ulid_transform import ulid_now

from s2s import __version__
from s2s.errors import OperatorError, harmless, one_line
from s2s.handlers.discovery import installed
from s2s.protocol.identity import Identity
from s2s.protocol.limits import Bounds, Counters
from s2s.protocol.signing import Role
from s2s.roles import preflight
from s2s.roles.base import RoleDeps
from s2s.roles.live_config import LiveConfig
from s2s.roles.live_keys import LiveKeys
from s2s.roles.shutdown import Shutdown, refuse, wait_for_start
from s2s.runtime import log_file, own_threads, streams
from s2s.runtime.clock import Clock, make_monotonic
from s2s.runtime.pid_file import PidFile
from s2s.store.handler_pool import TIMEOUT_S, HandlerPool
from s2s.store.pool import Database

T = TypeVar("T")

LISTEN: Final = "tcp:4321:interface=127.0.0.1"
HTTP: Final = "tcp:8321:interface=127.0.0.1"
CONNECT: Final = "tcp:host=127.0.0.1:port=4321"
FRAME_SIZES: Final = (4096, 262144)
#: Minimum and maximum of --log-bytes, in bytes: a smaller file is rotated at each burst, a larger one fills a disk.
LOG_BYTES: Final = (100_000, 10_000_000_000)
#: Minimum and maximum of --log-files, in files.
LOG_FILES: Final = (1, 1000)
#: Seconds between two checks of the size of the embedded PostgreSQL's log.
TRIM_S: Final = 60.0
_TWISTD_PIDFILE: Final = "twistd.pid"
#: Sessions of a role beside those of its two pools: for short statements, for notifications, and for cancellations.
_OWN_SESSIONS: Final = 3
#: The socket of syslog on Linux, and the maximum seconds of a connect to it.
_SYSLOG: Final = "/dev/log"
_SYSLOG_S: Final = 2.0
HANDLER_TIMEOUTS: Final = (1, 3600)
#: The values of an environment variable for a flag.
_FLAGS: Final = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}

_log = Logger()


def variable(option: str) -> str:
    """Return the name of the environment variable of an option."""
    return "S2S_" + option.upper().replace("-", "_")


def is_set(name: str) -> bool:
    """Return whether the environment variable of a flag sets it.

    :raises OperatorError: its value is neither of the two.
    """
    value = os.environ.get(name)
    if value is None:
        return False
    if value.strip().lower() not in _FLAGS:
        raise OperatorError(f"{name} is {value!r}: write 1 or 0, or leave it out")
    return _FLAGS[value.strip().lower()]


def between(least: int, most: int) -> Callable[[str], int]:
    """Make a function that converts text to an integer, and raises ``ValueError`` outside the bounds."""

    def coerce(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise ValueError(f"{text!r} is not a number between {least} and {most}")
        return number

    return coerce


def parameter(name: str, default: object, help: str) -> list[object]:
    """Declare an option. Its environment variable replaces the default."""
    return [name, None, os.environ.get(variable(name), default), help]


def _directory(text: str) -> Path:
    if not text.strip():
        raise ValueError("it is empty: name a directory, or leave it out")
    try:
        return Path(text).resolve()
    except OSError:
        # The working directory was removed, which matters to a role with an embedded database alone.
        return Path(text)


_COERCIONS: Final = {
    "frame-size-limit": between(*FRAME_SIZES),
    "handler-timeout": between(*HANDLER_TIMEOUTS),
    "state-dir": _directory,
    "log-bytes": between(*LOG_BYTES),
    "log-files": between(*LOG_FILES),
}


class RoleOptions(usage.Options):
    """The options of either role.

    :cvar process_name: the name of the role in the names of its files and in its lines.
    :cvar endpoints: for each option that holds an endpoint: its name, its parser and an example.
    :cvar coercions: by the name of an option, the function that converts its text. It raises ``ValueError`` with the
        reason.
    """

    process_name: str
    endpoints: tuple[tuple[str, Callable[[Any, str], Any], str], ...]
    # S2S_DATABASE_URL is read by preflight, for the command line s2s as well.
    optParameters = [
        ["database", None, None, "URL of the PostgreSQL, or @FILE; else S2S_DATABASE_URL, else the embedded one"],
        parameter("frame-size-limit", 65536, "longest frame that is read or sent, in bytes, 4096 to 262144"),
        parameter(
            "handler-timeout",
            round(TIMEOUT_S),
            "seconds that a command handler, a job's or an order's step may take, with its SQL, 1 to 3600",
        ),
        parameter("state-dir", preflight.STATE_DIR, "directory of the embedded PostgreSQL"),
        parameter("log-bytes", 10_000_000, "size at which the file of --logfile is rotated, in bytes, 100000 to 10^10"),
        parameter("log-files", 10, "rotated log files that are kept, 1 to 1000"),
    ]
    optFlags = [["no-world", None, "leave out the bundled world: its tables, jobs, orders, settings and report"]]
    coercions: Mapping[str, Callable[[str], object]] = {}
    pid_file: PidFile | None = None

    @classmethod
    def from_environment(cls) -> RoleOptions:
        """Return the options as the environment alone sets them, for a tac file."""
        options = cls()
        options.parseOptions([])
        return options

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Read the arguments."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as error:
            # twistd would write the error below a page of help.
            refuse(f"{str(error).rstrip('.')}: see twistd {self.process_name} --help")

    def opt_help(self) -> NoReturn:
        """Display this help and exit."""
        _tell(str(self))

    def opt_version(self) -> NoReturn:
        """Display the version and exit."""
        _tell(f"s2s, version {__version__}")

    def postOptions(self) -> None:
        """Convert the values, and prepare the process for twistd."""
        if wrong := streams.not_utf8():
            refuse(f"an option or a variable is not UTF-8: {wrong}: write it in UTF-8")
        for name, given in self.items():
            # A secret or a file of variables may end with a line break.
            self[name] = given.strip() if isinstance(given, str) else given
        self["no-world"] = bool(self["no-world"]) or or_refuse(lambda: is_set(variable("no-world")))
        for name, coerce in {**_COERCIONS, **self.coercions}.items():
            try:
                self[name] = coerce(self[name])
            except ValueError as error:
                refuse(f"--{name} (or {variable(name)}): {error}")
        twistd = getattr(self, "parent", None)
        if twistd is not None:
            or_refuse(lambda: self._prepare_process(twistd))
        elif "--syslog" in sys.argv:  # a tac file does not see twistd's options
            or_refuse(_check_syslog)

    def _prepare_process(self, twistd: Any) -> None:
        """Name the files of the role, and check that twistd can write them: twistd itself would end with a traceback.

        :raises OperatorError: a file cannot be written.
        """
        wait_for_start()
        closed = streams.prepare()
        atexit.register(streams.abandon, sys.stdout)
        is_daemon = not (twistd["nodaemon"] or twistd["debug"])
        if is_daemon:
            streams.keep_terminal()
        if twistd["pidfile"] == _TWISTD_PIDFILE and not any(each.startswith("--pidfile") for each in sys.argv):
            # In the foreground a supervisor knows the pid.
            twistd["pidfile"] = f"{self.process_name}.pid" if is_daemon else ""
        if is_daemon and not twistd["logfile"]:
            twistd["logfile"] = f"{self.process_name}.log"
        _check_places(twistd)
        starting = f"{self.process_name}: starting"
        if twistd["logger"]:
            _check_logger(twistd["logger"])
        elif twistd["syslog"]:
            _check_syslog()
        elif twistd["logfile"] in ("", None, "-"):
            if "stdout" in closed and not is_daemon:
                raise OperatorError("stdout is closed and the log goes there: open it, or name a --logfile")
            _write("the log", "logfile", lambda: streams.offer(starting))
        else:
            _write(
                f"the log file {twistd['logfile']}",
                "logfile",
                lambda: log_file.append(twistd["logfile"], f"{starting}\n"),
            )
        if twistd["pidfile"]:
            self.pid_file = PidFile(twistd["pidfile"])
            twistd["pidfile"] = ""


def _check_logger(name: str) -> None:
    """Check the factory of ``--logger``: twistd itself would report an error below a page of help.

    :raises OperatorError: the factory cannot be imported or called.
    """
    try:
        is_factory, why = callable(namedAny(name)), "it cannot be called"
    except Exception as error:  # the import runs code of others
        is_factory, why = False, one_line(error)
    if not is_factory:
        raise OperatorError(f"--logger {harmless(name)} cannot be used: {why}: name a factory of log observers")


def _check_syslog() -> None:
    """Check that a syslog daemon listens: without one the C library drops each line and reports no error.

    :raises OperatorError: no daemon listens.
    """
    if sys.platform != "linux":  # other systems have other paths
        return None
    why = ""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.settimeout(_SYSLOG_S)
            try:
                return probe.connect(_SYSLOG)
            except OSError as error:
                why = why or error.strerror or str(error)
    raise OperatorError(f"no syslog daemon listens on {_SYSLOG}: {why}: start one, or leave out --syslog")


def _check_places(twistd: Any) -> None:
    """Check the directories, the user and the profile of twistd's own options.

    :raises OperatorError: one of them does not exist or cannot be written.
    """
    root, rundir, uid, gid = (twistd[option] for option in ("chroot", "rundir", "uid", "gid"))
    if root is not None and (rundir == "." or os.path.isabs(rundir)):
        rundir = f"{root}/{rundir}"
    for option, directory in (("chroot", root), ("rundir", rundir)):
        if directory is not None and not os.path.isdir(directory):
            raise OperatorError(f"there is no directory {directory}: name another --{option}")
    if root is not None and os.geteuid() != 0:
        raise OperatorError("--chroot needs root: leave it out, or start as root")
    if uid is not None and (gid is None or uid != os.geteuid()):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            raise OperatorError(f"there is no user {uid}, whose groups would be ours: name another --uid") from None
    if twistd["profile"]:
        # twistd writes the profile at its end, in the run directory.
        profile = os.path.join(rundir, twistd["profile"])
        _write(f"the profile {profile}", "profile", lambda: log_file.append(profile))


def _tell(text: str) -> NoReturn:
    """Write a text to stdout, and exit with code 0."""
    try:
        print(text, flush=True)
    except OSError as error:
        streams.abandon(sys.stdout)
        refuse(f"the output cannot be written, {error.strerror}")
    raise SystemExit(0)


def _write(name: str, option: str, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise OperatorError(f"{name} cannot be written: {error.strerror}: name another --{option}") from None


def make_deps(options: RoleOptions, role: Role, name: str, threads: int, handlers: int) -> tuple[RoleDeps, list[Any]]:
    """Make the dependencies of a role, and the endpoints where it listens or connects.

    :param threads: the number of connections for the statements of the role itself.
    :param handlers: the maximum number of concurrent transactions of handlers, jobs and orders.
    :raises OperatorError: the role cannot start; the error is one line that names the cure.
    """
    from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

    make_monotonic(reactor)
    own_threads.resolve_names(reactor)
    # twistd opens the log after the service is made.
    reactor.callWhenRunning(log_file.bound, options["log-bytes"], options["log-files"])
    own_threads.check(threads + max(handlers, 1))
    plugins = installed(not options["no-world"])
    for complaint in plugins.complaints:
        _log.error("{complaint}", complaint=complaint)
    endpoints = [_endpoint(options, reactor, *each) for each in options.endpoints]
    sessions = threads + handlers + _OWN_SESSIONS
    place, found, done = preflight.prepare(options["database"], options["state-dir"], role, plugins, sessions)
    for sentence in done:
        with suppress(OSError):
            streams.offer(f"{options.process_name}: {sentence}")
    if place.is_embedded:
        trimming = LoopingCall(reactor.callInThread, place.trim_log)
        reactor.callWhenRunning(trimming.start, TRIM_S)
    # At the end of the process, even if the service cannot start: a role that is still stopping needs its database.
    atexit.register(place.leave)
    clock = Clock(reactor)
    counters = Counters()
    database = Database(place.url, options.process_name, threads=threads, counters=counters)
    shutdown = Shutdown(reactor)
    if options.pid_file is not None:
        shutdown.on_start = partial(or_refuse, options.pid_file.write)
    rereads = (each.reread for each in (database, *endpoints) if hasattr(each, "reread"))
    shutdown.rereads.extend(rereads)
    deps = RoleDeps(
        Identity(role, name, ulid_now()),
        place.url,
        clock,
        Bounds(frame_size=options["frame-size-limit"]),
        counters,
        database,
        HandlerPool(
            database,
            f"{options.process_name} handlers",
            threads=max(handlers, 1),
            timeout_s=float(options["handler-timeout"]),
        ),
        LiveKeys(database, clock, found.rows),
        LiveConfig(database, clock, found.snapshot),
        shutdown,
        plugins,
    )
    return deps, endpoints


def _endpoint(options: RoleOptions, reactor: object, name: str, read: Callable[[Any, str], Any], example: str) -> Any:
    """Parse an endpoint string of the role, before a database is started for it.

    :raises OperatorError: the string is not valid.
    """
    try:
        return read(reactor, options[name])
    except Exception as error:  # every kind of endpoint raises its own
        raise OperatorError(
            f"--{name} {options[name]!r} is not an endpoint: {error}: write one of Twisted's strings, such as {example}"
        ) from None


def or_refuse(make: Callable[[], T]) -> T:
    """Call a function, and return its result. An :class:`OperatorError` ends the process with one line.

    So does an interrupt.
    """
    # Until the reactor handles the signal: process 1 of a container does not receive it without a handler.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return make()
    except OperatorError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        refuse("interrupted before it has started")
