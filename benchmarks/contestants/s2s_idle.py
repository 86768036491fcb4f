"""Links that are proven and then idle."""

from __future__ import annotations

from twisted.internet import reactor, task

from benchmarks.contestants import _link, _twisted
from benchmarks.load import Load, Meter, Place


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Make the links, print their number, and keep them open for ``load.seconds``."""

    async def driving() -> None:
        links = await _link.connect(place, load)
        print(len(links), flush=True)
        meter.mark()
        await task.deferLater(reactor, load.seconds)
        meter.mark()

    _twisted.run(driving())
