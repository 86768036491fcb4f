"""``s2s up``: a database, a server and an engine as real processes, kept running until they are told to stop.

All of them are children whose stdin is a pipe from us. When we die, even by SIGKILL, the roles shut down, and
PostgreSQL's guardian (:mod:`s2s.store.embedded.lease`) waits for them and stops it. Locks show whether something is in
use; the kernel releases them with their holders, so no stale file is ever trusted.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from s2s.cli.up.children import DatabaseProcess, RoleProcess
from s2s.cli.up.notice_watcher import NoticeWatcher, Say, SmokeBroadcast
from s2s.cli.world_seed import make_world
from s2s.errors import DatabaseError, OperatorError
from s2s.handlers.discovery import installed
from s2s.runtime import files
from s2s.runtime.status_log import LINK_UP
from s2s.store import lock_wait, migrations, pool
from s2s.store.driver import commit
from s2s.store.embedded import lease
from s2s.store.tables import keys, tokens

ENGINE_NAME = "engine-1"
#: The world that is created if there is none: the number of sectors and of ships, and its seed.
WORLD = (1000, 10_000, 1)

#: The name of the token that is created for a run.
TOKEN = "s2s-up"

_POLL_S = 0.2
#: Seconds within which the children of a killed ``s2s up`` end by themselves.
_LEFT_BEHIND_S = 30.0
#: Seconds within which a command that checks for a running s2s up has released the lock.
_LOOKED_AT_S = 1.0
#: Seconds that the revocation of the token may wait for a lock.
_REVOKE_S = 5.0


def run(
    state_dir: Path,
    listen: str,
    http: str,
    for_seconds: float | None,
    echo: Callable[[str], None],
    has_world: bool = True,
) -> int:
    """Run everything until SIGINT, SIGTERM or SIGHUP, or for a time. Blocks; call it in the main thread.

    :param state_dir: the directory of the database, the logs and ``up.json``; it is created.
    :param listen: the server's Twisted endpoint string, of ``tcp`` or ``unix``.
    :param http: the endpoint string of its HTTP API, of ``tcp``.
    :param for_seconds: end this many seconds after the link is up and a broadcast was sent through it; ``None``: do not
        end.
    :param echo: called with every line for operators.
    :param has_world: run with the bundled world.
    :returns: the exit code: 0, or 1 if the broadcast did not become a notice.
    :raises OperatorError: something is missing, in use or wrong; no process is left running.
    :raises OSError: a line could not be written; no process is left running.
    """
    lost: list[OSError] = []
    try:
        return _run(state_dir, listen, http, for_seconds, echo, has_world, lost)
    except KeyboardInterrupt:
        raise OperatorError("interrupted before everything has started") from None
    except OSError as error:
        if error in lost or (error.filename is None and not files.is_here()):
            raise
        raise OperatorError(
            f"s2s up cannot go on ({files.describe(error)}): "
            f"see that {state_dir} can be written, or name another --state-dir"
        ) from None


def _run(
    state_dir: Path,
    listen: str,
    http: str,
    for_seconds: float | None,
    echo: Callable[[str], None],
    has_world: bool,
    lost: list[OSError],
) -> int:
    """Run as :func:`run` does.

    :param lost: receives the error of a line that could not be written.
    :raises KeyboardInterrupt: a signal arrived before everything was started.
    """
    connect = connect_endpoint(listen)
    base_url = http_url(http)
    state_dir = Path(os.path.abspath(state_dir))

    def say(source: str, text: str, at: str | None = None, /) -> None:
        if lost:
            return
        try:
            echo(f"{at or time.strftime('%H:%M:%S')}  {source:<8}  {text}")
        except OSError as error:  # stop everything in order before raising it
            lost.append(error)

    with ExitStack() as stack:  # stops in this order: engine, server, database, locks
        bell = stack.enter_context(_bell())
        with bell.interrupting():
            lock = stack.enter_context(_exclusive(state_dir, say))
        database = DatabaseProcess(state_dir, lock, partial(say, "database"))
        stack.callback(database.stop)
        url = database.start(bell.check)
        share = lease.share(state_dir)
        stack.callback(os.close, share)
        with bell.interrupting():
            token = _prepare(url, has_world, partial(say, "database"))
        token_file = state_dir / "up.token"
        stack.callback(_withdraw_token, url, token_file)
        _replace(token_file, token + "\n", 0o600)
        stack.callback(_json_file(state_dir).unlink, missing_ok=True)
        argv = {
            "server": ["s2s-server", "--listen", listen, "--http", http],
            "engine": ["s2s-engine", "--connect", connect, "--name", ENGINE_NAME],
        }
        roles = []
        for name, options in argv.items():
            role = RoleProcess(
                name,
                [*options, "--state-dir", str(state_dir), *([] if has_world else ["--no-world"])],
                state_dir=state_dir,
                environment={"S2S_DATABASE_URL": url},
                keep=(lock, share),
                say=partial(say, name),
            )
            roles.append(role)
            stack.callback(_forward_status, role, say)
            stack.callback(role.stop)
            role.start()
        errand = None if for_seconds is None else SmokeBroadcast(url, for_seconds)
        board = NoticeWatcher(url)
        found = {"link": connect, "database": url, "http": base_url, "token_file": str(token_file)}
        written = None
        linked = False
        while not (bell.rung or lost) and not all(role.over for role in roles) and not (errand and errand.is_over):
            database.poll()
            for role in roles:
                linked = _forward_status(role, say) or linked
                role.poll(first=not linked)
            if linked:
                now = {**found, **{f"{role.name}_pid": role.pid for role in roles}}
                if written is None:
                    _tell_where(found, state_dir, has_world, say)
                if written != now:
                    _replace(_json_file(state_dir), json.dumps(now, indent=2) + "\n")
                    written = now
                with suppress(KeyboardInterrupt), bell.interrupting():
                    board.poll(say)
                    if errand:
                        errand.poll(say)
            time.sleep(_POLL_S)
        say("up", "stopping")
    if lost:
        raise lost[0]
    if errand is None:
        return 0
    say("up", errand.verdict)
    return 0 if errand.arrived else 1


def _forward_status(role: RoleProcess, say: Say) -> bool:
    """Print a role's status lines, and return whether one of them reports a link."""
    linked = False
    for at, text in role.status_log():
        say(role.name, text, at)
        linked = linked or text.startswith(LINK_UP)
    return linked


def connect_endpoint(listen: str) -> str:
    """Return the client endpoint that reaches a server endpoint of this machine.

    :raises OperatorError: the endpoint is not of ``tcp`` or ``unix``, or names no fixed port or path.
    """
    kind, first, named = _parts(listen)
    if kind == "tcp":
        host, port = _tcp("--listen", listen)
        return f"tcp:host={_quoted(host)}:port={port}"
    if kind == "unix" and (path := named.get("address", first)):
        return f"unix:{_quoted(path)}"
    raise OperatorError(f"--listen {listen}: s2s up takes tcp:PORT[:interface=ADDRESS] or unix:PATH")


def http_url(http: str) -> str:
    """Return the base URL that reaches an HTTP endpoint of this machine.

    :raises OperatorError: the endpoint is not of ``tcp``, or names no fixed port.
    """
    if _parts(http)[0] != "tcp":
        raise OperatorError(f"--http {http}: s2s up takes tcp:PORT[:interface=ADDRESS]")
    host, port = _tcp("--http", http)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _parts(endpoint: str) -> tuple[str, str, dict[str, str]]:
    """Return an endpoint's kind, the first of its unnamed parts, and its named parts."""
    kind, *parts = (re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\):", endpoint))
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    return kind, next((part for part in parts if "=" not in part), ""), named


def _tcp(option: str, endpoint: str) -> tuple[str, int]:
    """Return the host and port at which this machine reaches a ``tcp`` endpoint of its own."""
    _, first, named = _parts(endpoint)
    port = named.get("port", first)
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise OperatorError(f"{option} {endpoint}: s2s up needs a port from 1 to 65535, such as tcp:4321")
    interface = named.get("interface", "")
    return "127.0.0.1" if interface in ("", "0.0.0.0", "::") else interface, int(port)  # noqa: S104 - compared, not bound


def _quoted(value: str) -> str:
    return re.sub(r"([:\\=])", r"\\\1", value)


class _StopFlag:
    """Whether a signal has told us to end."""

    rung = False
    _is_raising = False

    def ring(self, *_: object) -> None:
        """Set the flag, as the handler of a signal."""
        self.rung = True
        if self._is_raising:
            # Do not interrupt the cleanup once more.
            self._is_raising = False
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if the flag is set."""
        if self.rung:
            raise KeyboardInterrupt

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Also raise KeyboardInterrupt when a signal arrives inside, for waits that do not check the flag."""
        self._is_raising = True
        try:
            self.check()
            yield
        finally:
            self._is_raising = False


@contextmanager
def _bell() -> Iterator[_StopFlag]:
    """Turn the signals that end us into a flag that is checked between two steps, so that the stop keeps its order."""
    bell = _StopFlag()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # started by nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, bell.ring) for number in numbers}
    try:
        yield bell
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _exclusive(state_dir: Path, say: Say) -> Iterator[int]:
    """Lock the state directory against another ``s2s up``, and wait for the children of a killed one.

    :returns: a locked descriptor for our children to inherit: the lock is free when the last of them has died.
    """
    with ExitStack() as stack:
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            ours = stack.enter_context(_lock_file(state_dir).open("ab"))
            children = stack.enter_context((state_dir / "up.children.lock").open("ab"))
        except OSError as error:
            raise OperatorError(
                f"the state directory cannot be used ({error.strerror}: {error.filename}): name another --state-dir"
            ) from error
        deadline = time.monotonic() + _LOOKED_AT_S
        while not (is_ours := _take(ours)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not is_ours:
            raise OperatorError(f"another s2s up runs in {state_dir}: stop it, or name another --state-dir")
        deadline = time.monotonic() + _LEFT_BEHIND_S
        if not _take(children):
            say("up", "waiting for the processes of a killed s2s up")
            while not _take(children):
                if time.monotonic() >= deadline:
                    raise OperatorError(f"processes of a killed s2s up still run in {state_dir}: end them by hand")
                time.sleep(_POLL_S)
        yield children.fileno()


def _lock_file(state_dir: Path) -> Path:
    return state_dir / "up.lock"


def _take(file: IO[bytes], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _prepare(url: str, has_world: bool, say: Callable[[str], None]) -> str:
    """Create the tables, the first key and a world, unless they exist.

    :param has_world: whether the bundled world is wanted.
    :returns: a token for this run.
    """
    with pool.blocking(url, "s2s up") as txn, lock_wait.late_told(txn.connection, say):
        found = installed(has_world)
        plugins = list(found.migrations.values())
        for name in migrations.migrate(txn.connection, plugins, found.settings.values(), tell=say):
            say(f"migrated: {name}")
        key_id = keys.add_first_random(txn)
        is_made = has_world and make_world(txn, *WORLD)
        tokens.revoke(txn, TOKEN)  # the token of a run that was killed
        token = tokens.add(txn, TOKEN, "admin", "of the s2s up that runs")
        # Commit inside the block, which reports the wait of the COMMIT.
        commit(txn.connection)
    if key_id is not None:
        say(f"made a random key: {key_id}")
    if is_made:
        sectors, ships, _ = WORLD
        say(f"made a world: {sectors} sectors, each with a port, and {ships} ships")
    return token


def _withdraw_token(url: str, token_file: Path) -> None:
    """Revoke this run's token, if possible."""
    token_file.unlink(missing_ok=True)
    # If this fails, the next run revokes it.
    with (
        suppress(DatabaseError),
        pool.blocking(url, "s2s up", statement_timeout_s=_REVOKE_S, connect_timeout_s=1.0) as txn,
    ):
        tokens.revoke(txn, TOKEN)


@dataclass(frozen=True)
class Api:
    """The HTTP API of a running ``s2s up``.

    :param url: its base URL.
    :param token_file: the file with an admin's token.
    """

    url: str
    token_file: Path


def find_api(state_dir: Path) -> Api | None:
    """Return the API of the ``s2s up`` that runs in a state directory; ``None``: none runs, or it has no link yet."""
    try:
        found = json.loads(_json_file(state_dir).read_text())
        # A killed one leaves its file behind, and its pids may belong to other processes by now.
        with _lock_file(state_dir).open("rb") as ours:
            if _take(ours, fcntl.LOCK_SH):
                return None
        os.kill(found["server_pid"], 0)
        return Api(found["http"], Path(found["token_file"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _json_file(state_dir: Path) -> Path:
    return state_dir / "up.json"


def _replace(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a file in one step: a reader sees the old text or the new, with no permissions beyond ``mode``."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    fresh.replace(path)


def _tell_where(found: dict[str, str], state_dir: Path, has_world: bool, say: Say) -> None:
    say("up", f"linked at {found['link']}; Ctrl-C stops everything in order")
    say("up", f"database: {found['database']}")
    say("up", f"HTTP API: {found['http']}, with the token in {found['token_file']}")
    say("up", f"logs: {state_dir / 'server.log'} and {state_dir / 'engine.log'}")
    say("up", f'try: s2s broadcast "Hello" --state-dir {state_dir}')
    order = "set-sector-status 5 port_closed" if has_world else "config-set relay.window 256"
    say("up", f" or: s2s order {order} --state-dir {state_dir}")
