"""grpc.aio, unsigned: a unary call with our payload as JSON, answered from memory."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from typing import Any

import grpc

from benchmarks.kits import drive_tasks
from benchmarks.load import Load, Meter, Place, keys, push

_SERVICE, _METHOD = "s2s.Bench", "Push"


def serve(place: Place) -> None:
    """Answer every call from memory."""
    asyncio.run(_serve(place))


async def _serve(place: Place) -> None:
    cmd_ids = itertools.count(1)

    async def answer(request: bytes, _: Any) -> bytes:
        json.loads(request)
        return json.dumps({"accepted": True, "duplicate": False, "cmd_id": next(cmd_ids), "status": "ready"}).encode()

    # With its default limits grpc would cancel random requests once more than 1,000 are pending.
    many = [("grpc.server.max_pending_requests", 1 << 20), ("grpc.server.max_pending_requests_hard_limit", 1 << 20)]
    server = grpc.aio.server(options=many)
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
    server.add_insecure_port(f"127.0.0.1:{place.port}")
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Make calls, and wait for each answer."""
    asyncio.run(_drive(place, load, meter))


async def _drive(place: Place, load: Load, meter: Meter) -> None:
    filling, made = load.filling, keys("grpc")
    # Without this option all channels of a process share one connection.
    alone = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{place.port}", options=alone) for _ in range(load.links)]

    def calling(channel: Any) -> Any:
        method = channel.unary_unary(f"/{_SERVICE}/{_METHOD}")

        async def call() -> None:
            json.loads(await method(json.dumps(push(next(made), filling)).encode()))

        return call

    await drive_tasks([calling(channel) for channel in channels], load, meter)
    for channel in channels:
        await channel.close()
