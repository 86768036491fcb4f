"""Run one side of a contestant in its own process."""

from __future__ import annotations

import json
import sys
from importlib import import_module

from benchmarks.load import Load, Meter, Place


def main(name: str, side: str, place: str, load: str = "{}") -> None:
    """Run one side; the side ``drive`` prints its result."""
    contestant = import_module(f"benchmarks.contestants.{name}")
    if side == "serve":
        contestant.serve(Place(**json.loads(place)))
    else:
        meter = Meter()
        contestant.drive(Place(**json.loads(place)), Load(**json.loads(load)), meter)
        print(meter.told(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
