"""``python -m benchmarks.snapshot``: accept and run commands before and while a snapshot is held.

The output has the rate and the CPU time of a command, ours and PostgreSQL's. A busy machine changes the CPU time less.
"""

from __future__ import annotations

import itertools
import time
from contextlib import closing, suppress

import click
import psutil
import psycopg2
from rich.console import Console
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred, gatherResults

from benchmarks.plan import PUSH
from benchmarks.stand import Stand
from s2s.handlers.commands import Command, CommandHandler, registry
from s2s.roles.server.executor import Executor
from s2s.roles.server.inbox import Inbox
from s2s.runtime.clock import make_monotonic
from s2s.store.driver import Cursor
from s2s.store.handler_pool import HandlerPool
from s2s.store.pool import Database

#: Pushes in flight at once; and the number of commands waiting to be run above which no more are pushed.
_WINDOW = 1024
_BACKLOG = 5 * _WINDOW


class _Nothing(CommandHandler):
    """A command without an effect, so that the measurement contains no cost of a handler."""

    cmd_type = "bench.nothing"
    schema = {"type": "object"}
    batched = True

    def run(self, txn: Cursor, command: Command) -> None:
        pass


def _cpu_s(postmaster: int) -> float:
    """Return the total CPU time of this process and of PostgreSQL's running processes."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process(postmaster).children()):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def _measure(stand: Stand, seconds: float, held_seconds: float, step: float, console: Console) -> None:
    """Push and run as fast as possible, and print the rate of every step; hold a snapshot after ``seconds``."""
    url = stand.make_database(PUSH.schemas)
    make_monotonic(reactor)
    database = Database(url, "bench", threads=5)
    served = registry([_Nothing()])
    handlers = HandlerPool(database, "bench handlers", threads=2)
    executor = Executor(database, handlers, served, "bench")
    inbox = Inbox(database, served, executor.wake)
    numbers = itertools.count()
    began, is_over = time.monotonic(), False

    async def push() -> None:
        while not is_over:
            if inbox.accepted - executor.ran > _BACKLOG:
                await task.deferLater(reactor, 0.005, lambda: None)  # type: ignore[arg-type]
                continue
            await gatherResults(
                [
                    inbox.push({"cmd_type": "bench.nothing", "idem_key": f"b{number}", "payload": {"number": number}})
                    for number in itertools.islice(numbers, _WINDOW // 2)
                ]
            )

    database.start()
    handlers.start()
    executor.start()
    pushing = [Deferred.fromCoroutine(push()) for _ in range(2)]
    holder = psycopg2.connect(url)
    rates: dict[bool, list[float]] = {False: [], True: []}
    is_held = False
    while (now := time.monotonic() - began) < seconds + held_seconds:
        if now >= seconds and not is_held:
            is_held = True
            with holder.cursor() as txn:
                txn.execute("begin isolation level repeatable read; select 1")
        ran, at, cpu_s = executor.ran, time.monotonic(), _cpu_s(stand.pid)
        await task.deferLater(reactor, step, lambda: None)  # type: ignore[arg-type]
        rates[is_held].append((executor.ran - ran) / (time.monotonic() - at))
        cpu_us = 1e6 * (_cpu_s(stand.pid) - cpu_s) / max(1, executor.ran - ran)
        state = "held" if is_held else "free"
        console.print(f"{now + step:6.0f} s  {state}  {rates[is_held][-1]:8,.0f}/s  {cpu_us:6.0f} us of CPU each")
    is_over = True
    for each in pushing:
        await each
    await executor.stop()
    await handlers.stop()
    await database.stop()
    holder.close()
    free, held = (sorted(each)[len(each) // 2] for each in rates.values())
    last = rates[True][-1]
    console.print(f"median before {free:,.0f}/s, held {held:,.0f}/s ({held / free:.2f}); last {last / free:.2f}")


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="Seconds before the snapshot is taken.")
@click.option("--held", default=600.0, show_default=True, help="Seconds for which the snapshot is held.")
@click.option("--step", default=10.0, show_default=True, help="Seconds of each measurement.")
def main(seconds: float, held: float, step: float) -> None:
    """Hold a snapshot under full load, as a pg_dump or a forgotten psql does."""
    stand = Stand()
    with closing(stand):
        task.react(lambda _: Deferred.fromCoroutine(_measure(stand, seconds, held, step, Console())))


if __name__ == "__main__":
    main()
