"""The faults, each as one coroutine that brings it about and takes it away again."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg2
from psycopg2 import sql
from twisted.internet.threads import deferToThread

from tests.faults import inside
from tests.faults.stage import DEAD_PEER_S, Stage, pause
from tests.support.peer import CHECK, framed
from tests.support.postgres import Session
from tests.support.proxy import Way
from tests.support.roles import environment


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    :param run: brings it about and takes it away.
    :param is_long: it takes so long that a short campaign leaves it out.
    """

    name: str
    run: Callable[[Stage], Awaitable[None]]
    is_long: bool = False


# --- processes ------------------------------------------------------------------------------------------------------


async def _kill(stage: Stage, *names: str) -> None:
    for name in names:
        getattr(stage, name).kill()
    await pause(stage.dice.uniform(0, 1))
    await stage.restart(*names)


async def _comes(is_there: Callable[[], bool], within_s: float) -> bool:
    """Wait for something, and give whether it came."""
    until = time.monotonic() + within_s
    while not (came := is_there()) and time.monotonic() < until:
        await pause(0.05)
    return came


#: Seconds that a process is given to come to the step at which it dies.
_STEP_S: Final = 15.0


async def _kill_at(stage: Stage, step: str) -> None:
    """Let a process die at a step; one that does not come there is killed all the same."""
    name = "engine" if step.split(".", maxsplit=1)[0] in ("relay", "order") else "server"
    most = 3 if step.startswith("order.") else 20
    role = getattr(stage, name)
    role.kill()
    stage.arm(name, (step, stage.dice.randint(1, most)))
    number = stage.history.invoke("campaign", "step", step=step)
    role.launch()
    came = await _comes(lambda: not role.is_running, _STEP_S)
    stage.history.end(number, "campaign", "step", "ok" if came else "fail")
    if not came:
        role.kill()
    await stage.restart(name)


async def _kill_migrate(stage: Stage, step: str) -> None:
    """Kill a migration of another database at a step, and see that the next one makes it whole."""
    name = f"migrated_{stage.dice.randrange(10**9)}"
    with Session(stage.url) as session:
        session.run(sql.SQL("create database {}").format(sql.Identifier(name)))
        url = stage.url.replace("/postgres?", f"/{name}?", 1)
        migrate = [sys.executable, "-m", "tests.faults.inside", "s2s", "db", "migrate", "--database", url]
        said = inside.variables({"die": (step, stage.dice.randint(1, 6))}, stage.directory)
        run = partial(subprocess.run, migrate, capture_output=True, text=True)
        await deferToThread(run, env=environment(**said))
        done = await deferToThread(run, env=environment(**inside.variables({}, stage.directory)))
        ours, theirs = (_schema(each) for each in (stage.url, url))
        is_whole = done.returncode == 0 and {*ours} - {"effects", "sector_changes"} == {*theirs}
        number = stage.history.invoke("campaign", "recovery", fault=f"kill at {step}")
        stage.history.end(number, "campaign", "recovery", "ok" if is_whole else "fail", seconds=0.0, why=done.stderr)
        session.run(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _schema(url: str) -> list[str]:
    with Session(url) as session:
        return [row[0] for row in session.run("select tablename::text from pg_tables where schemaname = 'public'")]


async def _freeze(stage: Stage, name: str) -> None:
    role = getattr(stage, name)
    role.freeze()
    await pause(DEAD_PEER_S + 1)
    role.thaw()


# --- the database ---------------------------------------------------------------------------------------------------


async def _database_killed(stage: Stage) -> None:
    await deferToThread(stage.cluster.kill)
    await deferToThread(stage.cluster.start)


async def _database_gone(stage: Stage, seconds: float) -> None:
    """Links stay up, and nothing is acked."""
    await deferToThread(stage.cluster.stop)
    # What was under way when it went may still be answered as it was.
    await pause(1)
    links = [pusher.links for pusher in stage.pushers]
    number = stage.history.invoke("campaign", "outage")
    await pause(seconds)
    lost = sum(pusher.links for pusher in stage.pushers) - sum(links)
    stage.history.end(number, "campaign", "outage", "ok", links_lost=lost)
    await deferToThread(stage.cluster.start)


async def _connections_killed(stage: Stage) -> None:
    kill = (
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 's2s%' and random() < 0.5"
    )
    for _ in range(3):
        await deferToThread(stage.execute, kill)
        await pause(0.2)


async def _read_only(stage: Stage) -> None:
    """Every new transaction is refused its writes, as by a standby after a failover."""
    alter = "alter database postgres set default_transaction_read_only = {}"
    leave = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 's2s%'"
    await deferToThread(stage.execute, alter.format("on"))
    await deferToThread(stage.execute, leave)
    await pause(3)
    await deferToThread(stage.execute, alter.format("off"))
    await deferToThread(stage.execute, leave)


_FULL: Final = ("commands", "outbox", "orders", "notices")


async def _disk_full(stage: Stage) -> None:
    """Every insert is refused with the error of a full disk."""
    make = (
        "create or replace function disk_full() returns trigger language plpgsql as $$ begin"
        " raise exception 'could not extend file: No space left on device' using errcode = '53100'; end $$;"
    )
    make += ";".join(
        f"create trigger disk_full before insert on {table} for each statement execute function disk_full()"
        for table in _FULL
    )
    await deferToThread(stage.execute, make)
    await pause(3)
    await deferToThread(stage.execute, ";".join(f"drop trigger disk_full on {table}" for table in _FULL))


async def _pool_taken(stage: Stage) -> None:
    """Every connection of the pools waits for a lock, for longer than a statement may take."""

    def lock() -> None:
        conn = psycopg2.connect(stage.url)
        with conn, conn.cursor() as txn:
            txn.execute("lock table commands, outbox, orders in access exclusive mode; select pg_sleep(9)")
        conn.close()

    await deferToThread(lock)


# --- the network ----------------------------------------------------------------------------------------------------


#: So old are requests that are sent again, in seconds; and so long a link is waited for on which they can be.
_OLD_S: Final = 3.0
_INJECT_S: Final = 5.0


async def _cut(stage: Stage) -> None:
    for _ in range(stage.dice.randint(1, 3)):
        stage.proxy.cut()
        await pause(stage.dice.uniform(0.1, 1))


async def _half_open(stage: Stage) -> None:
    stage.proxy.stall()
    await pause(DEAD_PEER_S + 1)
    stage.proxy.go_on()


async def _delayed(stage: Stage) -> None:
    for way in (stage.proxy.up, stage.proxy.down):
        way.delay_s = 0.4
    await pause(3)
    for way in (stage.proxy.up, stage.proxy.down):
        way.delay_s = 0.0
    # What is still on its way would be overtaken.
    stage.proxy.cut()


async def _throttled(stage: Stage) -> None:
    way = stage.dice.choice((stage.proxy.up, stage.proxy.down))
    way.bytes_per_second = 30.0
    await pause(5)
    way.bytes_per_second = None


async def _garbled(stage: Stage) -> None:
    way = stage.dice.choice((stage.proxy.up, stage.proxy.down))
    way.garble(stage.dice.randrange(2000))
    await pause(2)


async def _replayed_here(stage: Stage) -> None:
    """Requests of both sides are sent again over the link on which they came."""
    await _inject(stage, "same link", _requests(stage, stage.proxy.up), _requests(stage, stage.proxy.down))


async def _replayed_elsewhere(stage: Stage) -> None:
    """Those of the engine come over a link of the attacker's, those of the server over the engine's next one."""
    up, down = _requests(stage, stage.proxy.up), _requests(stage, stage.proxy.down)
    await deferToThread(_replay, stage, up)
    stage.proxy.cut()
    await stage.whole()
    await _inject(stage, "another link", [], down)


async def _replayed_after_restart(stage: Stage) -> None:
    """So do they when nobody remembers them any more; whoever asks for another's health then is answered."""
    up, down = _requests(stage, stage.proxy.up), _requests(stage, stage.proxy.down)
    await _kill(stage, "server", "engine")
    await stage.whole()
    await deferToThread(_replay, stage, [body for body in up if _type(body) != CHECK])
    await _inject(stage, "after a restart", [], [body for body in down if _type(body) != CHECK])


def _requests(stage: Stage, way: Way) -> list[bytes]:
    """Give some requests that went this way a while ago: no more of a kind than is needed."""
    found: dict[str, list[bytes]] = {}
    for body in way.recorded:
        frame = json.loads(body)
        if "ack_of" not in frame and "auth" in frame and frame["ts"] <= time.time() - _OLD_S:
            found.setdefault(frame["type"], []).append(body)
    return [body for bodies in found.values() for body in stage.dice.sample(bodies, min(5, len(bodies)))]


async def _inject(stage: Stage, where: str, up: list[bytes], down: list[bytes]) -> None:
    """Send frames again within the engine's link: a refusal ends it, and the next one comes on the next link."""
    ways = [(body, stage.proxy.up, stage.proxy.down) for body in up]
    ways += [(body, stage.proxy.down, stage.proxy.up) for body in down]
    for body, way, back in ways:
        number = stage.history.invoke("attacker", "replay", where=where, type=_type(body))
        before = sum(_answers(answer, body) for answer in back.recorded)
        await _comes(partial(stage.proxy.inject, body, way), _INJECT_S)
        await pause(0.3)
        answers = [answer for answer in back.recorded if _answers(answer, body)]
        if len(answers) > before:
            stage.history.end(number, "attacker", "replay", "ok", **_outcome(answers[-1]))
        else:
            stage.history.end(number, "attacker", "replay", "unknown")


def _replay(stage: Stage, bodies: list[bytes]) -> None:
    """Send recorded frames over a link of the attacker's, who has no key."""
    for body in bodies:
        number = stage.history.invoke("attacker", "replay", where="a link of his own", type=_type(body))
        try:
            told = _answer_to(stage.server.port, body)
        except OSError:
            told = None
        stage.history.end(number, "attacker", "replay", "unknown" if told is None else "ok", **(told or {}))


def _answer_to(port: int, body: bytes) -> dict[str, Any] | None:
    """Give what a server answers to a frame; ``None``: the end of the link."""
    with socket.create_connection(("127.0.0.1", port), 3) as link:
        link.sendall(framed(body))
        with link.makefile("rb") as stream:
            while head := stream.read(4):
                answer = stream.read(struct.unpack("!I", head)[0])
                if _answers(answer, body):
                    return _outcome(answer)
    return None


def _type(body: bytes) -> str:
    return str(json.loads(body)["type"])


def _answers(answer: bytes, request: bytes) -> bool:
    return bool(json.loads(answer).get("ack_of") == json.loads(request)["id"])


def _outcome(answer: bytes) -> dict[str, Any]:
    payload = json.loads(answer)["payload"]
    return {"code": payload.get("code", "ok"), "duplicate": payload.get("duplicate", False)}


# --- clocks and load ------------------------------------------------------------------------------------------------


async def _clock(stage: Stage, name: str, ahead_s: float) -> None:
    inside.set_clock(stage.clocks[name], ahead_s)
    await pause(4)
    inside.set_clock(stage.clocks[name], 0.0)


async def _reader_stops(stage: Stage) -> None:
    pusher = stage.dice.choice(stage.pushers)
    pusher.is_reading = False
    await pause(4)
    pusher.is_reading = True


async def _many_broadcasts(stage: Stage) -> None:
    await deferToThread(stage.typist.broadcast, f"many-{stage.dice.randrange(10**9)}", 10_000)


_JUMP_S: Final = 600.0

FAULTS: Final = (
    Fault("kill the server", lambda stage: _kill(stage, "server")),
    Fault("kill the engine", lambda stage: _kill(stage, "engine")),
    Fault("kill both", lambda stage: _kill(stage, "server", "engine")),
    *(
        Fault(f"kill at {step}", partial(_kill_migrate if step.startswith("migrate.") else _kill_at, step=step))
        for step in inside.STEPS
    ),
    Fault("stop the server", lambda stage: _freeze(stage, "server")),
    Fault("stop the engine", lambda stage: _freeze(stage, "engine")),
    Fault("kill the database", _database_killed),
    Fault("no database", partial(_database_gone, seconds=5.0)),
    Fault("no database for 30 s", partial(_database_gone, seconds=30.0), is_long=True),
    Fault("kill connections", _connections_killed),
    Fault("read-only database", _read_only),
    Fault("full disk", _disk_full),
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
    Fault("reader that stops", _reader_stops),
    Fault("10,000 broadcasts", _many_broadcasts, is_long=True),
)
