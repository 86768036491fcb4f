"""Run test modules in several processes: ``python -m tests [--jobs N] [NAME ...]``.

Each process runs one module after another in one ``trial``, so that the modules share its PostgreSQL. trial's own
``-j`` spreads single tests over its processes: each process would start the servers that the tests of a module share.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from twisted.trial.itrial import ITestCase
from twisted.trial.reporter import TreeReporter
from twisted.trial.runner import TestLoader, TrialRunner
from zope.interface import implementer

#: Packages whose modules take longest and therefore begin first.
_FIRST = ("tests.admin", "tests.cli", "tests.roles")
#: Bytes of a module's name in the pipe. All names have the same length, so that each read returns one name.
_NAME_BYTES = 128
_DIRECTORY = Path("_trial_temp").absolute()


def modules(name: str) -> list[str]:
    """Return the test modules in a package, or the module itself."""
    module = import_module(name)
    if not hasattr(module, "__path__"):
        return [name]
    found = [each.name for each in pkgutil.walk_packages(module.__path__, f"{name}.")]
    return sorted(each for each in found if each.rpartition(".")[2].startswith("test_"))


@implementer(ITestCase)
class _Modules:
    """The tests of the modules whose names a process reads from the pipe until the pipe is empty."""

    def __init__(self, names: int) -> None:
        self._names = names

    def __call__(self, result: Any) -> None:
        """Run them."""
        for name in iter(lambda: os.read(self._names, _NAME_BYTES).decode().strip(), ""):
            before, began = (result.testsRun, _failed(result)), time.monotonic()
            TestLoader().loadByName(name).run(result)
            ran, failed = result.testsRun - before[0], _failed(result) - before[1]
            told = f"{time.monotonic() - began:4.0f} s  {name}: {ran} tests" + f", {failed} FAILED" * bool(failed)
            os.write(1, f"{told}\n".encode())

    run = __call__

    def countTestCases(self) -> int:
        """Return 1: the modules are not known yet."""
        return 1

    def id(self) -> str:
        """Return a name for all modules together."""
        return "modules"

    def shortDescription(self) -> None:
        """Return nothing: the reporter names the tests."""


def _failed(result: Any) -> int:
    return len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)


def _work(number: int, names: int) -> int:
    """Run modules in this process; its report goes to a file."""
    os.set_inheritable(names, False)
    sys.path.insert(0, os.getcwd())
    directory = str(_DIRECTORY / str(number))
    with _report(number).open("w") as stream:
        result: Any = TrialRunner(TreeReporter, stream=stream, realTimeErrors=True, workingDirectory=directory).run(
            _Modules(names)  # type: ignore[arg-type]
        )
    return 0 if result.wasSuccessful() else 1


def _report(number: int) -> Path:
    return _DIRECTORY / f"{number}.txt"


def _processes(jobs: int, found: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    names, write = os.pipe()
    for number in range(jobs):
        yield subprocess.Popen(
            # A background job of a shell ignores SIGINT, and the roles that a test starts would ignore it too.
            ["env", "--default-signal=INT", sys.executable, "-m", "tests", "--worker", str(number), str(names)],
            pass_fds=[names],
        )
    os.close(names)
    with os.fdopen(write, "wb") as pipe:
        pipe.write(b"".join(name.encode().ljust(_NAME_BYTES) for name in found))


def main() -> int:
    """Run the modules, and print the reports of failures."""
    parser = argparse.ArgumentParser(prog="python -m tests", description="Run test modules in several processes.")
    parser.add_argument("names", nargs="*", default=["tests"], help="packages or modules; all of tests if left out")
    parser.add_argument("--jobs", type=int, default=3 * (os.cpu_count() or 1), help="processes (default: 3 a core)")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(*options.worker)
    _DIRECTORY.mkdir(exist_ok=True)
    found = [module for name in options.names for module in modules(name)]
    found.sort(key=lambda name: not name.startswith(_FIRST))
    began = time.monotonic()
    codes = [process.wait() for process in list(_processes(options.jobs, found))]
    for number, code in enumerate(codes):
        text = _report(number).read_text()
        if code:
            print(f"\nprocess {number} ended with {code}:\n{text[max(text.find('=' * 79), 0) :]}")
    print(f"{len(found)} modules in {time.monotonic() - began:.0f} s: {'FAILED' if any(codes) else 'PASSED'}")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
