"""A server with its HTTP API, plain requests to it, and command lines that use it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, inlineCallbacks

from s2s.roles import certs
from s2s.store.access import ACCESS, Access
from s2s.store.pool import blocking
from s2s.store.tables import tokens
from tests.support.roles import RoleTestCase, Server, environment, free_port, listen

#: Program that runs command lines one after the other in one process, since a start takes half a second.
_SHELL = """
import json, sys
from click.testing import CliRunner
from s2s.cli import main
told = []
for argv in json.load(sys.stdin):
    result = CliRunner().invoke(main, argv)
    told.append((result.exit_code, result.stdout, result.stderr))
json.dump(told, sys.stdout)
"""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer.

    :param body: the parsed JSON body; ``None`` if the answer has no body.
    """

    status: int
    headers: Mapping[str, str]
    raw: bytes
    body: Any


def ask(
    url: str,
    method: str,
    path: str,
    token: str | None = None,
    body: Any = None,
    *,
    raw: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Make one request with Python's standard library. Blocks.

    :param body: is sent as JSON.
    :param raw: is sent unchanged.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=70)
    said = dict(headers or {})
    if token is not None:
        said.setdefault("Authorization", f"Bearer {token}")
    if body is not None:
        raw = json.dumps(body).encode()
    if raw is not None:
        said.setdefault("Content-Type", "application/json")
    try:
        connection.request(method, path, body=raw, headers=said)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    told = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, told, content, json.loads(content) if content else None)


def shell(lines: Sequence[Sequence[str]], **variables: str) -> list[tuple[int, str, str]]:
    """Run command lines in a process of their own. Blocks.

    :param variables: variables of its environment.
    :returns: exit code, stdout and stderr of each command line.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SHELL],
        input=json.dumps([list(line) for line in lines]),
        stdout=subprocess.PIPE,
        env=environment(COLUMNS="200", **variables),
        text=True,
        timeout=100,
        check=True,
    )
    return [tuple(each) for each in json.loads(done.stdout)]


class ApiTestCase(RoleTestCase):
    """A test with a real server and its API, and a token of each role.

    :ivar api: the API's base URL.
    :ivar tokens: the tokens by role.
    :ivar role: the server.
    """

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Make the tokens, and start the server."""
        super().setUp()
        with blocking(self.url) as txn:
            self.tokens: dict[Access, str] = {role: tokens.add(txn, f"an-{role}", role) for role in ACCESS}
        self.api, self.role = self.make_server()
        yield self.role.start()

    def make_server(self, *options: str, **how: Any) -> tuple[str, Server]:
        """Make a server with an API of its own."""
        port = free_port()
        return f"http://127.0.0.1:{port}", self.server(*options, http=listen(port), **how)

    def make_tls_server(self) -> tuple[int, Server, Path]:
        """Make a server whose API speaks TLS as ``localhost``.

        :returns: the port, the server, and the certificate of its authority.
        """
        tls, port = self.directory / "tls", free_port()
        certs.make(tls, ("localhost",), (), 30, datetime.now(timezone.utc), renew=False)
        endpoint = f"ssl:{port}:interface=127.0.0.1:privateKey={tls}/server.key:certKey={tls}/server.pem"
        [root] = (tls / "roots").glob("*.pem")
        return port, self.server(http=endpoint), root

    def ask(self, method: str, path: str, body: Any = None, *, role: Access = "admin", **how: Any) -> Answer:
        """Make one request to the API. Blocks."""
        return ask(self.api, method, path, self.tokens[role], body, **how)

    def refused(self, status: int, code: str, *args: Any, **how: Any) -> Answer:
        """Make one request, and assert that the answer is a refusal in the format of problem details."""
        answer = self.ask(*args, **how)
        self.assertEqual((answer.status, answer.body.get("code")), (status, code), answer.raw)
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual(answer.body["status"], status)
        self.assertEqual(answer.body["type"], f"urn:s2s:error:{code}")
        self.assertIs(type(answer.body["retryable"]), bool)
        self.assertTrue(answer.body["detail"] and answer.body["title"])
        return answer

    def token_file(self, role: Access = "admin") -> str:
        """Write a role's token to a file, and return its path."""
        path = Path(self.directory, f"{role}.token")
        path.write_text(self.tokens[role] + "\n")
        return str(path)

    def shell(self, *lines: Sequence[str], role: Access = "admin") -> list[tuple[int, str, str]]:
        """Run command lines that use the API. Blocks."""
        return shell(lines, S2S_URL=self.api, S2S_TOKEN_FILE=self.token_file(role))
