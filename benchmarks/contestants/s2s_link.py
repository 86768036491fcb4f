"""Our link: signed and validated pushes to a responder that answers from memory."""

from __future__ import annotations

import itertools

from benchmarks.contestants import _link, _twisted
from benchmarks.load import Load, Meter, Place
from s2s.protocol.catalogue import COMMAND_PUSH


def serve(place: Place) -> None:
    """Answer every push from memory with the reply that the server sends after the COMMIT."""
    cmd_ids = itertools.count(1)

    def respond(_: object) -> dict[str, object]:
        return {"accepted": True, "duplicate": False, "cmd_id": next(cmd_ids), "status": "ready"}

    _twisted.serve(place, _link.factory("server", _link.Events(), 256, **{COMMAND_PUSH: respond}))


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Push."""
    _link.drive(place, load, meter)
