"""The plan as data: the contestants, the cells to measure, and the required ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.load import Load

#: Names of the schemas that a contestant's database may have.
OURS, THEIRS = "ours", "procrastinate"


@dataclass(frozen=True)
class Contestant:
    """A system that is measured.

    :param title: its name in the tables.
    :param module: its module in :mod:`benchmarks.contestants`.
    :param serves: whether it has its own server process.
    :param schemas: schemas of its database; empty: it needs no database.
    :param program: program that must be on the PATH; otherwise the contestant is left out.
    """

    title: str
    module: str
    serves: bool = True
    schemas: tuple[str, ...] = ()
    program: str = ""


LINK: Final = Contestant("s2s", "s2s_link")
ECHO: Final = Contestant("bare echo", "echo")
AMP: Final = Contestant("AMP", "amp")
GRPC: Final = Contestant("grpc.aio", "grpc_aio")
PUSH: Final = Contestant("s2s", "s2s_push", schemas=(OURS,))
ROWS: Final = Contestant("psycopg2, a row each", "psycopg2_rows", serves=False, schemas=(OURS,))
UNNEST: Final = Contestant("psycopg2, unnest", "psycopg2_rows", serves=False, schemas=(OURS,))
DEFER: Final = Contestant("procrastinate defer_async", "procrastinate_jobs", serves=False, schemas=(THEIRS,))
DEFER_BATCH: Final = Contestant(
    "procrastinate batch_defer_async", "procrastinate_jobs", serves=False, schemas=(THEIRS,)
)
JETSTREAM: Final = Contestant("JetStream", "jetstream", program="nats-server")
WHOLE: Final = Contestant("s2s", "s2s_whole", schemas=(OURS,))
WORKER: Final = Contestant("procrastinate worker", "procrastinate_worker", serves=False, schemas=(OURS, THEIRS))


@dataclass(frozen=True)
class Cell:
    """One measurement: a contestant under a load.

    :param group: cells of one group share a table.
    """

    group: str
    contestant: Contestant
    load: Load

    @property
    def name(self) -> str:
        """The name of the cell in the tables."""
        load = self.load
        # The engine's relay has its own window. Evenly spaced requests do not depend on a window.
        said = [f"window {load.window}"] * (self.contestant is not WHOLE and not load.rate)
        said += [f"{load.links} links"] * (load.links > 1)
        said += [f"{load.rate}/s"] * bool(load.rate)
        said += [f"batches of {load.items}"] * bool(load.items and not self.is_drained)
        said += [f"{load.size} bytes"] * (self.group == "link")
        return f"{self.group}: {', '.join([self.contestant.title, *said])}"

    @property
    def is_drained(self) -> bool:
        """Whether all items exist from the beginning."""
        return self.contestant in (WHOLE, WORKER)


WINDOWS: Final = (1, 64, 1024)
SIZES: Final = (400, 4096, 60_000)


def cells() -> Iterator[Cell]:
    """Return every cell of the benchmark, in the order of a round."""
    for size in SIZES:
        for window in WINDOWS:
            for contestant in (LINK, ECHO, AMP, GRPC):
                yield Cell("link", contestant, Load(window=window, size=size))
    # The two sides of a ratio are measured one directly after the other: the machine's speed changes quickly.
    yield Cell("durable push", PUSH, Load(window=1))
    yield Cell("durable push", ROWS, Load(window=1))
    yield Cell("durable push", ROWS, Load(window=1, links=16))
    yield Cell("durable push", JETSTREAM, Load(window=1))
    for window in WINDOWS:
        for links in (8, 64):
            yield Cell("durable push", PUSH, Load(window=window, links=links))
    for window in WINDOWS[1:]:
        yield Cell("durable push", JETSTREAM, Load(window=window))
        yield Cell("durable push", PUSH, Load(window=window))
    for window in (256, 1024):
        yield Cell("durable push", UNNEST, Load(window=window))
    for window in (1, 4, 16, 32):
        yield Cell("durable push", DEFER, Load(window=window))
    yield Cell("durable push", DEFER_BATCH, Load(window=1, items=256))
    yield Cell("whole way", WHOLE, Load(items=30_000))
    for window in (1, 8, 32):
        yield Cell("whole way", WORKER, Load(window=window, items=1500))
    yield Cell("latency", PUSH, Load(rate=1000))


@dataclass(frozen=True)
class Ratio:
    """A required ratio of our rate to the rate of another contestant.

    :param row: its name in the tables.
    :param ours: selects our cell.
    :param theirs: selects the cells to compare with; the best of them counts.
    :param must: the required minimum.
    :param aim: the target.
    """

    row: str
    ours: Callable[[Cell], bool]
    theirs: Callable[[Cell], bool]
    must: float
    aim: float

    def value(self, rates: Mapping[Cell, float]) -> float | None:
        """Return the ratio; ``None`` if either side was not measured."""
        ours = [rate for cell, rate in rates.items() if self.ours(cell)]
        theirs = [rate for cell, rate in rates.items() if self.theirs(cell)]
        return max(ours) / max(theirs) if ours and theirs else None


def _is(contestant: Contestant, **load: int) -> Callable[[Cell], bool]:
    wanted = {"size": 400, "links": 1, "rate": 0, **load}
    return lambda cell: (
        cell.contestant is contestant and all(getattr(cell.load, name) == value for name, value in wanted.items())
    )


RATIOS: Final[Sequence[Ratio]] = (
    Ratio("link, window 64, against grpc.aio", _is(LINK, window=64), _is(GRPC, window=64), 5, 8),
    Ratio("link, window 64, against AMP", _is(LINK, window=64), _is(AMP, window=64), 1.5, 2.4),
    Ratio("link, window 64, against the bare echo", _is(LINK, window=64), _is(ECHO, window=64), 0.10, 0.15),
    Ratio(
        "durable push, window 1024, against procrastinate defer_async at its best concurrency",
        _is(PUSH, window=1024), _is(DEFER), 10, 15,
    ),
    Ratio("durable push, window 1024, against unnest batches", _is(PUSH, window=1024), _is(UNNEST), 0.33, 0.5),
    Ratio(
        "durable push, window 1, against psycopg2 one row per transaction on one connection",
        _is(PUSH, window=1), _is(ROWS), 0.8, 0.95,
    ),
    Ratio(
        "durable push, window 1024, against JetStream (which does not fsync)",
        _is(PUSH, window=1024), _is(JETSTREAM, window=1024), 0.6, 1.0,
    ),
    Ratio("whole way, against a procrastinate worker", _is(WHOLE), _is(WORKER), 10, 30),
)  # fmt: skip
