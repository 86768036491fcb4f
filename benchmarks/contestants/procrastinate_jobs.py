"""procrastinate: defer jobs with our payload, in ``window`` tasks at once, one by one or in batches of ``items``."""

from __future__ import annotations

import asyncio

import procrastinate

from benchmarks.kits import drive_tasks
from benchmarks.load import Load, Meter, Place, keys, push

NAME = "publish"


def app_of(place: Place, connections: int) -> procrastinate.App:
    """Make the application of procrastinate."""
    return procrastinate.App(
        connector=procrastinate.PsycopgConnector(conninfo=place.url, min_size=connections, max_size=connections)
    )


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Defer jobs."""
    asyncio.run(_drive(place, load, meter))


async def _drive(place: Place, load: Load, meter: Meter) -> None:
    app = app_of(place, min(load.window, 32))

    @app.task(name=NAME, pass_context=False)
    async def publish(**_: object) -> None:
        """Do nothing: the job is only deferred, never run."""

    made, filling = keys("job"), load.filling

    async def one() -> None:
        asked = push(next(made), filling)
        await publish.configure(queueing_lock=asked["idem_key"]).defer_async(**asked["payload"])

    async def batch() -> None:
        await publish.batch_defer_async(*(push(next(made), filling)["payload"] for _ in range(load.items)))

    async with app.open_async():
        await drive_tasks([batch if load.items else one], load, meter, load.items or 1)
