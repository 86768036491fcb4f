"""A procrastinate worker with ``window`` tasks at once; each task publishes one notice, as our command does."""

from __future__ import annotations

import asyncio
from contextlib import closing

import psycopg2

from benchmarks.contestants.procrastinate_jobs import NAME, app_of
from benchmarks.load import Load, Meter, Place, keys, push

_PUBLISH = (
    "insert into s2s.notices (cmd_id, scope, severity, message) values (%(cmd_id)s, %(scope)s,"
    " %(severity)s, %(message)s)"
)


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Defer all jobs, run them, and read the duration from procrastinate's events."""
    asyncio.run(_work(place, load))
    with closing(psycopg2.connect(place.url)) as connection, connection.cursor() as txn:
        txn.execute(
            "select count(*) filter (where type = 'succeeded'),"
            " extract(epoch from max(at) filter (where type = 'succeeded') - min(at) filter (where type = 'started'))"
            "::float8 from procrastinate_events"
        )
        meter.took_all(*txn.fetchall()[0])


async def _work(place: Place, load: Load) -> None:
    app = app_of(place, load.window + 4)

    @app.task(name=NAME, pass_context=True)
    async def publish(context: object, **payload: object) -> None:
        cmd_id = context.job.id  # type: ignore[attr-defined]
        await app.connector.execute_query_async(_PUBLISH, cmd_id=cmd_id, **payload)

    made, filling = keys("job"), load.filling
    async with app.open_async():
        await publish.batch_defer_async(*(push(next(made), filling)["payload"] for _ in range(load.items)))
        await app.run_worker_async(concurrency=load.window, wait=False, install_signal_handlers=False)
