"""What is done inside a role's process: dying at a named step, another clock, and what breaks a promise on purpose.

``python -m tests.faults.inside`` is ``twistd`` with these. The variable ``S2S_FAULTS`` says which, as JSON:
``{"die": ["push.commit", 3], "clock": FILE, "break": "NAME"}``.
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
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

VARIABLE: Final = "S2S_FAULTS"
#: Of the sources.
ROOT: Final = Path(__file__).parents[2]

#: Where a process can be made to die: before or after a function of ours, by its module, its owner and its name.
STEPS: Final = {
    "push.write": ("s2s.store.commands", "", "push_batch", "before"),
    "push.commit": ("s2s.store.commands", "", "push_batch", "after"),
    "push.ack": ("s2s.inbox", "Inbox", "_answer", "before"),
    "claim.note": ("s2s.store.notes", "", "claim", "before"),
    "claim.commit": ("s2s.store.notes", "", "claim", "after"),
    "run.take": ("s2s.store.commands", "", "take", "after"),
    "run.effect": ("s2s.executor", "Executor", "_run_group", "after"),
    "finish.write": ("s2s.store.commands", "", "finish", "before"),
    "finish.commit": ("s2s.store.notes", "", "strike", "after"),
    "finish.told": ("s2s.executor", "Executor", "_count", "before"),
    "relay.claim": ("s2s.store.outbox", "", "claim", "after"),
    "relay.send": ("s2s.relay", "Relay", "_send", "after"),
    "relay.ack": ("s2s.relay", "Relay", "_pushed", "before"),
    "relay.settle": ("s2s.store.outbox", "", "delete", "before"),
    "relay.commit": ("s2s.store.outbox", "", "delete", "after"),
    "relay.settled": ("s2s.relay", "Relay", "_settled", "before"),
    "order.attempt": ("s2s.store.orders", "", "attempt", "after"),
    "order.hold": ("s2s.store.orders", "", "hold", "after"),
    "order.effect": ("s2s.store.world", "", "set_sector_status", "after"),
    "order.finish": ("s2s.store.orders", "", "finish", "after"),
    "order.told": ("s2s.order_runner", "OrderRunner", "_tell", "before"),
    "migrate.file": ("s2s.store.migrations", "", "_refuse_newer", "after"),
    "migrate.settings": ("s2s.store.config", "", "declare", "after"),
}


def _die_at(step: str, count: int) -> None:
    """Kill this process when it comes to a step for the so manyth time."""
    module_name, owner_name, name, when = STEPS[step]
    owner: Any = import_module(module_name)
    if owner_name:
        owner = getattr(owner, owner_name)
    original = getattr(owner, name)
    lock, left = threading.Lock(), [count]

    def pass_by() -> None:
        with lock:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def stepping(*args: Any, **how: Any) -> Any:
        if when == "before":
            pass_by()
        result = original(*args, **how)
        if when == "after":
            pass_by()
        return result

    setattr(owner, name, stepping)


def _move_clock(path: str) -> None:
    """Let the wall clock be as far ahead as a file says, at any time."""
    with Path(path).open("rb") as file:
        shared = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    true = time.time
    time.time = lambda: true() + struct.unpack_from("d", shared)[0]


def set_clock(path: Path, ahead_s: float) -> None:
    """Say how far ahead the clock of the processes is that look at a file."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(struct.pack("d", ahead_s))


def variables(said: Mapping[str, Any], plugins: Path) -> dict[str, str]:
    """Give the variables of a process with faults inside.

    :param plugins: a directory with a package ``s2s.plugins``.
    """
    return {VARIABLE: json.dumps(said), "PYTHONPATH": f"{ROOT}{os.pathsep}{plugins}"}


# --- breaking promises ------------------------------------------------------------------------------------------------


def _ack_before_commit() -> None:
    """Acks before the COMMIT."""
    from s2s import inbox
    from s2s.store.commands import Outcome

    commit = inbox.Inbox._commit

    async def hurry(self: Any, batch: Any) -> None:
        for waiter in batch:
            self._answer(waiter, Outcome(1, "ready", is_new=True))
        self._answer = lambda *_: None
        try:
            await commit(self, batch)
        finally:
            del self._answer

    inbox.Inbox._commit = hurry


def _no_savepoint() -> None:
    """Undoes nothing of a command that fails."""
    from contextlib import contextmanager

    from s2s import executor

    @contextmanager
    def nothing(_: object) -> Any:
        yield

    executor.savepoint = nothing


def _no_replay_cache() -> None:
    """Takes every request as new."""
    from s2s import replay

    replay.ReplayCache.enter = lambda *_, **__: None


def _no_idempotency() -> None:
    """Lets nothing decide which push of a key is the first."""
    from s2s.store import commands

    commands._INSERT = commands._INSERT.replace("where cmd_id in (select cmd_id from fresh)", "")


def _outbox_elsewhere() -> None:
    """Writes what is to be sent in another transaction than that of its cause, a moment later."""
    from s2s.store import outbox

    put_batch = outbox.put_batch

    def put(txn: Any, cmd_type: str, commands: Any, **how: Any) -> None:
        dsn = txn.connection.dsn

        def later() -> None:
            import psycopg2

            with psycopg2.connect(dsn) as conn, conn.cursor() as other:
                put_batch(other, cmd_type, commands, **how)

        threading.Timer(0.5, later).start()

    outbox.put_batch = put


def _no_order_lock() -> None:
    """Lets anybody who has seen an order run it, and takes its time."""
    from s2s.store import orders, world

    orders.hold = lambda *_: True
    set_status = world.set_sector_status

    def slowly(*args: Any) -> Any:
        time.sleep(2.5)
        return set_status(*args)

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
    said = json.loads(os.environ.get(VARIABLE, "{}"))
    if "clock" in said:
        _move_clock(said["clock"])  # before anything of ours is imported, and keeps the clock as it was
    if "die" in said:
        _die_at(*said["die"])
    if "break" in said:
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
