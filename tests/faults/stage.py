"""What a campaign plays on: a PostgreSQL of its own, both roles, the network between them, and their clients."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import psutil
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from s2s.store import seed, tokens
from s2s.store.pool import blocking
from tests.faults import inside, mark
from tests.faults.history import History
from tests.faults.judge import Command, Facts, Order
from tests.faults.workload import Pusher, Typist
from tests.support.cluster import Cluster
from tests.support.peer import K1, Key, Peer, connect
from tests.support.postgres import Session
from tests.support.proxy import Proxy
from tests.support.roles import Engine, Role, Server, free_port, listen

#: A peer that is silent for so many seconds is given up.
SETTINGS: Final = {"link.idle_s": 1, "link.check_s": 1, "link.misses": 2}
DEAD_PEER_S: Final = 4.0
#: Seconds until everything is whole again, once link and database are back; and until nothing is left of the work.
WHOLE_S: Final = 30.0
SETTLED_S: Final = 110.0
SECTORS: Final = 50
_CHANGES: Final = """
create table sector_changes (n bigserial, sector_id bigint, was text, became text);
create function note_change() returns trigger language plpgsql as
$$ begin insert into sector_changes (sector_id, was, became) values (new.sector_id, old.status, new.status);
return null; end $$;
create trigger note_change after update on sectors for each row execute function note_change()
"""


class Stage:
    """Everything, started and stopped.

    :param pushes: new commands in a second, of both pushers together.
    :param breaks: a promise that both roles break, see :data:`tests.faults.inside.BREAKS`.
    :ivar ring: the keys that peers of ours verify with, by name.
    """

    def __init__(self, seed: int, pushes: float = 300.0, breaks: str | None = None, path: Path | None = None) -> None:
        self.dice = random.Random(seed)
        self.history = History(path)
        self.directory = Path(tempfile.mkdtemp(prefix="s2s-faults-"))
        self.cluster = Cluster()
        self.url = self.cluster.url
        self.ring: dict[str, Key] = {K1.key_id: K1}
        self._prepare(seed)
        plugins = self.directory / "s2s" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "faults_mark.py").write_text("from tests.faults.mark import mark as mark\n")
        self._said: dict[str, Any] = {} if breaks is None else {"break": breaks}
        http = free_port()
        self.api = f"http://127.0.0.1:{http}"
        self.server = Server(self.directory, self.url, http=listen(http))
        self.proxy = Proxy(self.server.port)
        #: Where nobody looks at an order's lock, a second engine comes to it.
        self._names = ("server", "engine", *(("second",) if breaks == "no-order-lock" else ()))
        self.engine: Engine
        self.second: Engine
        self.clocks = {name: self.directory / f"{name}.clock" for name in self._names}
        for clock in self.clocks.values():
            inside.set_clock(clock, 0.0)
        self.pushers = [
            Pusher(f"pusher-{n}", self.history, lambda n=n: self.connect(f"pusher-{n}"), pushes / 2, seed + n)
            for n in range(2)
        ]
        self.typist = Typist(self.history, self.url, self.api, self.token, self.ring, SECTORS, seed)
        self._levels: dict[str, tuple[int, int, int]] = {}
        self._probes = 0
        #: Tracebacks in the logs of the roles.
        self.surprises: list[str] = []

    def _prepare(self, seed_: int) -> None:
        self.cluster.migrate()
        with blocking(self.url) as txn:
            txn.execute(
                "insert into s2s_keys (key_id, key_b64, role, is_default_tx, active_from)"
                " values (%s, %s, 'any', true, to_timestamp(0))",
                K1,
            )
            for key, value in SETTINGS.items():
                txn.execute("update config set value = to_jsonb(%s) where key = %s", (value, key))
            self.token = tokens.add(txn, "faults", "admin")
            seed.make_world(txn, SECTORS, 500, seed_)
            txn.execute(mark.TABLE)
            txn.execute(_CHANGES)

    def connect(self, name: str) -> Peer:
        """Connect a peer of ours to the server itself."""
        peer = connect(self.server.port, name=name)
        peer.ring = self.ring
        return peer

    def arm(self, name: str, die: tuple[str, int] | None = None) -> None:
        """Say what a role does inside, from its next start on.

        :param die: the step at which it dies, and at which of its comings there.
        """
        role: Any = getattr(self, name)
        said = {**self._said, "clock": str(self.clocks[name]), **({} if die is None else {"die": die})}
        role.launch_by(
            [sys.executable, "-m", "tests.faults.inside"],
            **inside.variables(said, self.directory),
        )

    async def start(self) -> None:
        """Start all of it, and wait until it is whole."""
        await self.proxy.start()
        self.engine = Engine(self.directory, self.url, self.proxy.port)
        self.second = Engine(self.directory, self.url, self.proxy.port, name="engine-2")
        for name in self._names:
            self.arm(name)
            await getattr(self, name).start()
        for client in (*self.pushers, self.typist):
            client.start()
        await self.whole()
        self._levels = {name: self._level(name) for name in self._names}

    def _level(self, name: str) -> tuple[int, int, int]:
        process = psutil.Process(getattr(self, name).pid)
        return process.memory_info().rss, process.num_threads(), process.num_fds()

    async def restart(self, *names: str) -> None:
        """Start roles again that have died, without a fault inside."""
        # Nobody remembers what was asked before.
        for way in (self.proxy.up, self.proxy.down):
            way.recorded.clear()
        for name in names:
            self.look_at_log(name)
            self.arm(name)
            await getattr(self, name).start()

    def look_at_log(self, name: str) -> None:
        """Take note of what has surprised a role since it was looked at last."""
        role = getattr(self, name)
        try:
            role.assert_calm()
        except AssertionError as error:
            self.surprises.append(f"{name}: {error}"[:3000])
        role.turn_page()

    def execute(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own. Blocks."""
        # Also while the database is read-only to others.
        with Session(f"{self.url}&connect_timeout=3&options=-cdefault_transaction_read_only%3Doff") as session:
            return session.run(statement, *params)

    async def whole(self) -> None:
        """Wait until what is emitted now has come the whole way."""
        self._probes += 1
        key = f"probe-{self._probes}"
        number = self.history.invoke("campaign", "emit", keys=[key])
        insert = (
            "insert into outbox (cmd_type, idem_key, payload) values ('notice.publish', %s,"
            " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', %s))"
        )
        await deferToThread(self.execute, insert, key, key)
        self.history.end(number, "campaign", "emit", "ok")
        while not await deferToThread(self.execute, "select 1 from notices where message = %s", key):
            await pause(0.1)

    async def settled(self) -> None:
        """Let the clients finish, and wait until nothing is on its way."""
        for client in (*self.pushers, self.typist):
            client.finish()
        for client in (*self.pushers, self.typist):
            while client.is_alive():
                await pause(0.1)
            if client.failure is not None:
                raise client.failure
        left = (
            "select (select count(*) from outbox where state = 'waiting')"
            " + (select count(*) from commands where status = 'ready')"
            " + (select count(*) from batch_notes) + (select count(*) from broadcasts where state <> 'queued')"
            " + (select count(*) from orders where status in ('queued', 'running'))"
        )
        while (await deferToThread(self.execute, left))[0][0]:
            await pause(0.2)

    def leaks(self) -> list[str]:
        """Compare what the processes hold with what they held in the beginning."""
        found = []
        for name, (rss, threads, descriptors) in self._levels.items():
            now = self._level(name)
            if now[0] > rss + (100 << 20) or now[1] > threads + 4 or now[2] > descriptors + 8:
                found.append(
                    f"{name} holds {now} bytes, threads and descriptors, and held {(rss, threads, descriptors)}"
                )
        return found

    async def end_roles(self) -> None:
        """Stop both roles in order, which they are to do without a surprise."""
        for name in reversed(self._names):
            role: Role = getattr(self, name)
            self.look_at_log(name)
            try:
                await deferToThread(role.stop)
            except AssertionError as error:
                self.surprises.append(f"{name}: {error}"[:3000])

    async def stop(self) -> None:
        """Stop all of it, in whatever state it is."""
        for client in (*self.pushers, self.typist):
            client.finish()
        for name in self._names:
            role = getattr(self, name, None)
            if role is not None and role.is_running:
                role.kill()
        await self.proxy.stop()
        await deferToThread(self.cluster.remove)
        self.history.close()
        shutil.rmtree(self.directory)


def pause(seconds: float) -> Deferred[Any]:
    """Let time pass."""
    return deferLater(reactor, seconds)


def facts_of(execute: Callable[..., list[tuple[Any, ...]]], engines: Mapping[str, int]) -> Facts:
    """Read what the judge wants to know. Blocks."""

    def column(statement: str) -> list[Any]:
        return [value for (value,) in execute(statement)]

    changes: dict[int, list[tuple[str, str]]] = {}
    for sector, was, became in execute("select sector_id, was, became from sector_changes order by n"):
        changes.setdefault(sector, []).append((was, became))
    return Facts(
        commands=[
            Command(*row)
            for row in execute(
                "select cmd_id, idem_key, payload, status from commands where cmd_type = 'faults.mark' order by cmd_id"
            )
        ],
        effects=execute("select idem_key, half, at from effects"),
        notices=column("select message from notices"),
        outbox=execute("select idem_key, state from outbox"),
        broadcasts=execute("select message, state from broadcasts"),
        orders=[Order(*row) for row in execute("select order_id, idem_key, params, status, result from orders")],
        changes=changes,
        sectors=dict(execute("select sector_id, status from sectors")),
        versions=column("select version from config_history order by version"),
        engines=engines,
        audited={
            "order": column("select subject from audit where action = 'world.set_sector_status.v1'"),
            "config": column("select result ->> 'version' from audit where action like 'config.set%'"),
            "key": column("select subject from audit where action like 'keys.%'"),
        },
        keys=column("select key_id from s2s_keys"),
        notes=column("select count(*) from batch_notes")[0],
    )
