"""The OpenAPI document, and a test of a live server against it."""

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

from tests.cli.test_order import WorldTestCase
from tests.support.http import ApiTestCase
from tests.support.installed import OPERATIONS
from tests.support.roles import environment
from tests.support.waiting import poll

#: Most cases for each operation, and the seed of their generation.
EXAMPLES = int(os.environ.get("S2S_EXAMPLES", "10"))
SEED = os.environ.get("S2S_SEED", "1")


class DocumentTests(ApiTestCase):
    """The content of the document."""

    def test_it_is_whole(self) -> None:
        """The document has every operation with its answers, every schema is valid, and every reference resolves."""
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
    """A server and an engine under generated requests, which the document allows or forbids."""

    timeout = 300

    @inlineCallbacks
    def test_it_holds(self) -> Iterator[Deferred[Any]]:
        """No answer is a 500, undocumented or against its schema, and none is returned without a token."""
        engine = self.engine(self.role.port)
        yield engine.start()
        yield poll(lambda: self.ask("GET", "/v1/engines/engine-1").body.get("state") == "running", "it runs")
        # The generated requests also shut the engine down.
        keeping = LoopingCall(lambda: None if engine.is_running else engine.launch())
        keeping.start(0.1)
        try:
            said = yield deferToThread(self.attack)
        finally:
            keeping.stop()
        self.assertEqual(said.returncode, 0, said.stdout[-20_000:] + said.stderr)
        self.assertNotIn("Traceback", self.role.log)

    def attack(self) -> subprocess.CompletedProcess[str]:
        """Run schemathesis. Blocks."""
        return subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run",
                f"{self.api}/openapi.json", "--header", f"Authorization: Bearer {self.tokens['admin']}",
                f"--max-examples={EXAMPLES}", f"--seed={SEED}", "--checks=all",
                # The server refuses some requests that the document allows: 1.0 for an integer, or a value that does
                # not fit its setting.
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
