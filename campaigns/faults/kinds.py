"""The faults, each as one coroutine that causes it and ends it, and the moments at which they begin."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psutil
import psycopg2
from psycopg2 import sql
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from campaigns.faults import instrumentation, misbehaving_handlers
from campaigns.faults.testbed import DEAD_PEER_S, TestBed, comes
from s2s.runtime import watchdog
from tests.support import clock_fault
from tests.support.flood import StrangersFlood
from tests.support.peer import CHECK, framed
from tests.support.postgres import Session
from tests.support.proxy import Way
from tests.support.roles import environment
from tests.support.waiting import pause


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    :param run: causes the fault and ends it.
    :param is_long: the fault takes so long that it begins at random moments only, and not in a short campaign.
    """

    name: str
    run: Callable[[TestBed], Awaitable[None]]
    is_long: bool = False


@dataclass(frozen=True)
class Attack:
    """A fault and its moment.

    :param step: the step of ``instrumentation.STEPS`` at which a process stands still when the fault begins; ``None``:
        any moment.
    """

    fault: Fault
    step: str | None = None

    @property
    def name(self) -> str:
        """The name of the attack."""
        return self.fault.name if self.step is None else f"{self.fault.name} at {self.step}"

    async def run(self, bed: TestBed) -> None:
        """Cause the fault at its moment, and end it."""
        if self.step is None:
            await self.fault.run(bed)
        elif self.step.startswith("migrate."):
            await _while_it_migrates(bed, self.step, self.fault)
        else:
            await _at(bed, self.step, self.fault)


#: Seconds within which a process must reach the step at which it is to stand still. It stands still at a random visit
#: of the step, at the latest at this one. A migration runs several files and declares the settings once.
_STEP_S: Final = 15.0
_COMINGS: Final = 3
_MIGRATED: Final = {"migrate.file": 11, "migrate.settings": 1}


async def _at(bed: TestBed, step: str, fault: Fault) -> None:
    """Begin a fault while a process stands still at a step, and resume the process before the fault ends."""
    name = "engine" if step.split(".", maxsplit=1)[0] in ("relay", "order") else "server"
    number = bed.history.invoke("campaign", "step", step=step)
    came = await bed.hold_at(name, step, bed.rng.randint(1, _COMINGS), _STEP_S)
    bed.history.end(number, "campaign", "step", "ok" if came else "fail")
    under_way = Deferred.fromCoroutine(fault.run(bed))
    if came:
        await pause(bed.rng.uniform(0, 0.5))
        bed.let_go(name)
    await under_way


async def _while_it_migrates(bed: TestBed, step: str, fault: Fault) -> None:
    """Cause a fault while a migration of another database stands still, and check that the next one completes it."""
    name = f"migrated_{bed.rng.randrange(10**9)}"
    with Session(bed.url) as session:
        session.run(sql.SQL("create database {}").format(sql.Identifier(name)))
    url = bed.url.replace("/postgres?", f"/{name}?", 1)
    point = instrumentation.Breakpoint(bed.directory / f"{name}.breakpoint")
    point.hold(step, bed.rng.randint(1, _MIGRATED[step]))
    said = environment(**instrumentation.variables(point, bed.directory))
    migrate = [sys.executable, "-m", "campaigns.faults.instrumentation", "s2s", "db", "migrate", "--database", url]
    with subprocess.Popen(migrate, env=said, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as held:
        process = psutil.Process(held.pid)
        number = bed.history.invoke("campaign", "step", step=step)
        came = await comes(lambda: process.status() == psutil.STATUS_STOPPED, _STEP_S)
        bed.history.end(number, "campaign", "step", "ok" if came else "fail")
        if fault is _KILL_MIGRATION:
            held.kill()
        else:
            await fault.run(bed)
        held.send_signal(signal.SIGCONT)
        _, told = await deferToThread(held.communicate)
    point.release()
    again = await deferToThread(partial(subprocess.run, migrate, env=said, capture_output=True, text=True))
    ours, theirs = [await deferToThread(_schema, each) for each in (bed.url, url)]
    is_whole = again.returncode == 0 and {*ours} == {*theirs}
    if not is_whole or "Traceback" in told:
        bed.surprise("migration", AssertionError(f"{told}{again.stderr} {sorted({*ours} ^ {*theirs})}"))
    with Session(bed.url) as session:
        session.run(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _schema(url: str) -> list[str]:
    with Session(url) as session:
        tables = "select schemaname || '.' || tablename from pg_tables where schemaname in ('s2s', 's2s_world')"
        return [row[0] for row in session.run(tables)]


# --- processes ------------------------------------------------------------------------------------------------------


async def _kill(bed: TestBed, *names: str) -> None:
    for name in names:
        bed.role(name).kill()
    await pause(bed.rng.uniform(0, 1))
    await bed.restart(*names)


async def _stop(bed: TestBed, name: str) -> None:
    bed.hold(name)
    await pause(DEAD_PEER_S + 1)
    bed.let_go(name)


async def _end(bed: TestBed, name: str) -> None:
    await bed.end_role(name)
    await bed.restart(name)


async def _shut_down(bed: TestBed) -> None:
    """Shut the engine down over HTTP; the request is repeated, since it may be lost without an answer."""
    role = bed.role("engine")
    for _ in range(5):
        await deferToThread(bed.workload.shut_down)
        if await comes(lambda: not role.is_running, _STEP_S):
            break
    try:
        await deferToThread(role.assert_ended_well)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        bed.surprise("engine", error)
        role.kill()
    await bed.restart("engine")


# --- the database ---------------------------------------------------------------------------------------------------


async def _database_killed(bed: TestBed) -> None:
    await deferToThread(bed.cluster.kill)
    await deferToThread(bed.cluster.start)


async def _database_gone(bed: TestBed, seconds: float) -> None:
    """Stop the database for some seconds; links stay up meanwhile, and nothing is acked."""
    await deferToThread(bed.cluster.stop)
    # Requests that were in flight when the database stopped may still be acked.
    await pause(1)
    links = _links(bed)
    number = bed.history.invoke("campaign", "outage")
    await pause(seconds)
    bed.history.end(number, "campaign", "outage", "ok", links_lost=_links(bed) - links)
    await deferToThread(bed.cluster.start)


def _links(bed: TestBed) -> int:
    """Return the number of all links so far, including those of the real engine."""
    return bed.proxy.connections + sum(pusher.links for pusher in bed.pushers)


async def _connections_killed(bed: TestBed) -> None:
    kill = (
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 's2s%' and random() < 0.5"
    )
    for _ in range(3):
        await deferToThread(bed.execute, kill)
        await pause(0.2)


async def _read_only(bed: TestBed) -> None:
    """Make every new transaction read-only, as on a standby after a failover, and end the sessions before and after."""
    alter = "alter database postgres set default_transaction_read_only = {}"
    leave = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 's2s%'"
    await deferToThread(bed.execute, alter.format("on"))
    await deferToThread(bed.execute, leave)
    await pause(3)
    await deferToThread(bed.execute, alter.format("off"))
    await deferToThread(bed.execute, leave)


async def _read_only_by_itself(bed: TestBed) -> None:
    """Make the sessions that begin during the fault read-only from their start, and do not end them afterwards."""
    alter = "alter database postgres set default_transaction_read_only = {}"
    await deferToThread(bed.execute, alter.format("on"))
    await deferToThread(
        bed.execute, "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 's2s%'"
    )
    await pause(3)
    await deferToThread(bed.execute, alter.format("off"))


async def _snapshot_held(bed: TestBed) -> None:
    """Hold a snapshot in a transaction while the clients work: VACUUM can remove no dead row meanwhile."""

    def hold() -> None:
        with closing(psycopg2.connect(bed.url)) as conn, conn, conn.cursor() as txn:
            txn.execute("set transaction isolation level repeatable read; select count(*) from s2s.commands")
            txn.execute("select pg_sleep(10)")

    await deferToThread(hold)


_FULL: Final = ("s2s.commands", "s2s.outbox", "s2s.orders", "s2s.notices")


async def _disk_full(bed: TestBed) -> None:
    """Refuse every insert into the main tables with the error of a full disk.

    The error is PostgreSQL's own: s2s reports an error that the function raises itself as an error of the function.
    """
    make = (
        "create or replace function disk_full() returns trigger language plpgsql set search_path from current"
        " as $$ begin"
        " copy (select 1) to '/dev/full'; return null; end $$"
    )
    trigger = "create trigger disk_full before insert on {} for each statement execute function disk_full()"
    # Each in a transaction of its own: locks on several tables at once could deadlock with the clients' work.
    await deferToThread(bed.execute, make)
    for table in _FULL:
        await deferToThread(bed.execute, trigger.format(table))
    await pause(3)
    if bed.server.is_running and not bed.server.is_frozen and "SQLSTATE 53100" not in bed.server.whole_log:
        bed.surprise("server", AssertionError("the log does not mention the full disk"))
    for table in _FULL:
        await deferToThread(bed.execute, f"drop trigger disk_full on {table}")


async def _pool_taken(bed: TestBed) -> None:
    """Lock three tables for longer than a statement may take, so that every connection of the pools waits."""

    def lock(table: str) -> None:
        with closing(psycopg2.connect(bed.url)) as conn, conn, conn.cursor() as txn:
            txn.execute(f"lock table {table} in access exclusive mode; select pg_sleep(9)")

    await gatherResults([deferToThread(lock, table) for table in ("s2s.commands", "s2s.outbox", "s2s.orders")])


# --- the network ----------------------------------------------------------------------------------------------------


#: Least age of the requests that are sent again, in seconds; and seconds to wait for a link on which to send them.
_OLD_S: Final = 3.0
_INJECT_S: Final = 5.0


async def _cut(bed: TestBed) -> None:
    for _ in range(bed.rng.randint(1, 3)):
        bed.proxy.cut()
        await pause(bed.rng.uniform(0.1, 1))


async def _half_open(bed: TestBed) -> None:
    bed.proxy.stall()
    await pause(DEAD_PEER_S + 1)
    bed.proxy.go_on()


async def _delayed(bed: TestBed) -> None:
    for way in (bed.proxy.up, bed.proxy.down):
        way.delay_s = 0.4
    await pause(3)
    for way in (bed.proxy.up, bed.proxy.down):
        way.delay_s = 0.0
    # Without a cut, later bytes would overtake the delayed ones.
    bed.proxy.cut()


async def _throttled(bed: TestBed) -> None:
    way = bed.rng.choice((bed.proxy.up, bed.proxy.down))
    way.bytes_per_second = 30.0
    await pause(5)
    way.bytes_per_second = None


async def _garbled(bed: TestBed) -> None:
    way = bed.rng.choice((bed.proxy.up, bed.proxy.down))
    way.garble(bed.rng.randrange(2000))
    await pause(2)


@dataclass(frozen=True)
class _Recorded:
    """A request that went over the proxy.

    :param was_accepted: whether the proxy saw a reply that accepted it.
    :param was_skewed: whether a peer with a wrong clock refused it; the peer's replay cache does not have it then.
    """

    body: bytes
    was_accepted: bool
    was_skewed: bool

    @property
    def type(self) -> str:
        return str(json.loads(self.body)["type"])

    def is_answered_by(self, answer: bytes) -> bool:
        return bool(json.loads(answer).get("ack_of") == json.loads(self.body)["id"])


async def _replayed_here(bed: TestBed) -> None:
    """Send requests of both sides again over the same link."""
    await _inject(bed, "same link", _up(bed), _down(bed))


async def _replayed_elsewhere(bed: TestBed) -> None:
    """Send the engine's requests again over the attacker's link, and the server's over the engine's next link."""
    up, down = _up(bed), _down(bed)
    await deferToThread(_replay, bed, up)
    bed.proxy.cut()
    await bed.whole()
    await _inject(bed, "another link", [], down)


async def _replayed_after_restart(bed: TestBed) -> None:
    """Send requests again on other links after a restart of both roles, when no replay cache has them any more.

    Health checks are left out, since they are answered then.
    """
    up, down = _up(bed), _down(bed)
    await _kill(bed, "server", "engine")
    await bed.whole()
    await deferToThread(_replay, bed, [each for each in up if each.type != CHECK])
    await _inject(bed, "after a restart", [], [each for each in down if each.type != CHECK])


def _up(bed: TestBed) -> list[_Recorded]:
    return _requests(bed, bed.proxy.up, bed.proxy.down)


def _down(bed: TestBed) -> list[_Recorded]:
    return _requests(bed, bed.proxy.down, bed.proxy.up)


def _requests(bed: TestBed, way: Way, back: Way) -> list[_Recorded]:
    """Return old requests of one direction: at most five of each type."""
    answers = [json.loads(answer) for answer in back.recorded]
    accepted = {answer.get("ack_of") for answer in answers if answer["payload"].get("accepted") is True}
    skewed = {answer.get("ack_of") for answer in answers if answer["payload"].get("code") == "ts_skew"}
    found: dict[str, list[_Recorded]] = {}
    for body in way.recorded:
        frame = json.loads(body)
        if "ack_of" not in frame and "auth" in frame and frame["ts"] <= time.time() - _OLD_S:
            recorded = _Recorded(body, frame["id"] in accepted, frame["id"] in skewed)
            found.setdefault(frame["type"], []).append(recorded)
    return [each for kind in found.values() for each in bed.rng.sample(kind, min(5, len(kind)))]


def _asked(bed: TestBed, where: str, request: _Recorded) -> int:
    told = {
        "where": where,
        "type": request.type,
        "id": json.loads(request.body)["id"],
        "was_accepted": request.was_accepted,
        "was_skewed": request.was_skewed,
    }
    return bed.history.invoke("attacker", "replay", **told)


async def _inject(bed: TestBed, where: str, up: list[_Recorded], down: list[_Recorded]) -> None:
    """Send frames again within the engine's link; a refusal ends that link, and the next frame uses the next link."""
    ways = [(request, bed.proxy.up, bed.proxy.down) for request in up]
    ways += [(request, bed.proxy.down, bed.proxy.up) for request in down]
    for request, way, back in ways:
        number = _asked(bed, where, request)
        before = sum(map(request.is_answered_by, back.recorded))
        await comes(partial(bed.proxy.inject, request.body, way), _INJECT_S)
        await pause(0.3)
        answers = [answer for answer in back.recorded if request.is_answered_by(answer)]
        if len(answers) > before:
            bed.history.end(number, "attacker", "replay", "ok", **_outcome(answers[-1]))
        else:
            bed.history.end(number, "attacker", "replay", "unknown")


def _replay(bed: TestBed, requests: list[_Recorded]) -> None:
    """Send recorded frames over a link of the attacker, who has no key."""
    for request in requests:
        number = _asked(bed, "a link of his own", request)
        try:
            told = _answer_to(bed.server.port, request)
        except OSError:
            told = None
        bed.history.end(number, "attacker", "replay", "unknown" if told is None else "ok", **(told or {}))


def _answer_to(port: int, request: _Recorded) -> dict[str, Any] | None:
    """Return the outcome of a server's reply to a frame; ``None``: the link ended without a reply."""
    with socket.create_connection(("127.0.0.1", port), 3) as link:
        link.sendall(framed(request.body))
        with link.makefile("rb") as stream:
            while head := stream.read(4):
                answer = stream.read(struct.unpack("!I", head)[0])
                if request.is_answered_by(answer):
                    return _outcome(answer)
    return None


def _outcome(answer: bytes) -> dict[str, Any]:
    payload = json.loads(answer)["payload"]
    return {"code": payload.get("code", "ok"), "duplicate": payload.get("duplicate", False)}


# --- handlers -------------------------------------------------------------------------------------------------------


async def _misbehave(bed: TestBed, cmd_type: str) -> None:
    """Emit commands whose handlers misbehave; each must still take effect once."""
    keys = [f"{cmd_type}-{bed.rng.randrange(10**9)}-{number}" for number in range(3)]
    await deferToThread(bed.emit, cmd_type, *keys[: 3 if cmd_type == misbehaving_handlers.Dirty.cmd_type else 1])


#: Seconds within which the watchdog must end a server. The watchdog waits for 15 s of CPU time of that process, which
#: shares the cores with all other processes of the campaign.
_WATCHDOG_S: Final = 90.0


async def _interpreter_held(bed: TestBed) -> None:
    """Let a handler hold the interpreter lock of the server, and check that the watchdog ends that process."""
    await _misbehave(bed, misbehaving_handlers.Holding.cmd_type)
    role = bed.role("server")
    await comes(lambda: not role.is_running, _WATCHDOG_S)
    if role.exit_code != -watchdog.SIGNAL:
        bed.surprise("server", AssertionError(f"the watchdog has not ended it: exit code {role.exit_code}"))
        role.kill()
    await bed.restart("server")


async def _hangup(bed: TestBed) -> None:
    """Send SIGHUP to both roles, and check that neither ends."""
    for name in ("server", "engine"):
        role = bed.role(name)
        pid = role.pid
        os.kill(pid, signal.SIGHUP)
        await pause(0.5)
        if role.pid == pid and not role.is_running:
            bed.surprise(name, AssertionError("SIGHUP has ended it"))


# --- clocks and load ------------------------------------------------------------------------------------------------


async def _clock(bed: TestBed, name: str, ahead_s: float) -> None:
    bed.breakpoints[name].ahead_s = ahead_s
    await pause(4)
    bed.breakpoints[name].ahead_s = 0.0


#: Seconds for which the database's clock is ahead; :mod:`tests.support.clock_fault` defines by how much.
_LEAP_S: Final = 13.0


async def _database_clock(bed: TestBed) -> None:
    """Date the rows that the roles write during the fault two hours later."""
    await deferToThread(clock_fault.begin, bed.execute)
    await pause(_LEAP_S)
    await deferToThread(clock_fault.end, bed.execute)


async def _reader_stops(bed: TestBed) -> None:
    pusher = bed.rng.choice(bed.pushers)
    pusher.is_reading = False
    await pause(4)
    pusher.is_reading = True


async def _strangers(bed: TestBed) -> None:
    """Send large frames from a client without a key, 40 a second."""
    flood = StrangersFlood(bed.server.port, rate=40, seconds=5)
    flood.start()
    while flood.is_alive():
        await pause(0.1)


async def _many_broadcasts(bed: TestBed) -> None:
    await deferToThread(bed.workload.broadcast, f"many-{bed.rng.randrange(10**9)}", 10_000)


_JUMP_S: Final = 600.0

_KILLS: Final = (
    Fault("kill the server", lambda bed: _kill(bed, "server")),
    Fault("kill the engine", lambda bed: _kill(bed, "engine")),
    Fault("kill both", lambda bed: _kill(bed, "server", "engine")),
)
#: Faults that are also used during a migration.
_KILL_DATABASE: Final = Fault("kill the database", _database_killed)
_KILL_CONNECTIONS: Final = Fault("kill connections", _connections_killed)
FAULTS: Final = (
    *_KILLS,
    Fault("stop the server", lambda bed: _stop(bed, "server")),
    Fault("stop the engine", lambda bed: _stop(bed, "engine")),
    Fault("end the server", lambda bed: _end(bed, "server")),
    Fault("shut the engine down", _shut_down),
    _KILL_DATABASE,
    _KILL_CONNECTIONS,
    Fault("no database", partial(_database_gone, seconds=5.0)),
    Fault("no database for 30 s", partial(_database_gone, seconds=30.0), is_long=True),
    Fault("read-only database", _read_only),
    Fault("read-only database left to itself", _read_only_by_itself),
    Fault("full disk", _disk_full),
    Fault("snapshot held", _snapshot_held, is_long=True),
    Fault("hanging handler", partial(_misbehave, cmd_type=misbehaving_handlers.Hanging.cmd_type), is_long=True),
    Fault("handler that holds the interpreter", _interpreter_held, is_long=True),
    Fault("dirty handler", partial(_misbehave, cmd_type=misbehaving_handlers.Dirty.cmd_type)),
    Fault("SIGHUP", _hangup),
    Fault("pools taken", _pool_taken),
    Fault("cut link", _cut),
    Fault("half-open link", _half_open),
    Fault("delayed link", _delayed),
    Fault("throttled link", _throttled),
    Fault("garbled byte", _garbled),
    Fault("replay on the same link", _replayed_here),
    Fault("replay on another link", _replayed_elsewhere),
    Fault("replay after a restart", _replayed_after_restart),
    *(
        Fault(f"clock of the {name} {ahead_s / 60:+g} min", partial(_clock, name=name, ahead_s=ahead_s))
        for name in ("server", "engine")
        for ahead_s in (_JUMP_S, -_JUMP_S)
    ),
    Fault("clock of the database", _database_clock, is_long=True),
    Fault("reader that stops", _reader_stops),
    Fault("flood of strangers", _strangers),
    Fault("10,000 broadcasts", _many_broadcasts, is_long=True),
)
_KILL_MIGRATION: Final = Fault("kill the migration", lambda _: pause(0))


def _attacks() -> Iterator[Attack]:
    for fault in FAULTS:
        yield Attack(fault)
    for step in instrumentation.STEPS:
        at_step = (_KILL_MIGRATION, _KILL_DATABASE, _KILL_CONNECTIONS) if step.startswith("migrate.") else FAULTS
        for fault in at_step:
            if not fault.is_long:
                yield Attack(fault, step)


ATTACKS: Final = tuple(_attacks())


def program(attacks: Sequence[Attack], seed: int) -> Iterator[Attack]:
    """Yield attacks endlessly, in an order that depends only on the seed.

    Each round has every fault at a random moment, and every step with one fault. A step gets the kills first, then all
    other faults, before any fault is repeated.
    """
    rng = random.Random(f"program {seed}")
    left: dict[str, list[Attack]] = {}
    while True:
        this_round = [attack for attack in attacks if attack.step is None]
        for step in dict.fromkeys(attack.step for attack in attacks if attack.step is not None):
            if not left.get(step):
                at_step = [attack for attack in attacks if attack.step == step]
                at_step = rng.sample(at_step, len(at_step))
                # pop() takes the last attack, so the kills stand at the end.
                left[step] = sorted(at_step, key=lambda attack: attack.fault in (*_KILLS, _KILL_MIGRATION))
            this_round.append(left[step].pop())
        rng.shuffle(this_round)
        yield from this_round
