"""Changes inside a role's process: a breakpoint at a named step, another clock, and code that breaks a promise.

``python -m campaigns.faults.instrumentation`` runs ``twistd`` with these changes, or ``s2s`` if the first argument is
``s2s``. The variable ``S2S_FAULTS`` configures them, as JSON: ``{"breakpoint": FILE, "break": "NAME"}``.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

VARIABLE: Final = "S2S_FAULTS"
#: The root directory of the sources.
ROOT: Final = Path(__file__).parents[2]

#: Steps at which a process can be made to stand still: module, owner and name of a function, and before or after it.
STEPS: Final = {
    "push.write": ("s2s.store.async_connection", "AsyncConnection", "query", "before"),
    "push.sent": ("s2s.store.async_connection", "AsyncConnection", "_execute", "after"),
    "push.commit": ("s2s.store.async_connection", "AsyncConnection", "_end", "before"),
    "push.ack": ("s2s.roles.server.inbox", "Inbox", "_answer", "before"),
    "claim.note": ("s2s.store.tables.claims", "", "claim", "before"),
    "claim.commit": ("s2s.store.tables.claims", "", "claim", "after"),
    "run.take": ("s2s.store.tables.commands", "", "take", "after"),
    "run.effect": ("s2s.roles.server.executor", "Executor", "_run_group", "after"),
    "finish.write": ("s2s.store.tables.commands", "", "finish", "before"),
    "finish.commit": ("s2s.store.tables.claims", "", "release", "after"),
    "finish.told": ("s2s.roles.server.executor", "Executor", "_count", "before"),
    "relay.claim": ("s2s.store.tables.outbox", "Claims", "claim", "after"),
    "relay.send": ("s2s.roles.engine.relay", "Relay", "_send", "after"),
    "relay.ack": ("s2s.roles.engine.relay", "Relay", "_pushed", "before"),
    "relay.settle": ("s2s.store.tables.outbox", "", "delete", "before"),
    "relay.commit": ("s2s.store.tables.outbox", "", "delete", "after"),
    "relay.settled": ("s2s.roles.engine.relay", "Relay", "_settled", "before"),
    "order.attempt": ("s2s.store.tables.orders", "", "attempt", "after"),
    "order.hold": ("s2s.store.tables.orders", "", "hold", "after"),
    "order.effect": ("s2s.world.tables", "", "set_sector_status", "after"),
    "order.finish": ("s2s.store.tables.orders", "", "finish", "after"),
    "order.told": ("s2s.roles.engine.order_runner", "OrderRunner", "_tell", "before"),
    "migrate.file": ("s2s.store.migrations", "", "_refuse_newer", "after"),
    "migrate.settings": ("s2s.store.tables.config", "", "declare", "after"),
}
_NUMBERS: Final = {step: number for number, step in enumerate(STEPS, 1)}


class Breakpoint:
    """Controls a process by a file that the campaign and the process map into memory; a missing file is created.

    The file contains the seconds by which the process's wall clock is ahead, and the step and the number of the visit
    at which the process is to stand still.
    """

    _CLOCK: Final = struct.Struct("d")
    _STEP: Final = struct.Struct("=ii")

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(self._CLOCK.size + self._STEP.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._lock = threading.Lock()

    @property
    def ahead_s(self) -> float:
        """Seconds by which the clock is ahead."""
        return float(self._CLOCK.unpack_from(self._map)[0])

    @ahead_s.setter
    def ahead_s(self, seconds: float) -> None:
        self._CLOCK.pack_into(self._map, 0, seconds)

    def hold(self, step: str, coming: int = 1) -> None:
        """Let the process stand still once, at the given visit of a step, counted from now."""
        self._STEP.pack_into(self._map, self._CLOCK.size, _NUMBERS[step], coming)

    def release(self) -> None:
        """Let the process pass every step."""
        self._STEP.pack_into(self._map, self._CLOCK.size, 0, 0)

    def come(self, number: int) -> None:
        """Visit a step, in any thread of the process, and stand still there if the file says so."""
        with self._lock:
            wanted, coming = self._STEP.unpack_from(self._map, self._CLOCK.size)
            if wanted != number:
                return
            if coming > 1:
                self._STEP.pack_into(self._map, self._CLOCK.size, wanted, coming - 1)
                return
            self.release()
        # Signal this thread, so that it does not go on before the whole process stands still.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _watch_steps(point: Breakpoint) -> None:
    for step in STEPS:
        _watch(point, step)


def _watch(point: Breakpoint, step: str) -> None:
    module_name, owner_name, name, when = STEPS[step]
    owner: Any = import_module(module_name)
    if owner_name:
        owner = getattr(owner, owner_name)
    original = getattr(owner, name)
    number = _NUMBERS[step]

    def stepping(*args: Any, **how: Any) -> Any:
        if when == "before":
            point.come(number)
        result = original(*args, **how)
        if when == "after":
            point.come(number)
        return result

    setattr(owner, name, stepping)


def _move_clock(point: Breakpoint) -> None:
    true = time.time
    time.time = lambda: true() + point.ahead_s


def variables(point: Breakpoint, plugins: Path, breaks: str | None = None) -> dict[str, str]:
    """Return the environment variables of a process with these changes.

    :param plugins: a directory with a package ``s2s.plugins``.
    :param breaks: the name of a promise to break, of :data:`BREAKS`.
    """
    said = {"breakpoint": str(point.path), "break": breaks}
    return {VARIABLE: json.dumps(said), "PYTHONPATH": f"{ROOT}{os.pathsep}{plugins}"}


# --- breaking promises ------------------------------------------------------------------------------------------------


def _ack_before_commit() -> None:
    """Ack a push before its COMMIT."""
    from twisted.internet.defer import succeed

    from s2s.roles.server import inbox

    push = inbox.Inbox.push

    def hurry(self: Any, payload: Any) -> Any:
        answer = push(self, payload)
        if answer.called:  # refused
            return answer
        answer.addErrback(lambda _: None)
        return succeed({"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"})

    inbox.Inbox.push = hurry


def _no_savepoint() -> None:
    """Do not roll back the changes of a command that fails."""
    from contextlib import contextmanager

    from s2s.store import handler_pool

    @contextmanager
    def nothing(*_: object) -> Any:
        yield

    handler_pool.savepoint = nothing


def _no_replay_cache() -> None:
    """Treat every request as new."""
    from s2s.protocol import replay

    replay.ReplayCache.enter = lambda *_, **__: None


def _no_idempotency() -> None:
    """Insert a command for every push, also if its key exists."""
    from s2s.store.tables import commands

    any_number = f"from (select coalesce((select cmd_id from fresh), {commands._NEXT}) as cmd_id) any_number"
    for insert, decides, nothing in (
        (commands._INSERT, "where cmd_id in (select cmd_id from fresh)", ""),
        (commands._INSERT_ONE, "from fresh", any_number),
    ):
        assert decides in insert.prepare
        insert.prepare = insert.prepare.replace(decides, nothing)


def _outbox_elsewhere() -> None:
    """Insert outbox rows in another transaction than that of their cause, 3 s later."""
    from s2s.store.tables import outbox

    put_batch = outbox.put_batch

    def put(txn: Any, cmd_type: str, commands: Any, **how: Any) -> None:
        dsn = txn.connection.dsn

        def later() -> None:
            import psycopg2

            with psycopg2.connect(dsn) as conn, conn.cursor() as other:
                put_batch(other, cmd_type, commands, **how)

        threading.Timer(3.0, later).start()

    outbox.put_batch = put


def _no_order_lock() -> None:
    """Let every engine that has read an order run it, and delay the orders of every other sector."""
    from s2s.store.tables import orders
    from s2s.world import tables as world

    orders.hold = lambda *_: True
    set_status = world.set_sector_status

    def slowly(txn: Any, sector_id: int, *args: Any) -> Any:
        # If all orders were slow, no engine would have time to read an order that another engine runs.
        time.sleep(2.5 * (sector_id % 2))
        return set_status(txn, sector_id, *args)

    world.set_sector_status = slowly


BREAKS: Final[dict[str, Callable[[], None]]] = {
    "ack-before-commit": _ack_before_commit,
    "no-idempotency": _no_idempotency,
    "no-order-lock": _no_order_lock,
    "no-savepoint": _no_savepoint,
    "outbox-elsewhere": _outbox_elsewhere,
    "no-replay-cache": _no_replay_cache,
}


def _main() -> None:
    said = json.loads(os.environ[VARIABLE])
    point = Breakpoint(Path(said["breakpoint"]))
    _move_clock(point)  # before any module of s2s is imported, which could keep a reference to the original time.time
    _watch_steps(point)
    if said["break"] is not None:
        BREAKS[said["break"]]()


if __name__ == "__main__":
    _main()
    if sys.argv[1:2] == ["s2s"]:
        from s2s.cli import main

        del sys.argv[1]
        main()
    else:
        from twisted.scripts import twistd

        twistd.run()
