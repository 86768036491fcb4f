"""The OpenAPI document, and a live server held to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThread

from s2s.admin.operations import OPERATIONS
from tests.cli.test_order import WorldTestCase
from tests.support.http import ApiTestCase
from tests.support.roles import environment
from tests.support.waiting import poll

#: Cases for each operation, at most, and the seed that they are drawn by.
EXAMPLES = int(os.environ.get("S2S_EXAMPLES", "10"))
SEED = os.environ.get("S2S_SEED", "1")


class DocumentTests(ApiTestCase):
    """What it says."""

    def test_it_is_whole(self) -> None:
        """Every operation stands in it with its answers; every schema is one, and every reference leads somewhere."""
        document = self.ask("GET", "/openapi.json").body
        self.assertEqual(document["openapi"], "3.1.0")
        told = {(method, path) for path, methods in document["paths"].items() for method in methods}
        ours = {(operation.method.lower(), operation.path) for operation in OPERATIONS}
        self.assertEqual(told - ours, {("get", "/healthz"), ("get", "/readyz"), ("get", "/openapi.json")})
        self.assertEqual(ours - told, set())
        names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
        self.assertEqual(len(names), len(set(names)))
        for node in _nodes(document):
            if "$ref" in node:
                _at(document, node["$ref"])
            if "schema" in node:
                Draft202012Validator.check_schema(node["schema"])
        for path, methods in document["paths"].items():
            for method, one in methods.items():
                self.assertIn("401" if path not in ("/healthz", "/readyz") else "200", one["responses"], (method, path))
                self.assertTrue(one["summary"].endswith("."))


class LiveTests(ApiTestCase, WorldTestCase):
    """A server and an engine, and whatever the document allows or forbids."""

    timeout = 300

    @inlineCallbacks
    def test_it_holds(self) -> Iterator[Deferred[Any]]:
        """No answer is a 500, none is undocumented, none breaks its schema, and none is given without a token."""
        engine = self.engine(self.role.port)
        yield engine.start()
        yield poll(lambda: self.ask("GET", "/v1/engines/engine-1").body.get("state") == "running", "it runs")
        # What is asked shuts it down, too.
        keeping = LoopingCall(lambda: None if engine.is_running else engine.start())
        keeping.start(0.1)
        try:
            said = yield deferToThread(self.attack)
        finally:
            keeping.stop()
        self.assertEqual(said.returncode, 0, said.stdout[-20_000:] + said.stderr)
        self.assertNotIn("Traceback", self.role.log)

    def attack(self) -> subprocess.CompletedProcess[str]:
        """Let schemathesis ask. Blocks."""
        return subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run",
                f"{self.api}/openapi.json", "--header", f"Authorization: Bearer {self.tokens['admin']}",
                f"--max-examples={EXAMPLES}", f"--seed={SEED}", "--checks=all",
                # Valid, and refused all the same: 1.0 where an integer is wanted, a value that is not the setting's.
                "--exclude-checks=positive_data_acceptance",
                "--continue-on-failure",
            ],
            env=environment(),
            cwd=self.directory, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip


if sys.version_info < (3, 11):  # schemathesis needs it
    del LiveTests


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for each in value.values():
            yield from _nodes(each)
    elif isinstance(value, list):
        for each in value:
            yield from _nodes(each)


def _at(document: Any, pointer: str) -> Any:
    for part in pointer.removeprefix("#/").split("/"):
        document = document[part]
    return document
