"""Tables, for people and for the documents."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

#: Of which the first is the head.
Rows = Sequence[tuple[str, ...]]


def show(console: Console, title: str, rows: Rows) -> None:
    """Print a table."""
    head, *others = rows
    table = Table(*head, title=title)
    for row in others:
        table.add_row(*row)
    console.print(table)


def rst(title: str, rows: Rows) -> str:
    """Write a table as the documents show it."""
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'* -' if at == 0 else '  -'} {cell}" for at, cell in enumerate(row)]
    return "\n".join(lines) + "\n"
