"""NATS JetStream: publish with a message id, by which it detects duplicates; its file storage does not fsync."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile

import nats

from benchmarks.kits import drive_tasks
from benchmarks.load import Load, Meter, Place, keys, push

SERVER = "nats-server"


def serve(place: Place) -> None:
    """Run the server until stdin ends."""
    directory = tempfile.mkdtemp(prefix="s2s-bench-nats-")
    where = ["--addr", "127.0.0.1", "--port", str(place.port), "--jetstream", "--store_dir", directory]
    try:
        with subprocess.Popen([SERVER, *where, "--log", os.devnull]) as server:
            sys.stdin.read()
            server.terminate()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Publish, and wait for each acknowledgement."""
    asyncio.run(_drive(place, load, meter))


async def _drive(place: Place, load: Load, meter: Meter) -> None:
    made, filling = keys("nats"), load.filling
    connection = await nats.connect(f"nats://127.0.0.1:{place.port}")
    stream = connection.jetstream()
    await stream.add_stream(name="bench", subjects=["bench"], duplicate_window=120)

    async def call() -> None:
        asked = push(next(made), filling)
        await stream.publish(
            "bench", json.dumps(asked).encode(), headers={"Nats-Msg-Id": asked["idem_key"]}, timeout=60
        )

    await drive_tasks([call], load, meter)
    await connection.close()
