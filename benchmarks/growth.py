"""``python -m benchmarks.growth``: the same rates with many rows, and the memory of an idle link."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from operator import truediv
from pathlib import Path
from typing import Final

import click
import psutil
from rich.console import Console
from rich.progress import track

from benchmarks import machine
from benchmarks.load import Load
from benchmarks.plan import PUSH, WHOLE, Contestant
from benchmarks.stand import Stand, side
from benchmarks.tables import ratio_entry, ratio_rows, rst, show

OUT = Path(__file__).with_name("out")
#: Number of existing commands, and their status.
Size = tuple[int, str]
MUST, AIM = 0.9, 1.0
#: Each measurement: its contestant, and whether its keys are random.
KINDS: Final[Mapping[str, tuple[Contestant, bool]]] = {
    "durable push, window 1024": (PUSH, False),
    "the same with keys in no order": (PUSH, True),
    "whole way": (WHOLE, False),
}
#: Settings of PostgreSQL for millions of rows: the indexes fit into memory, and checkpoints come by the clock. After a
#: checkpoint the first change of each page writes the whole page to the WAL. A measurement is a small part of the time
#: between two checkpoints, and would pay the whole cost.
SETTINGS: Final[Mapping[str, str]] = {
    "shared_buffers": f"{psutil.virtual_memory().total // 4 // 2**20}MB",
    "max_wal_size": "32GB",
    "checkpoint_timeout": "1h",
}
#: Warm-up of the first round, in seconds for each second of measurement. A server that has just started touches each
#: page of the index for the first time; after this warm-up random keys have touched most pages.
_FIRST_WARM_UP = 10
IDLE = Contestant("idle links", "s2s_idle", serves=False)

#: The keys are random. Waiting commands are due tomorrow.
_FILL = """
with made as (
    insert into s2s.commands (cmd_type, idem_key, payload, status, finished_at, due_at)
    select 'notice.publish', md5(n::text),
        jsonb_build_object('scope', 'global', 'severity', 'info', 'message', %(message)s), %(status)s,
        case when %(status)s = 'done' then now() end, now() + interval '1 day'
    from generate_series(%(first)s, %(last)s) n
    returning idem_key, cmd_id
)
insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id)
select idem_key, sha256(idem_key::bytea), cmd_id from made
"""
_STEP = 500_000
#: Remove the rows that a measurement added, so that the next one has the same number of rows.
_EMPTY = (
    """
    with gone as (delete from s2s.commands where cmd_id > %(count)s returning idem_key)
    delete from s2s.idempotency_keys where idem_key in (select idem_key from gone)
    """,
    "truncate s2s.notices, s2s.outbox",
    "vacuum (index_cleanup on) s2s.commands, s2s.idempotency_keys",
)


@click.command()
@click.option("--finished", default="0,1000000,10000000", show_default=True, help="Counts of finished commands.")
@click.option("--waiting", default="100000,1000000", show_default=True, help="Counts of waiting commands.")
@click.option("--links", default=1000, show_default=True, help="Idle links.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.01), default=1.0, show_default=True, help="Measured time of each rate."
)
@click.option("--items", type=click.IntRange(1), default=30_000, show_default=True, help="Rows of the outbox.")
@click.option("--as-it-comes", is_flag=True, help="Do not change PostgreSQL's settings.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, show_default=True)
def main(
    finished: str, waiting: str, links: int, rounds: int, seconds: float, items: int, as_it_comes: bool, out: Path
) -> None:
    """Measure how existing rows change the rates of new ones."""
    console = Console()
    counts = {
        status: [int(each) for each in told.split(",") if each]
        for status, told in (("done", finished), ("ready", waiting))
    }
    sizes = [(count, status) for status, each in counts.items() for count in each]
    stand = Stand({} if as_it_comes else SETTINGS)
    try:
        urls = {size: _filled(stand, *size) for size in track(sizes, "filling", console=console)}
        rates: dict[Size, dict[str, list[float]]] = {size: {kind: [] for kind in KINDS} for size in sizes}
        for kind in KINDS:
            measuring = _rounds(stand, urls, kind, Load(1024, items=items, seconds=seconds), rounds)
            for of in track(measuring, kind, total=rounds, console=console):
                for size, rate in of.items():
                    rates[size][kind].append(rate)
        per_link = _idle(stand, urls[sizes[0]], links)
        [[postgres]] = stand.execute("show server_version")
        settings = dict(stand.execute("select name, current_setting(name) from unnest(%s) name", (list(SETTINGS),)))
    finally:
        stand.close()
    empty, most = sizes[0], max(size for size in sizes if size[1] == "done")
    against = f"with {most[0]:,} finished commands, against an empty table"
    ratios = [
        ratio_entry(f"{kind}, {against}", list(map(truediv, rates[most][kind], rates[empty][kind])), MUST, AIM)
        for kind in KINDS
    ]
    tables = [
        ("ratios", ratio_rows(ratios)),
        ("rows that are there", [("rows", *KINDS), *map(_line, rates.items())]),
        ("idle links", [("links", "KiB of the server each"), (str(links), f"{per_link / 1024:.1f}")]),
        ("PostgreSQL", [("setting", "value"), *settings.items()]),
    ]
    for title, rows in tables:
        show(console, title, rows)
    out.mkdir(parents=True, exist_ok=True)
    whole_result = {
        "machine": machine.describe(postgres),
        "settings": settings,
        "ratios": ratios,
        "rounds": [{"rows": count, "status": status, "rates": of} for (count, status), of in rates.items()],
        "bytes_per_link": per_link,
    }
    (out / "growth.json").write_text(json.dumps(whole_result, indent=1) + "\n")
    (out / "growth.rst").write_text("\n".join(rst(*table) for table in tables))


def _line(entry: tuple[Size, dict[str, list[float]]]) -> tuple[str, ...]:
    (count, status), of = entry
    what = {"done": "finished", "ready": "waiting"}[status]
    return (f"{count:,} {what}", *(f"{statistics.median(each):,.0f}" for each in of.values()))


def _filled(stand: Stand, count: int, status: str) -> str:
    """Make a database with this number of commands, and return its URL."""
    url = stand.make_database(PUSH.schemas)
    for first in range(1, count + 1, _STEP):
        filling = {"message": Load().filling, "status": status, "first": first, "last": min(count, first + _STEP - 1)}
        stand.execute(_FILL, filling, url=url)
    stand.execute("vacuum analyze", url=url)
    stand.execute("checkpoint")
    return url


def _rounds(stand: Stand, urls: Mapping[Size, str], kind: str, load: Load, rounds: int) -> Iterator[dict[Size, float]]:
    """Measure one kind in rounds, and yield the rates of each round; the server of each size runs throughout."""
    contestant, is_scattered = KINDS[kind]
    load = replace(load, is_scattered=is_scattered)
    # The next checkpoint comes after a little more than half of max_wal_size. A kind writes less WAL than that, unless
    # the settings are PostgreSQL's defaults.
    stand.execute("checkpoint")
    with ExitStack() as up:
        places = {size: up.enter_context(stand.serving(contestant, url)) for size, url in urls.items()}
        for number in range(rounds):
            load = replace(load, warm_up_s=load.seconds * (1 if number else _FIRST_WARM_UP))
            rates = {}
            # Alternate the direction, so that a machine that slows down for a minute does so for every size.
            for size in list(places)[:: -1 if number % 2 else 1]:
                rates[size] = stand.drive(contestant, load, places[size]).rate
                for statement in _EMPTY:
                    stand.execute(statement, {"count": size[0]}, url=urls[size])
            yield rates


def _idle(stand: Stand, url: str, links: int) -> float:
    """Return the bytes of the server's memory for each idle link."""
    with stand.serving(PUSH, url) as place:
        assert stand.server is not None
        server = psutil.Process(stand.server.pid)

        def rss_with(count: int) -> int:
            load = json.dumps(asdict(Load(links=count, seconds=2.0)))
            with subprocess.Popen([*side(IDLE, "drive", place), load], stdout=subprocess.PIPE, text=True) as client:
                assert client.stdout is not None
                client.stdout.readline()
                rss: int = server.memory_info().rss
                client.communicate()
            return rss

        few = rss_with(1)
        return (rss_with(links) - few) / max(1, links - 1)


if __name__ == "__main__":
    main()
