"""The report of a run: tables for the terminal and the documents, a plot, and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.load import Result
from benchmarks.plan import RATIOS, Cell
from benchmarks.tables import Rows, ratio_entry, ratio_rows, rst

mpl.use("Agg")
from matplotlib import pyplot as plt

Table = tuple[str, Rows]


@dataclass(frozen=True)
class Run:
    """The results of all cells.

    :param machine: see :func:`benchmarks.machine.describe`.
    :param rounds: the results of each cell, one for each round.
    """

    machine: Mapping[str, str]
    rounds: Mapping[Cell, Sequence[Result]]

    def ratios(self) -> Iterator[dict[str, Any]]:
        """Return each ratio of which both sides were measured."""
        of_rounds = zip(*self.rounds.values(), strict=True)
        rates = [{cell: each.rate for cell, each in zip(self.rounds, of, strict=True)} for of in of_rounds]
        for ratio in RATIOS:
            each = [value for of in rates if (value := ratio.value(of)) is not None]
            if each:
                yield ratio_entry(ratio.row, each, ratio.must, ratio.aim)

    def tables(self) -> Iterator[Table]:
        """Return the tables: a title, and rows of which the first is the header."""
        yield "ratios", ratio_rows(self.ratios())
        for group in dict.fromkeys(cell.group for cell in self.rounds):
            head = ("what", "a second (median)", "least", "most")
            lines = [self._line(cell) for cell in self.rounds if cell.group == group]
            yield group, [(*head, "p50, p99, p99.9 in ms") if group == "latency" else head, *lines]
        yield "machine", [("what", "which"), *self.machine.items()]

    def _line(self, cell: Cell) -> tuple[str, ...]:
        rates = sorted(each.rate for each in self.rounds[cell])
        line = (
            cell.name.partition(": ")[2],
            *(f"{rate:,.0f}" for rate in (statistics.median(rates), rates[0], rates[-1])),
        )
        spans = [each.percentiles for each in self.rounds[cell] if each.percentiles]
        if not spans:
            return line
        return (*line, ", ".join(f"{statistics.median(each) * 1000:.2f}" for each in zip(*spans, strict=True)))

    def write(self, directory: Path) -> None:
        """Write ``results.json``, ``results.rst`` and ``results.png``."""
        directory.mkdir(parents=True, exist_ok=True)
        rounds = [
            {
                "cell": cell.name,
                "round": number,
                "rate": result.rate,
                "seconds": result.seconds,
                "percentiles": result.percentiles,
            }
            for cell, results in self.rounds.items()
            for number, result in enumerate(results, 1)
        ]
        whole = {"machine": self.machine, "ratios": list(self.ratios()), "rounds": rounds}
        (directory / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
        (directory / "results.rst").write_text("\n".join(rst(*table) for table in self.tables()))
        self._plot(directory / "results.png")

    def _plot(self, path: Path) -> None:
        groups = [group for group in dict.fromkeys(cell.group for cell in self.rounds) if group != "latency"]
        figure, axes = plt.subplots(
            len(groups), 1, figsize=(10, 2 + 0.22 * len(self.rounds)), squeeze=False,
            height_ratios=[1 + sum(cell.group == group for cell in self.rounds) for group in groups],
        )  # fmt: skip
        for axis, group in zip(axes[:, 0], groups, strict=True):
            cells = [cell for cell in self.rounds if cell.group == group][::-1]
            colours = ["tab:blue" if cell.contestant.title == "s2s" else "silver" for cell in cells]
            medians = [statistics.median(each.rate for each in self.rounds[cell]) for cell in cells]
            axis.barh([cell.name.partition(": ")[2] for cell in cells], medians, color=colours)
            axis.set_xscale("log")
            axis.set_title(f"{group}: a second")
            axis.tick_params(labelsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
