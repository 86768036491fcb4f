"""Twisted's AMP, unsigned: a command with our payload's members, answered from memory."""

from __future__ import annotations

import itertools
from typing import Any

from twisted.internet.protocol import Factory
from twisted.protocols import amp

from benchmarks.contestants import _twisted
from benchmarks.kits import drive_deferred
from benchmarks.load import Load, Meter, Place, keys


class Push(amp.Command):
    """The AMP command with the members of our push."""

    arguments = [(b"cmd_type", amp.Unicode()), (b"idem_key", amp.Unicode()), (b"payload", amp.Unicode())]
    response = [(b"accepted", amp.Boolean()), (b"cmd_id", amp.Integer()), (b"status", amp.Unicode())]


class _Server(amp.AMP):
    _cmd_ids = itertools.count(1)

    @Push.responder
    def push(self, cmd_type: str, idem_key: str, payload: str) -> dict[str, Any]:
        return {"accepted": True, "cmd_id": next(self._cmd_ids), "status": "ready"}


def serve(place: Place) -> None:
    """Answer every command from memory."""
    _twisted.serve(place, Factory.forProtocol(_Server))


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Send commands, and wait for each answer."""
    filling, made = load.filling, keys("amp")

    async def driving() -> None:
        links: list[Any] = [await _twisted.connect(place, Factory.forProtocol(amp.AMP)) for _ in range(load.links)]

        def call(link: Any) -> Any:
            return link.callRemote(Push, cmd_type="notice.publish", idem_key=next(made), payload=filling)

        await drive_deferred([lambda link=link: call(link) for link in links], load, meter)

    _twisted.run(driving())
