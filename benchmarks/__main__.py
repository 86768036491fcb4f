"""``python -m benchmarks``: measure all contestants in rounds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track

from benchmarks import machine, plan
from benchmarks.load import Result
from benchmarks.plan import Cell
from benchmarks.report import Run
from benchmarks.stand import Stand
from benchmarks.tables import show

OUT = Path(__file__).with_name("out")


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Each measures every cell once.")
@click.option(
    "--seconds", type=click.FloatRange(0.01), default=0.7, show_default=True, help="Measured time of each cell."
)
@click.option(
    "--warm-up", type=click.FloatRange(0.0), default=0.7, show_default=True, help="Seconds before each measurement."
)
@click.option("--items", type=click.IntRange(1), help="Items where all exist from the beginning.")
@click.option("--only", default="", help="Only the cells whose names match this regular expression.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, show_default=True)
def main(rounds: int, seconds: float, warm_up: float, items: int | None, only: str, out: Path) -> None:
    """Measure the link and the durable push beside comparable systems."""
    console = Console()
    cells = [cell for cell in plan.cells() if re.search(only, cell.name)]
    missing = {cell.contestant.program for cell in cells if cell.contestant.program} - {""}
    missing = {program for program in missing if shutil.which(program) is None}
    for program in sorted(missing):
        console.print(f"left out: there is no {program} on the PATH")
    cells = [cell for cell in cells if cell.contestant.program not in missing]
    results: dict[Cell, list[Result]] = {cell: [] for cell in cells}
    stand = Stand()
    try:
        [[postgres]] = stand.execute("show server_version")
        turns = [cell for _ in range(rounds) for cell in cells]
        for cell in track(turns, "measuring", console=console):
            results[cell].append(stand.measure(cell, warm_up, seconds, items))
    finally:
        stand.close()
    run = Run(machine.describe(postgres), results)
    run.write(out)
    for title, rows in run.tables():
        show(console, title, rows)
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
