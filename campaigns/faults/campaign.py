"""One campaign: faults in random order while the clients work, then the check and the tables."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twisted.internet import reactor
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.threads import deferToThread

from benchmarks.tables import rst
from campaigns.faults.checker import Facts, check
from campaigns.faults.history import Operation, operations
from campaigns.faults.kinds import ATTACKS, Attack, program
from campaigns.faults.testbed import SETTLED_S, WHOLE_S, TestBed, facts_of
from tests.support.http import ask
from tests.support.waiting import pause


@dataclass(frozen=True)
class Verdict:
    """The result of a campaign.

    :param violations: descriptions of the violated promises.
    """

    seed: int
    seconds: float
    operations: Sequence[Operation]
    violations: Sequence[str]

    @property
    def faults(self) -> int:
        """The number of faults."""
        return sum(each.op == "fault" for each in self.operations)

    def tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Return the tables: a title, and rows of which the first is the header."""
        times: defaultdict[str, Counter[bool]] = defaultdict(Counter)
        took: defaultdict[str, list[float]] = defaultdict(list)
        steps: defaultdict[str, Counter[str]] = defaultdict(Counter)
        by_op: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for each in self.operations:
            by_op[each.op][each.ended] += 1
            if each.op == "fault":
                for name in (each.asked["name"], _ALL):
                    times[name][each.asked["step"] is None] += 1
            elif each.op == "recovery":
                for name in (each.asked["fault"], _ALL):
                    took[name].append(each.came.get("seconds", float("inf")))
            elif each.op == "step":
                steps[each.asked["step"]][each.ended] += 1
        yield (
            f"{self.faults} faults, seed {self.seed}, {self.seconds:.0f} s",
            [
                ("fault", "at any moment", "at a step", "whole again after (median, s)", "worst (s)"),
                *(
                    (name, str(times[name][True]), str(times[name][False]), *_typical(took[name]))
                    for name in sorted(times, key=lambda name: (name == _ALL, name))
                ),
            ],
        )
        yield (
            "the steps at which a process stood when a fault began",
            [("step", "times", "not reached"), *((step, str(of["ok"]), str(of["fail"])) for step, of in steps.items())],
        )
        kinds = ("ok", "fail", "unknown")
        done = [(op, *(str(ended[kind]) for kind in kinds)) for op, ended in sorted(by_op.items())]
        yield f"operations, {len(self.violations)} violations", [("operation", *kinds), *done]

    def written(self) -> str:
        """Return the tables in reStructuredText."""
        return "\n".join(rst(*table) for table in self.tables())


#: The name of the row with the totals.
_ALL: Final = "all"


def _typical(seconds: Sequence[float]) -> tuple[str, ...]:
    """Return the median and the maximum."""
    return tuple(f"{of(seconds):.1f}" for of in (statistics.median, max)) if seconds else ("", "")


async def run(
    seed: int,
    seconds: float,
    *,
    attacks: Sequence[Attack] = ATTACKS,
    pushes: float = 300.0,
    breaks: str | None = None,
    settled_s: float = SETTLED_S,
    path: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Verdict:
    """Run a campaign.

    :param seed: the seed of the choice of faults and of the clients' random choices.
    :param seconds: seconds after which no further fault begins.
    :param attacks: the attacks to choose from; if empty, the clients work without faults.
    :param settled_s: seconds after the last fault within which all work must be done.
    :param path: the file to which the history is written.
    :param say: is called with lines about the progress.
    """
    bed = await deferToThread(TestBed, seed, pushes, breaks, path)
    violations: list[str] = []
    began = time.monotonic()
    try:
        await bed.start()
        coming = enumerate(program(attacks, seed), 1) if attacks else iter(())
        while time.monotonic() - began < seconds:
            number, attack = next(coming, (0, None))
            if attack is None:
                await pause(0.5)
                continue
            say(f"{time.monotonic() - began:6.1f} s  {attack.name}")
            bed.rng = random.Random(f"{seed} {number}")
            await _bring(bed, attack)
            await pause(bed.rng.uniform(0, 0.5))
        say(f"{time.monotonic() - began:6.1f} s  settling")
        await _within(settled_s, bed.settled(), bed, violations)
        facts = await deferToThread(_facts, bed)
        done = operations(bed.history.events)
        violations += check(done, facts)
        await bed.end_roles()
        violations += bed.surprises
        return Verdict(seed, time.monotonic() - began, done, violations)
    finally:
        await bed.stop()


async def _bring(bed: TestBed, attack: Attack) -> None:
    """Run an attack, and record how long the recovery takes."""
    name = attack.fault.name
    number = bed.history.invoke("campaign", "fault", name=name, step=attack.step)
    await attack.run(bed)
    bed.history.end(number, "campaign", "fault", "ok")
    since = time.monotonic()
    number = bed.history.invoke("campaign", "recovery", fault=name, step=attack.step)
    late: list[str] = []
    await _within(WHOLE_S, bed.whole(), bed, late)
    told: dict[str, Any] = {"seconds": time.monotonic() - since, "why": "; ".join(late)}
    bed.history.end(number, "campaign", "recovery", "fail" if late else "ok", **told, levels=bed.levels())


async def _within(seconds: float, waiting: Coroutine[Any, Any, None], bed: TestBed, violations: list[str]) -> None:
    try:
        await Deferred.fromCoroutine(waiting).addTimeout(seconds, reactor)
    except TimeoutError:
        violations.append(f"not whole again within {seconds:g} s: {bed.lacks}")


def _facts(bed: TestBed) -> Facts:
    answer = ask(bed.api, "GET", "/v1/engines/engine-1", bed.token)
    return facts_of(bed.execute, {"engine-1": (answer.body.get("config_version"), answer.body.get("state"))})


def told(verdict: Verdict) -> str:
    """Return the seed and the violations as JSON, one violation a line."""
    return json.dumps({"seed": verdict.seed, "violations": list(verdict.violations)}, indent=2)
