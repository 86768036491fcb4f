"""Tables, for the terminal and for the documents."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

#: The first row is the header.
Rows = Sequence[tuple[str, ...]]


def show(console: Console, title: str, rows: Rows) -> None:
    """Print a table."""
    head, *others = rows
    table = Table(*head, title=title)
    for row in others:
        table.add_row(*row)
    console.print(table)


def rst(title: str, rows: Rows) -> str:
    """Write a table in reStructuredText."""
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'* -' if at == 0 else '  -'} {cell}" for at, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def ratio_entry(row: str, rounds: Sequence[float], must: float, aim: float) -> dict[str, Any]:
    """Return a ratio as the results store it: the median of the ratios of the rounds.

    The medians of each side would come from different rounds, between which the machine's speed changes.

    :param rounds: the ratio in each round.
    """
    told = {"value": statistics.median(rounds), "least": min(rounds), "most": max(rounds)}
    return {"row": row, **{name: round(number, 3) for name, number in told.items()}, "must": must, "aim": aim}


def ratio_rows(ratios: Iterable[Mapping[str, Any]]) -> Rows:
    """Return the rows of a table of ratios."""
    lines = [
        (each["row"], *(f"{each[name]:.2f}" for name in ("value", "least", "most", "must", "aim"))) for each in ratios
    ]
    return [("what", "value (median of rounds)", "least", "most", "must", "aim"), *lines]
