"""``python -m campaigns.faults``: run a long campaign and print its progress; exit code 1 if a promise was broken."""

from __future__ import annotations

import re
import secrets
import sys
from pathlib import Path

import click
from rich.console import Console
from twisted.internet.defer import Deferred
from twisted.internet.task import react

from benchmarks.tables import show
from campaigns.faults import campaign
from campaigns.faults.instrumentation import BREAKS
from campaigns.faults.kinds import ATTACKS


@click.command()
@click.option("--seconds", type=click.FloatRange(1), default=600, show_default=True, help="Faults begin in this time.")
@click.option("--seed", type=int, help="Seed of all random choices; drawn and printed if left out.")
@click.option("--pushes", type=click.FloatRange(1), default=300, show_default=True, help="New commands a second.")
@click.option("--break", "breaks", type=click.Choice(sorted(BREAKS)), help="A promise to break on purpose.")
@click.option("--rst", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables to this file, too.")
@click.option("--only", default="", help="Only the faults whose names match this regular expression.")
@click.option("--history", type=click.Path(dir_okay=False, path_type=Path), default="faults.jsonl", show_default=True)
def main(
    seconds: float, seed: int | None, pushes: float, breaks: str | None, rst: Path | None, only: str, history: Path
) -> None:
    """Run a campaign of faults, and check it."""
    chosen = secrets.randbelow(10**6) if seed is None else seed
    click.echo(f"seed {chosen}, history in {history}")
    console = Console()
    failed: list[str] = []

    async def run() -> None:
        attacks = [attack for attack in ATTACKS if re.search(only, attack.name)]
        verdict = await campaign.run(
            chosen, seconds, attacks=attacks, pushes=pushes, breaks=breaks, path=history, say=click.echo
        )
        for title, rows in verdict.tables():
            show(console, title, rows)
        if rst is not None:
            rst.write_text(verdict.written())
        failed.extend(verdict.violations)

    try:
        react(lambda _: Deferred.fromCoroutine(run()))
    except SystemExit as end:
        if end.code:
            raise
    for violation in failed[:100]:
        click.echo(f"violation: {violation}", err=True)
    click.echo(f"{len(failed)} violations, seed {chosen}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
