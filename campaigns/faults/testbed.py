"""The test bed of a campaign: its own PostgreSQL, both roles, the network between them, and their clients."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
from twisted.internet.threads import deferToThread

from campaigns.faults import instrumentation, mark_handler, misbehaving_handlers
from campaigns.faults.checker import CMD_TYPE, Command, Facts, Order
from campaigns.faults.history import History
from campaigns.faults.operator_workload import OperatorWorkload
from campaigns.faults.pusher import Pusher
from s2s.cli.world_seed import make_world
from s2s.store.pool import blocking
from s2s.store.tables import tokens
from tests.support.cluster import Cluster
from tests.support.flood import StrangersFlood
from tests.support.peer import K1, Key, Peer, connect
from tests.support.postgres import Session
from tests.support.proxy import Proxy
from tests.support.roles import Engine, Role, Server, free_port, listen
from tests.support.waiting import pause

#: Settings of the links, and the seconds of silence within which they give a peer up.
SETTINGS: Final = {"link.idle_s": 1, "link.check_s": 1, "link.misses": 2}
DEAD_PEER_S: Final = 4.0
#: Seconds within which everything must have recovered once link and database are back; and within which all remaining
#: work must be done.
WHOLE_S: Final = 30.0
SETTLED_S: Final = 110.0
#: Bytes that a process may hold beyond its level at the beginning: pools grow on demand, and an allocator returns
#: little memory. By measurement, floods of strangers during the work add 8 MiB of these to Python's arenas; further
#: floods add no more.
MORE_BYTES: Final = 24 << 20
#: Threads beyond the beginning: a thread that replaces the thread of a stuck handler stays.
MORE_THREADS: Final = 2
#: Descriptors beyond the beginning, without those of the database's sessions: a pool opens each connection on demand.
MORE_DESCRIPTORS: Final = 4
#: Most sessions of a role, with 8 stuck handlers (docs/faults.rst).
MOST_SESSIONS: Final = 22
_SESSIONS: Final = (
    "select split_part(application_name, ' ', 1), count(*)::integer from pg_stat_activity"
    " where application_name like 's2s-%' group by 1"
)
SECTORS: Final = 50
_CHANGES: Final = """
create table public.sector_changes (n bigserial, sector_id bigint, was text, became text);
create function note_change() returns trigger language plpgsql set search_path from current as
$$ begin insert into public.sector_changes (sector_id, was, became) values (new.sector_id, old.status, new.status);
return null; end $$;
create trigger note_change after update on s2s_world.sectors for each row execute function note_change()
"""


class TestBed:
    """Starts and stops the processes and the clients of a campaign.

    :param pushes: new commands a second, of both pushers together.
    :param breaks: a promise that both roles break, see :data:`campaigns.faults.instrumentation.BREAKS`.
    :ivar known_keys: the keys with which our peers verify, by name.
    """

    def __init__(self, seed: int, pushes: float = 300.0, breaks: str | None = None, path: Path | None = None) -> None:
        #: The campaign sets a new generator for each fault, so that the draws of one fault do not change the next.
        self.rng = random.Random(seed)
        self.history = History(path)
        self.directory = Path(tempfile.mkdtemp(prefix="s2s-faults-"))
        self.cluster = Cluster()
        self.url = self.cluster.url
        self.known_keys: dict[str, Key] = {K1.key_id: K1}
        self._prepare(seed)
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "faults_mark.py").write_text("from campaigns.faults.mark_handler import mark as mark\n")
        (plugins / "faults_misbehaving.py").write_text(
            "".join(
                f"from campaigns.faults.misbehaving_handlers import {name} as {name}\n"
                for name in ("dirty", "hanging", "holding")
            )
        )
        http = free_port()
        self.api = f"http://127.0.0.1:{http}"
        self.server = Server(self.directory, self.url, http=listen(http))
        self.proxy = Proxy(self.server.port)
        #: If the lock of orders is off, a second engine competes for them.
        self._names = ("server", "engine", *(("second",) if breaks == "no-order-lock" else ()))
        self.engine: Engine
        self.second: Engine
        self.breakpoints = {
            name: instrumentation.Breakpoint(self.directory / f"{name}.breakpoint") for name in self._names
        }
        #: How often each role is held; the role resumes when the count is 0.
        self._held: Counter[str] = Counter()
        self._breaks = breaks
        self.workload = OperatorWorkload(self.history, self.url, self.api, self.token, self.known_keys, SECTORS, seed)
        self.pushers = [
            Pusher(
                f"pusher-{n}", self.history, partial(self.connect, f"pusher-{n}"), pushes / 2, seed + n, self.workload
            )
            for n in range(2)
        ]
        self._beginnings: dict[str, tuple[int, Level]] = {}
        self._probes = 0
        #: Description of the condition that the test bed waits for.
        self.lacks = ""
        #: Tracebacks in the logs of the roles, unexpected exit codes, and other unexpected events.
        self.surprises: list[str] = []

    def _prepare(self, seed_: int) -> None:
        self.cluster.migrate()
        with blocking(self.url) as txn:
            txn.execute(
                "insert into s2s.s2s_keys (key_id, key_b64, role, is_default_tx, active_from)"
                " values (%s, %s, 'any', true, to_timestamp(0))",
                K1,
            )
            for key, value in SETTINGS.items():
                txn.execute("update s2s.config set value = to_jsonb(%s) where key = %s", (value, key))
            self.token = tokens.add(txn, "faults", "admin")
            make_world(txn, SECTORS, 500, seed_)
            txn.execute(mark_handler.TABLE)
            txn.execute(_CHANGES)
            txn.execute("create role faults_role")

    def connect(self, name: str) -> Peer:
        """Connect our peer to the server directly, without the proxy."""
        peer = connect(self.server.port, name=name)
        peer.known_keys = self.known_keys
        return peer

    def role(self, name: str) -> Role:
        """Return a role by its name."""
        role: Role = getattr(self, name)
        return role

    async def start(self) -> None:
        """Start the roles and the clients, and wait until everything works."""
        await self.proxy.start()
        self.engine = Engine(self.directory, self.url, self.proxy.port)
        self.second = Engine(self.directory, self.url, self.proxy.port, name="engine-2")
        twistd = [sys.executable, "-m", "campaigns.faults.instrumentation"]
        for name in self._names:
            variables = instrumentation.variables(self.breakpoints[name], self.directory, self._breaks)
            self.role(name).launch_by(twistd, **variables, S2S_HANDLER_TIMEOUT=str(misbehaving_handlers.TIMEOUT_S))
            await self.role(name).start()
        if self._breaks is None:
            # The first flood takes the allocator to its high-water mark, which further floods do not exceed.
            flood = StrangersFlood(self.server.port, rate=40, seconds=3)
            flood.start()
            await deferToThread(flood.join)
        for client in (*self.pushers, self.workload):
            client.start()
        await self.whole()

    async def restart(self, *names: str) -> None:
        """Start roles that have ended."""
        # The replay cache of a new process has none of the recorded requests.
        for way in (self.proxy.up, self.proxy.down):
            way.recorded.clear()
        for name in names:
            self.look_at_log(name)
            self._held[name] = 0
            await self.role(name).start()

    def hold(self, name: str) -> None:
        """Suspend a role, until :meth:`let_go` was called as often as :meth:`hold`."""
        self._held[name] += 1
        self.role(name).freeze()

    def let_go(self, name: str) -> None:
        """Undo one :meth:`hold` of a role; a role that was restarted since runs already."""
        self._held[name] = max(0, self._held[name] - 1)
        if not self._held[name]:
            self.role(name).thaw()

    async def hold_at(self, name: str, step: str, coming: int, within_s: float) -> bool:
        """Hold a role when it reaches a step.

        :param coming: the number of the visit of the step, counted from now.
        :returns: whether the role reached it in time.
        """
        process = psutil.Process(self.role(name).pid)
        self.breakpoints[name].hold(step, coming)
        came = await comes(lambda: process.status() == psutil.STATUS_STOPPED, within_s)
        self.breakpoints[name].release()
        if came:
            self._held[name] += 1
        return came

    def look_at_log(self, name: str) -> None:
        """Record unexpected errors in a role's log since the last look."""
        role = self.role(name)
        try:
            role.assert_calm()
        except AssertionError as error:
            self.surprise(name, error)
        role.turn_page()

    def surprise(self, name: str, error: Exception) -> None:
        """Record an unexpected event."""
        self.surprises.append(f"{name}: {error}"[:3000])

    def emit(self, cmd_type: str, *keys: str) -> None:
        """Emit commands whose effect is a notice with their key as the text. Blocks."""
        number = self.history.invoke("campaign", "emit", keys=list(keys))
        insert = "insert into s2s.outbox (cmd_type, idem_key, payload) select %s, key, '{}' from unnest(%s) key"
        self.execute(insert, cmd_type, list(keys))
        self.history.end(number, "campaign", "emit", "ok")

    def execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own. Blocks."""
        # Writable also while the database is read-only for other sessions.
        with Session(f"{self.url}&connect_timeout=3&options=-cdefault_transaction_read_only%3Doff") as session:
            return session.run(statement, *params)

    async def whole(self) -> None:
        """Wait until a command emitted now is published, and no process holds more resources than at its beginning."""
        self._probes += 1
        key = f"probe-{self._probes}"
        number = self.history.invoke("campaign", "emit", keys=[key])
        insert = (
            "insert into s2s.outbox (cmd_type, idem_key, payload) values ('notice.publish', %s,"
            " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', %s))"
        )
        self.lacks = "nothing can be emitted"
        await deferToThread(self.execute, insert, key, key)
        self.history.end(number, "campaign", "emit", "ok")
        self.lacks = f"{key} has not come"
        while not await deferToThread(self.execute, "select 1 from s2s.notices where message = %s", key):
            await pause(0.1)
        while leaks := self._leaks(dict(await deferToThread(self.execute, _SESSIONS))):
            self.lacks = "; ".join(leaks)
            await pause(0.2)

    def levels(self) -> dict[str, tuple[int, ...]]:
        """Return the bytes, threads and descriptors of each running role."""
        return {name: astuple(Level.of(self.role(name).pid))[:3] for name in self._names if self.role(name).is_running}

    def _leaks(self, sessions: Mapping[str, int]) -> list[str]:
        """Compare the resources of the processes with their level at the first call for each process.

        :param sessions: sessions in the database by the name of the role; two engines have the same name there.
        """
        found = []
        for name in self._names:
            if not self.role(name).is_running:
                found.append(f"{name} does not run")
                continue
            pid = self.role(name).pid
            level = Level.of(pid, sessions.get(f"s2s-{name}", 0) if self._breaks is None else 0)
            begun, beginning = self._beginnings.get(name, (0, level))
            if begun != pid:
                self._beginnings[name] = (pid, level)
            elif level.is_above(beginning):
                found.append(f"{name} holds {level}, and held {beginning}")
        return found

    async def settled(self) -> None:
        """Let the clients finish, and wait until all work is done."""
        # The pushers first: the operator workload cancels commands that they pushed.
        for clients in (self.pushers, [self.workload]):
            for client in clients:
                client.finish()
            for client in clients:
                self.lacks = f"{client.name} does not come to an end"
                while client.is_alive():
                    await pause(0.1)
                if client.failure is not None:
                    raise client.failure
        self.lacks = "something is left to do"
        left = (
            "select (select count(*) from s2s.outbox where state = 'waiting')"
            " + (select count(*) from s2s.commands where status = 'ready')"
            " + (select count(*) from s2s.batch_notes) + (select count(*) from s2s.broadcasts where state <> 'queued')"
            " + (select count(*) from s2s.orders where status in ('queued', 'running'))"
        )
        while (await deferToThread(self.execute, left))[0][0]:
            await pause(0.2)
        await self.whole()

    async def end_roles(self) -> None:
        """Stop all roles by SIGTERM, and record errors."""
        for name in reversed(self._names):
            await self.end_role(name)

    async def end_role(self, name: str) -> None:
        """Stop a role by SIGTERM, and record errors in its log and its exit code."""
        self.look_at_log(name)
        try:
            await deferToThread(self.role(name).stop)
        except AssertionError as error:
            self.surprise(name, error)

    async def stop(self) -> None:
        """Stop everything, in any state."""
        for client in (*self.pushers, self.workload):
            client.finish()
        for name in self._names:
            role = getattr(self, name, None)
            if role is not None and role.is_running:
                role.kill()
        await self.proxy.stop()
        await deferToThread(self.cluster.remove)
        self.history.close()
        shutil.rmtree(self.directory)


@dataclass(frozen=True)
class Level:
    """The resources of a process.

    :param rss: bytes of resident memory.
    :param sessions: sessions in the database.
    """

    rss: int
    threads: int
    descriptors: int
    sessions: int

    @classmethod
    def of(cls, pid: int, sessions: int = 0) -> Level:
        """Read the level of a process that has this number of sessions in the database."""
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.memory_info().rss, process.num_threads(), process.num_fds(), sessions)

    def is_above(self, beginning: Level) -> bool:
        """Whether the level is above the beginning by more than a pool or an allocator may keep."""
        return (
            self.rss > beginning.rss + MORE_BYTES
            or self.threads > beginning.threads + MORE_THREADS
            or self.descriptors - self.sessions > beginning.descriptors - beginning.sessions + MORE_DESCRIPTORS
            or self.sessions > MOST_SESSIONS
        )


async def comes(is_there: Callable[[], bool], within_s: float) -> bool:
    """Wait for a condition, and return whether it became true in time."""
    until = time.monotonic() + within_s
    while not (came := is_there()) and time.monotonic() < until:
        await pause(0.02)
    return came


#: Query of the audit for the ids of the commands that an operation changed.
_DONE: Final = (
    "select jsonb_array_elements(result -> 'done' -> '{1}')::bigint from s2s.audit where action = 'commands.{0}'"
)


def facts_of(execute: Callable[..., list[tuple[Any, ...]]], engines: Mapping[str, tuple[int, str]]) -> Facts:
    """Read the facts that the checker compares. Blocks.

    :param engines: for each engine, the version that it reports as in force, and its state.
    """

    def column(statement: str) -> list[Any]:
        return [value for (value,) in execute(statement)]

    changes: dict[int, list[tuple[str, str]]] = {}
    for sector, was, became in execute("select sector_id, was, became from public.sector_changes order by n"):
        changes.setdefault(sector, []).append((was, became))
    return Facts(
        commands=[
            Command(*row)
            for row in execute(
                "select c.cmd_id, c.idem_key, payload, c.status, encode(fingerprint, 'hex') from s2s.commands c"
                " left join idempotency_keys k using (idem_key) where cmd_type = %s order by c.cmd_id",
                CMD_TYPE,
            )
        ],
        effects=execute("select idem_key, half, at from effects"),
        notices=column("select message from s2s.notices"),
        outbox=execute("select idem_key, state from s2s.outbox"),
        broadcasts=execute("select message, state from s2s.broadcasts"),
        orders=[Order(*row) for row in execute("select order_id, idem_key, params, status, result from s2s.orders")],
        changes=changes,
        sectors=dict(execute("select sector_id, status from s2s_world.sectors")),
        versions=column("select version from s2s.config_history order by version"),
        engines=engines,
        audited={
            "order": column("select subject from s2s.audit where action = 'world.set_sector_status.v1'"),
            "config": column("select result ->> 'version' from s2s.audit where action like 'config.set%'"),
            "key": column("select subject from s2s.audit where action like 'keys.%'"),
            "steer": column(
                "select action from s2s.audit where action like 's2s.engine.%' and result ->> 'ok' = 'true'"
            ),
            "wanted": column(
                "select params ->> 'wanted' from s2s.audit where action = 'engine.wanted' order by audit_id"
            ),
            **{
                verb: column(_DONE.format(verb, word)) for verb, word in (("cancel", "cancelled"), ("retry", "retried"))
            },
        },
        keys=column("select key_id from s2s.s2s_keys"),
        notes=column("select count(*) from s2s.batch_notes")[0],
    )
