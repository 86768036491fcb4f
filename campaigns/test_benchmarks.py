"""The benchmark works: every contestant is measured briefly, and the output is complete. The rates are not tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from benchmarks.load import Load, Result, percentiles
from benchmarks.plan import AMP, LINK, RATIOS, Cell, cells
from benchmarks.report import Run
from tests.support.roles import environment

#: One cell of each kind, and the cells that the ratios need.
_ONLY = (
    r"window 64, 400 bytes|window 1024$|push: psycopg2, a row each, window 1$|s2s, window 1$|window 16$|256|8$|way: s2s"
    r"|latency"
)


class BenchmarkTests(SynchronousTestCase):
    """``python -m benchmarks`` and ``benchmarks.growth``, with the shortest measurements."""

    timeout = 180

    def run_module(self, module: str, *argv: str) -> Any:
        """Run a module, and return the JSON that it wrote; its directory is removed after the test."""
        out = tempfile.mkdtemp(prefix="s2s-bench-")
        self.addCleanup(shutil.rmtree, out)
        self.out = Path(out)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", module, "--rounds", "1", "--seconds", "0.1", "--items", "100", "--out", out, *argv],
            env=environment(PATH=path),
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        [results] = self.out.glob("*.json")
        return json.loads(results.read_text())

    def test_a_short_run(self) -> None:
        """Every contestant has a rate, every ratio has a value, and the tables and the plot are written."""
        results = self.run_module("benchmarks", "--warm-up", "0.1", "--only", _ONLY)
        self.assertEqual([each["row"] for each in results["ratios"]], [ratio.row for ratio in RATIOS])
        self.assertTrue(all(each["value"] > 0 and each["must"] > 0 for each in results["ratios"]))
        self.assertTrue(all(each["rate"] > 0 for each in results["rounds"]), results["rounds"])
        measured = {each["cell"].partition(", ")[0] for each in results["rounds"]}
        self.assertEqual(measured, {cell.name.partition(", ")[0] for cell in cells()})
        self.assertIn("against grpc.aio", (self.out / "results.rst").read_text())
        self.assertGreater((self.out / "results.png").stat().st_size, 1000)

    def test_growth(self) -> None:
        """``benchmarks.growth`` measures rates with existing rows, and the memory of idle links."""
        results = self.run_module("benchmarks.growth", "--finished", "50", "--waiting", "50", "--links", "3")
        self.assertEqual([(each["rows"], each["status"]) for each in results["rounds"]], [(50, "done"), (50, "ready")])
        self.assertTrue(all(rate > 0 for each in results["rounds"] for of in each["rates"].values() for rate in of))
        self.assertEqual(len(results["ratios"]), len(results["rounds"][0]["rates"]))
        self.assertTrue(all(ratio["value"] > 0 for ratio in results["ratios"]))
        self.assertIn("against an empty table", (self.out / "growth.rst").read_text())


class PlanTests(SynchronousTestCase):
    """The benchmark's plan."""

    def test_names_are_unique(self) -> None:
        """No two cells have the same name."""
        names = [cell.name for cell in cells()]
        self.assertEqual(len(set(names)), len(names))

    def test_ratios(self) -> None:
        """Each ratio has exactly one cell of ours, and divides its rate by the best rate of the compared cells."""
        everything: list[Cell] = list(cells())
        for ratio in RATIOS:
            ours = [cell for cell in everything if ratio.ours(cell)]
            theirs = [cell for cell in everything if ratio.theirs(cell)]
            self.assertEqual(len(ours), 1, ratio.row)
            self.assertTrue(theirs, ratio.row)
            rates = {**dict.fromkeys(ours, 6.0), **{cell: float(n) for n, cell in enumerate(theirs, 1)}}
            self.assertEqual(ratio.value(rates), 6.0 / len(theirs), ratio.row)
            self.assertIsNone(ratio.value(dict.fromkeys(ours, 1.0)))
            self.assertLess(ratio.must, ratio.aim)

    def test_ratio_of_a_machine_that_slows_down(self) -> None:
        """A ratio is the median of the rounds' ratios, also when the machine's speed changes between the rounds."""
        counts = {LINK: (30, 20, 9), AMP: (15, 5, 3)}
        rounds = {
            Cell("link", contestant, Load(64)): [Result(count, 1.0) for count in each]
            for contestant, each in counts.items()
        }
        [entry] = Run({}, rounds).ratios()
        self.assertEqual((entry["least"], entry["value"], entry["most"]), (2.0, 3.0, 4.0))

    def test_percentiles(self) -> None:
        """Percentiles are by the nearest rank."""
        self.assertEqual(percentiles([float(n) for n in range(1, 1001)]), [500.0, 990.0, 999.0])
        self.assertEqual(percentiles([2.0, 1.0, 3.0]), [2.0, 3.0, 3.0])
        self.assertEqual(percentiles([]), [])
        self.assertEqual(len(Load(size=400).filling), 70)
