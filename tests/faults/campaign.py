"""One campaign: faults in random order while the clients work, then the judgement and a table."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.threads import deferToThread

from tests.faults.history import Operation, operations
from tests.faults.judge import Facts, judge
from tests.faults.kinds import FAULTS, Fault
from tests.faults.stage import SETTLED_S, WHOLE_S, Stage, facts_of, pause
from tests.support.http import ask


@dataclass(frozen=True)
class Verdict:
    """What a campaign came to.

    :param violations: of the promises, in words.
    """

    seed: int
    seconds: float
    operations: Sequence[Operation]
    violations: Sequence[str]

    @property
    def faults(self) -> int:
        """How many there were."""
        return sum(each.op == "fault" for each in self.operations)

    def tables(self) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
        """Give what is to be seen: a title, and rows of which the first is the head."""
        times = Counter(each.asked["name"] for each in self.operations if each.op == "fault")
        took: defaultdict[str, list[float]] = defaultdict(list)
        for each in self.operations:
            if each.op == "recovery" and each.asked["fault"] in times:
                took[each.asked["fault"]].append(each.came.get("seconds", float("inf")))
        took["all"] = [seconds for each in took.values() for seconds in each]
        rows = [
            (name, str(times.get(name, self.faults)), *(f"{of(seconds):.1f}" for of in (statistics.median, max)))
            for name, seconds in _sorted(took)
            if seconds
        ]
        yield (
            f"{self.faults} faults, seed {self.seed}, {self.seconds:.0f} s",
            [("fault", "times", "whole again after (median, s)", "worst (s)"), *rows],
        )
        by_op: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for each in self.operations:
            by_op[each.op][each.ended] += 1
        kinds = ("ok", "fail", "unknown")
        done = [(op, *(str(ended[kind]) for kind in kinds)) for op, ended in sorted(by_op.items())]
        yield f"operations, {len(self.violations)} violations", [("operation", *kinds), *done]

    def written(self) -> str:
        """Give the tables as the documents show them."""
        return "\n".join(_written(*table) for table in self.tables())


def _sorted(took: Mapping[str, list[float]]) -> list[tuple[str, list[float]]]:
    return sorted(took.items(), key=lambda each: (each[0] == "all", each[0]))


def _written(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'* -' if at == 0 else '  -'} {cell}" for at, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


async def run(
    seed: int,
    seconds: float,
    *,
    faults: Sequence[Fault] = FAULTS,
    pushes: float = 300.0,
    breaks: str | None = None,
    path: Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Verdict:
    """Run a campaign.

    :param seed: of the choice of faults and of everything that the clients draw.
    :param seconds: after which no further fault begins.
    :param faults: of which kinds; of none the clients just work.
    :param path: where the history is written.
    :param say: is told what goes on.
    """
    stage = await deferToThread(Stage, seed, pushes, breaks, path)
    violations: list[str] = []
    began = time.monotonic()
    try:
        await stage.start()
        deck: list[Fault] = []
        while time.monotonic() - began < seconds:
            # Each kind once, in a new order every time.
            deck = deck or stage.dice.sample(faults, len(faults))
            if not deck:
                await pause(0.5)
                continue
            fault = deck.pop()
            say(f"{time.monotonic() - began:6.1f} s  {fault.name}")
            await _bring(stage, fault)
            await pause(stage.dice.uniform(0, 0.5))
        say(f"{time.monotonic() - began:6.1f} s  settling")
        await _within(SETTLED_S, stage.settled(), "it has not settled", violations)
        facts = await deferToThread(_facts, stage)
        done = operations(stage.history.events)
        violations += [*judge(done, facts), *stage.leaks()]
        await stage.end_roles()
        violations += stage.surprises
        return Verdict(seed, time.monotonic() - began, done, violations)
    finally:
        await stage.stop()


async def _bring(stage: Stage, fault: Fault) -> None:
    """Bring a fault about, and see how long it takes until everything is whole again."""
    number = stage.history.invoke("campaign", "fault", name=fault.name)
    await fault.run(stage)
    stage.history.end(number, "campaign", "fault", "ok")
    since = time.monotonic()
    number = stage.history.invoke("campaign", "recovery", fault=fault.name)
    late: list[str] = []
    await _within(WHOLE_S, stage.whole(), f"not whole again within {WHOLE_S:g} s", late)
    told: dict[str, Any] = {"seconds": time.monotonic() - since, "why": "; ".join(late)}
    stage.history.end(number, "campaign", "recovery", "fail" if late else "ok", **told)


async def _within(seconds: float, waiting: Any, why: str, violations: list[str]) -> None:
    try:
        await Deferred.fromCoroutine(waiting).addTimeout(seconds, reactor)
    except TimeoutError:
        violations.append(why)


def _facts(stage: Stage) -> Facts:
    answer = ask(stage.api, "GET", "/v1/engines/engine-1", stage.token)
    return facts_of(stage.execute, {"engine-1": answer.body.get("config_version")})


def told(verdict: Verdict) -> str:
    """Give the violations, one a line."""
    return json.dumps({"seed": verdict.seed, "violations": list(verdict.violations)}, indent=2)
