"""HTTP handling common to every operation, on a real server: hosts, methods, bodies, keys, orders and readiness."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.admin.http.long_polls import MOST
from s2s.admin.http.operation_runner import MOST_IN_LINE
from s2s.store.pool import blocking
from s2s.store.tables import tokens
from tests.cli.test_order import WorldTestCase
from tests.support.cluster import Cluster
from tests.support.concurrent_clients import ConcurrentClients
from tests.support.http import ApiTestCase, ask
from tests.support.installed import OPERATIONS
from tests.support.peer import K1, PUSH, command
from tests.support.roles import free_port
from tests.support.waiting import poll

TICK = "/v1/orders/admin.engine.force_tick.v1"
SECTOR = "/v1/orders/world.set_sector_status.v1"


class WrapperTests(ApiTestCase):
    """Checks that apply to every request."""

    def test_hosts(self) -> None:
        """Only localhost, IP addresses and configured names are accepted as Host, which prevents DNS rebinding."""
        for host in (
            "localhost",
            "LOCALHOST:8321",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]",
            "[::1]:8321",
            "192.0.2.7",
            "localhost.",
        ):
            self.assertEqual(self.ask("GET", "/v1/config", headers={"Host": host}).status, 200, host)
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "[::1",
            "a:b:c",
            "s2s.example",
        ):
            self.refused(421, "forbidden", "GET", "/v1/config", headers={"Host": host})
            for path in ("/healthz", "/readyz"):
                self.assertEqual(ask(self.api, "GET", path, headers={"Host": host}).status, 200, host)

    @inlineCallbacks
    def test_checks_of_a_load_balancer(self) -> Iterator[Deferred[Any]]:
        """/healthz and /readyz accept OPTIONS, HTTP/1.0 without Host, any query and any token; other paths do not."""
        # A server that has just begun to listen may still wait for its presence lock.
        yield poll(lambda: ask(self.api, "GET", "/readyz").status == 200, "the server is ready")
        port = int(self.api.rpartition(":")[2])
        for path, status in (
            (b"/healthz", b"200"), (b"/healthz?x", b"200"), (b"/healthz?a=1&a=1&%FF", b"200"), (b"/readyz", b"200"),
            (b"/readyz?x=1", b"200"), (b"/openapi.json", b"421"), (b"/v1/config", b"421"),
            (b"/healthz/", b"404"), (b"//healthz", b"404"), (b"/readyz//?x", b"404"), (b"/v1/config/", b"421"),
        ):  # fmt: skip
            for method in (b"GET", b"OPTIONS"):
                with socket.create_connection(("127.0.0.1", port)) as raw, self.subTest(method=method, path=path):
                    raw.sendall(method + b" " + path + b" HTTP/1.0\r\n\r\n")
                    said = raw.makefile("rb").read()
                    self.assertEqual(said.split(b" ")[1], status, said)
        for path in ("/healthz", "/readyz"):
            for wrong in ("Bearer guessed", "Basic YTpi", ""):
                self.assertEqual(ask(self.api, "GET", path, headers={"Authorization": wrong}).status, 200, wrong)

    @inlineCallbacks
    def test_more_hosts(self) -> Iterator[Deferred[Any]]:
        """--http-hosts adds host names."""
        api, server = self.make_server("--http-hosts", "s2s.example, Other.Example")
        yield server.start()
        for host, status in (("s2s.example:8321", 200), ("other.example", 200), ("third.example", 421)):
            answer = ask(api, "GET", "/v1/config", self.tokens["admin"], headers={"Host": host})
            self.assertEqual(answer.status, status)

    def test_headers(self) -> None:
        """Every response is typed, forbids caching and cross-origin use, and hides the server software."""
        for answer in (self.ask("GET", "/v1/config"), self.ask("GET", "/nothing"), ask(self.api, "GET", "/healthz")):
            self.assertEqual(answer.headers["cache-control"], "no-store")
            self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
            self.assertIn("default-src 'none'", answer.headers["content-security-policy"])
            self.assertEqual(answer.headers["server"], "s2s")
            self.assertEqual([name for name in answer.headers if name.startswith("access-control")], [])
        preflight = self.ask("OPTIONS", "/v1/config", headers={"Origin": "http://evil.example"})
        self.assertEqual((preflight.status, "access-control-allow-origin" in preflight.headers), (405, False))

    def test_headers_that_are_wrong(self) -> None:
        """A header that is not ASCII is invalid; one that is sent twice is ambiguous and refused."""
        self.refused(401, "auth_bad", "GET", "/v1/config", headers={"Authorization": "Bearer \u00e9"})
        self.refused(421, "forbidden", "GET", "/v1/config", headers={"Host": "\u00e9"})
        connection = http.client.HTTPConnection("127.0.0.1", int(self.api.rpartition(":")[2]))
        self.addCleanup(connection.close)
        for name in ("Host", "Authorization", "Idempotency-Key", "Content-Type"):
            connection.putrequest("POST", TICK, skip_host=True)
            ours = {
                "Host": "localhost",
                "Authorization": f"Bearer {self.tokens['admin']}",
                "Content-Type": "application/json",
            }
            for each, value in (*ours.items(), (name, ours.get(name, "k")), ("Idempotency-Key", "k")):
                connection.putheader(each, value)
            connection.putheader("Content-Length", "2")
            connection.endheaders(b"{}")
            answer = connection.getresponse()
            self.assertEqual((answer.status, json.loads(answer.read())["code"]), (400, "bad_envelope"), name)

    def test_paths_and_methods(self) -> None:
        """An unknown path is not found; a wrong method is refused with the methods that the path allows."""
        for path in (
            "/", "/v1", "/v1/", "/v1/engines/", "/v1//engines", "/v2/engines", "/v1/orders/a.b", "/v1/engines/%FF",
            "/v1/commands/0", "/v1/commands/x", "/v1/commands/1.0", "/v1/commands/%00",
            "/v1/commands/99999999999999999999", "*",
        ):  # fmt: skip
            self.refused(404, "not_found", "GET", path)
        nameless = self.refused(404, "not_found", "POST", "/v1/engines//pause", {"reason": "x"})
        self.assertIn("it has to give a name", nameless.body["detail"])
        for method, path, takes in (
            ("POST", "/v1/engines", "GET, HEAD"),
            ("DELETE", "/v1/config/relay.window", "GET, HEAD, PUT"),
            ("GET", TICK, "POST"),
            ("GET", "/v1/commands/retry", "POST"),
            ("PUT", "/v1/config/history", "GET, HEAD"),
            ("PATCH", "/healthz", "GET, HEAD, OPTIONS"),
            ("POST", "/openapi.json", "GET, HEAD"),
        ):
            answer = self.refused(405, "unsupported_type", method, path)
            self.assertEqual(answer.headers["allow"], takes)
            self.assertEqual(answer.body["supported"], takes.split(", "))
        head = self.ask("HEAD", "/v1/config")
        self.assertEqual((head.status, head.raw, head.headers["content-type"]), (200, b"", "application/json"))
        self.assertEqual(int(head.headers["content-length"]), len(self.ask("GET", "/v1/config").raw))

    def test_queries(self) -> None:
        """An unknown, invalid, repeated or undecodable query parameter is named."""
        for query, path in (
            ("limit=0", "/query/limit"),
            ("limit=501", "/query/limit"),
            ("limit=1.5", "/query/limit"),
            ("limit=", "/query/limit"),
            ("limit=01", "/query/limit"),
            ("status=Ready", "/query/status"),
            ("stauts=ready", "/query/stauts"),
            ("status=ready&status=dead", "/query/status"),
            ("cmd_type=%00", "/query/cmd_type"),
            ("cmd_type=%FF", "/query"),
            ("cursor=0", "/query/cursor"),
            ("cursor=x", "/query/cursor"),
            ("cursor=1000000000000000000", "/query/cursor"),
            ("a~b/c=1&a~b/c=1", "/query/a~0b~1c"),
            ("&".join(f"x{n}=1" for n in range(40)), "/query"),
        ):
            answer = self.refused(422, "bad_payload", "GET", f"/v1/commands?{query}")
            self.assertEqual(answer.body["path"], path, query)
        self.assertEqual(
            self.refused(404, "not_found", "GET", "/v1/orders?cursor=nobody").body["path"], "/query/cursor"
        )
        self.refused(422, "bad_payload", "GET", "/openapi.json?x=1")
        self.assertEqual(
            self.ask("GET", "/v1/commands?cmd_type=%C3%A9&limit=500&cursor=999999999999999999").body["items"], []
        )

    def test_where_it_is_wrong(self) -> None:
        """An error names a member only if that member is wrong."""
        self.assertNotIn("path", self.refused(404, "not_found", "PUT", "/v1/config/nope", {"value": 1}).body)
        many = "&".join(f"a{n}=1" for n in range(40))
        self.assertIn("more than 32", self.refused(422, "bad_payload", "GET", f"/v1/orders?{many}").body["detail"])

    def test_bodies(self) -> None:
        """A body is one strict JSON object that fits the schema; an error in it is named, and no order is inserted."""
        for raw, rule in (
            (b"{", "syntax"),
            (b"[]", "not_object"),
            (b'{"job_type": "a", "job_type": "b"}', "duplicate_member"),
            (b'{"job_type": 1.0}', "float"),
            (b'{"job_type": "\\ud800"}', "lone_surrogate"),
            (b'{"job_type": "\\u0000"}', "nul"),
            (b"\xff", "utf8"),
            (b"\xef\xbb\xbf{}", "bom"),
            (b'{"job_type": ' + b"[" * 40 + b"]" * 40 + b"}", "depth"),
        ):
            answer = self.refused(400, "bad_json", "POST", TICK, raw=raw)
            self.assertEqual(answer.body["rule"], rule, raw)
        for body, path in (
            ({}, "/body/job_type"),
            ({"job_type": 5}, "/body/job_type"),
            ({"job_type": "a", "x": 1}, "/body/x"),
        ):
            self.assertEqual(self.refused(422, "bad_payload", "POST", TICK, body).body["path"], path)
        self.assertEqual(
            self.refused(422, "bad_payload", "POST", "/v1/commands/1/retry", {"x": 1}).body["path"], "/body/x"
        )
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            self.refused(415, "unsupported_type", "POST", TICK, raw=b"{}", headers={"Content-Type": kind})
        for coding, raw in (("gzip", gzip.compress(b"{}")), ("br", b"{}"), ("gzip, identity", b"{}")):
            coded = {"Content-Type": "application/json", "Content-Encoding": coding}
            answer = self.refused(415, "unsupported_type", "POST", TICK, raw=raw, headers=coded)
            self.assertIn("without Content-Encoding", answer.body["detail"])
        undeclared = self.refused(400, "bad_json", "POST", TICK, raw=gzip.compress(b"{}"))
        self.assertIn("it is compressed with gzip", undeclared.body["detail"])
        fine = {"Content-Encoding": "Identity", "Content-Type": "Application/JSON; charset=utf-8"}
        self.refused(422, "bad_payload", "POST", TICK, raw=b"{}", headers=fine)
        self.assertEqual(self.count("orders"), 0)

    def test_long_bodies(self) -> None:
        """A body may have the operation's maximum length; one byte more is refused for its length."""
        for method, path, longest in (
            ("POST", "/v1/engines/x/health", 16_384),
            ("POST", "/v1/engines/x/pause", 16_384),
            ("POST", TICK, 16_384),
            ("POST", "/v1/commands/1/retry", 16_384),
            ("POST", "/v1/commands/retry-dead", 16_384),
            ("GET", "/v1/engines", 16_384),
            ("POST", "/v1/nowhere", 16_384),
            ("POST", "/v1/outbox/cancel", 65_536),
            ("POST", "/v1/broadcasts", 65_536),
            ("PUT", "/v1/config/relay.window", 262_144),
            ("POST", "/v1/orders/admin.config.set.v1", 262_144),
        ):
            answer = self.refused(413, "toolarge", method, path, raw=b"[" * (longest + 1))
            self.assertEqual(answer.body["limit"], longest)
            self.assertNotEqual(self.ask(method, path, raw=b"[" * longest).status, 413)

    def test_as_much_as_may_be_said(self) -> None:
        """The longest broadcast in its longest encoding, and the largest number of ids, fit into the maximum body."""
        told = {"scope": "global", "severity": "info", "message": "\N{PARTY POPPER}" * 4000}
        self.assertEqual(self.ask("POST", "/v1/broadcasts", told).status, 201)
        ids = {"ids": [2**53 - 1 - number for number in range(1000)]}
        self.assertEqual(self.ask("POST", "/v1/commands/retry", ids).status, 200)

    def test_refused_orders_are_told(self) -> None:
        """An order that its schema refuses inserts an audit entry with its actor, and no order."""
        self.ask("POST", SECTOR, {"sector_id": 0, "status": "neutral"})
        self.ask("POST", SECTOR, {"sector_id": 1, "status": "x" * 5000})
        told = self.execute(
            "select actor, action, params, result from s2s.audit where actor like 'token:%' order by audit_id"
        )
        self.assertEqual({row[:2] for row in told}, {("token:an-admin", "world.set_sector_status.v1")})
        self.assertEqual(told[0][2], {"sector_id": 0, "status": "neutral"})
        self.assertEqual(told[0][3]["result"]["code"], "bad_payload")
        self.assertEqual(list(told[1][2]), ["cut"])

    def test_rows_in_the_way(self) -> None:
        """A row that does not exist, is locked, or has another status than the action requires is reported."""
        self.execute(
            "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload, status, finished_at)"
            " values (1, 'a.b', '1', '{}', 'done', now()), (2, 'a.b', '2', '{}', 'dead', now())"
        )
        answer = self.refused(409, "stale_version", "POST", "/v1/commands/1/retry")
        self.assertEqual((answer.body["state"], answer.body["retryable"]), ("done", False))
        self.assertIn("command 1: is done", answer.body["detail"])
        self.assertIn(
            "is dead and does not run: retry, or discard",
            self.refused(409, "stale_version", "POST", "/v1/commands/2/cancel").body["detail"],
        )
        self.refused(404, "not_found", "POST", "/v1/commands/3/retry")
        with blocking(self.url) as txn:
            txn.execute("select from s2s.commands where cmd_id = 2 for update")
            answer = self.refused(409, "not_ready", "POST", "/v1/commands/2/retry")
            self.assertEqual((answer.headers["retry-after"], answer.body["retryable"]), ("1", True))
        fates = self.ask("POST", "/v1/commands/retry", {"ids": [3, 2, 1, 2]}).body["items"]
        told = [(fate["id"], fate["is_done"], fate["outcome"]) for fate in fates]
        self.assertEqual(told, [(3, False, "missing"), (2, True, "retried"), (1, False, "done")])
        for ids in ([], [0], list(range(1, 1002)), "1"):
            self.refused(422, "bad_payload", "POST", "/v1/commands/retry", {"ids": ids})

    def test_long_rows(self) -> None:
        """A page of long rows ends early; the next pages return the remaining rows, without gaps or repetitions."""
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) select 'a.b', n::text,"
            " jsonb_build_object('text', repeat('x', 100000)) from generate_series(1, 50) n"
        )
        seen: list[int] = []
        cursor, pages = "", 0
        while cursor is not None:
            body = self.ask("GET", f"/v1/outbox?limit=500{cursor and f'&cursor={cursor}'}").body
            seen += [row["outbox_id"] for row in body["items"]]
            self.assertLess(len(json.dumps(body)), 3_000_000)
            cursor, pages = body["next_cursor"], pages + 1
        self.assertEqual((len(seen), seen), (50, sorted(seen, reverse=True)))
        self.assertEqual(pages, 3)

    def test_cursors(self) -> None:
        """Every list is paged by limit and cursor."""
        for table, columns, values in (
            ("engines", "name, wanted", "'e' || n, 'paused'"),
            ("orders", "order_id, rpc, params, created_at", "'o' || n, 'x', '{}', '2026-01-01'"),
            ("notices", "cmd_id, scope, message, severity", "n, 'global', 'x', 'info'"),
            ("commands", "cmd_type, idem_key, payload", "'a', n::text, '{}'"),
            ("outbox", "cmd_type, idem_key, payload", "'a', n::text, '{}'"),
            ("jobs", "job_type, schedule, due_at", "'j' || n, 'every:9s', now()"),
            ("s2s_keys", "key_id, key_b64, role", "'x' || n, 'x', 'any'"),
        ):
            self.execute(f"insert into {table} ({columns}) select {values} from generate_series(1, 5) n")
        for value in range(2, 7):
            self.execute(f"update s2s.config set value = '{value}' where key = 'relay.window'")
        for operation in OPERATIONS:
            if "cursor" not in operation.query:
                continue
            whole = self.ask("GET", f"{operation.path}?limit=500").body
            self.assertGreaterEqual(len(whole["items"]), 5, operation)
            self.assertIsNone(whole["next_cursor"])
            found, cursor = [], None
            for _ in range(100):
                answer = ask(
                    self.api,
                    "GET",
                    f"{operation.path}?limit=2{f'&cursor={cursor}' if cursor else ''}",
                    self.tokens["admin"],
                )
                found += answer.body["items"]
                self.assertLessEqual(len(answer.body["items"]), 2)
                cursor = answer.body["next_cursor"] and answer.body["next_cursor"].replace("\n", "%0A")
                if cursor is None:
                    break
            self.assertEqual(found, whole["items"], operation)

    def test_json_of_another_hand(self) -> None:
        """Undecodable JSON in a row is replaced by a placeholder, and the other rows are returned too."""
        self.execute(
            "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload)"
            " values (1, 'a', '1', '{\"n\": 1e400}'), (2, 'a', '2', '{}')"
        )
        rows = self.ask("GET", "/v1/commands").body["items"]
        why = "a number in it is out of range, beyond 1.8e308: say it as a string"
        unreadable = {"unreadable": f"(JSON that cannot be read: {why})"}
        self.assertEqual([row["payload"] for row in rows], [{}, unreadable])

    def test_times_of_another_hand(self) -> None:
        """A time outside Python's range is returned as the range's first or last time, beside the other rows."""
        self.execute(
            "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload, due_at) values (1, 'a', '1',"
            " '{}', 'infinity'),"
            " (2, 'a', '2', '{}', '294276-12-31'), (3, 'a', '3', '{}', '0044-03-15 BC'), (4, 'a', '4', '{}', now())"
        )
        rows = self.ask("GET", "/v1/commands").body["items"]
        self.assertEqual([row["due_at"][:4] for row in rows[1:]], ["0001", "9999", "9999"])

    @inlineCallbacks
    def test_the_end(self) -> Iterator[Deferred[Any]]:
        """A server that stops answers waiting requests with the current state, and ends in time."""
        asking = [deferToThread(self.ask, "POST", f"{TICK}?wait=50", {"job_type": "decay"}) for _ in range(5)]
        yield poll(lambda: self.count("orders") == 5, "all wait")
        self.role.terminate()
        answers = yield gatherResults(asking)
        self.assertEqual({(answer.status, answer.body["status"]) for answer in answers}, {(202, "queued")})
        self.role.assert_ended_well()


class OrderTests(ApiTestCase, WorldTestCase):
    """Orders over HTTP."""

    @inlineCallbacks
    def test_the_statuses(self) -> Iterator[Deferred[Any]]:
        """The status is 202 before the order's end, 201 if new and over, 200 if known and over, 409 for a conflict."""
        key = {"Idempotency-Key": "a key"}
        body = {"sector_id": 3, "status": "fedspace"}
        first = self.ask("POST", SECTOR, body, headers=key)
        self.assertEqual((first.status, first.body["status"], first.body["idem_key"]), (202, "queued", "a key"))
        self.assertEqual((first.body["rpc"], first.body["params"]), ("world.set_sector_status.v1", body))
        self.assertEqual(first.body["actor"], "token:an-admin")
        again = self.ask("POST", SECTOR, body, headers=key)
        self.assertEqual((again.status, again.body["order_id"]), (202, first.body["order_id"]))
        other = self.refused(409, "idem_conflict", "POST", SECTOR, {**body, "status": "neutral"}, headers=key)
        self.assertEqual(other.body["order_id"], first.body["order_id"])
        self.refused(409, "idem_conflict", "POST", TICK, {"job_type": "decay"}, headers=key)
        engine = self.engine(self.role.port)
        yield engine.start()
        followed = yield deferToThread(self.ask, "GET", f"/v1/orders/{first.body['order_id']}?wait=20")
        self.assertEqual((followed.status, followed.body["status"]), (200, "done"))
        self.assertEqual(followed.body["result"], {"sector_id": 3, "status": "fedspace", "was": "neutral"})
        self.assertEqual(self.ask("POST", SECTOR, body, headers=key).status, 200)
        new = yield deferToThread(self.ask, "POST", f"{SECTOR}?wait=20", body)
        self.assertEqual((new.status, new.body["status"]), (201, "done"))
        self.assertEqual(new.headers["location"], f"/v1/orders/{new.body['order_id']}")
        refused = yield deferToThread(self.ask, "POST", f"{SECTOR}?wait=20", {**body, "sector_id": 99})
        self.assertEqual((refused.status, refused.body["status"]), (201, "refused"))
        self.assertEqual(refused.body["result"]["code"], "not_found")
        self.assertEqual(self.count("orders"), 3)

    def test_keys(self) -> None:
        """An invalid idempotency key, or a key for an operation that takes none, is refused."""
        for key in ("", "x" * 201, "\u00e9"):
            answer = self.refused(422, "bad_payload", "POST", TICK, {"job_type": "a"}, headers={"Idempotency-Key": key})
            self.assertEqual(answer.body["path"], "/header/Idempotency-Key")
        self.refused(422, "bad_payload", "POST", "/v1/commands/retry", {"ids": [1]}, headers={"Idempotency-Key": "k"})
        self.assertEqual(self.count("orders"), 0)

    @inlineCallbacks
    def test_at_a_server_without_a_link(self) -> Iterator[Deferred[Any]]:
        """An order given at a server without a link goes over the link of another server, at once."""
        api, other = self.make_server()
        yield other.start()
        engine = self.engine(self.role.port)
        yield engine.start()
        yield self.role.says("engine up")
        answer = yield deferToThread(
            ask, api, "POST", f"{SECTOR}?wait=20", self.tokens["admin"], {"sector_id": 3, "status": "neutral"}
        )
        self.assertEqual((answer.status, answer.body["status"], answer.body["way"]), (201, "done", "link"), answer.raw)
        paused = yield deferToThread(
            ask, api, "POST", "/v1/engines/engine-1/pause", self.tokens["admin"], {"reason": "x"}
        )
        self.assertEqual((paused.status, paused.body["state"]), (200, "paused"))

    @inlineCallbacks
    def test_without_any_link(self) -> Iterator[Deferred[Any]]:
        """Without any link the engine finds the order in the table, and the waiting request gets its result."""
        yield self.engine(free_port()).start()
        answer = yield deferToThread(self.ask, "POST", f"{SECTOR}?wait=30", {"sector_id": 3, "status": "neutral"})
        self.assertEqual((answer.status, answer.body["status"], answer.body["way"]), (201, "done", "table"))

    @inlineCallbacks
    def test_what_an_engine_refuses(self) -> Iterator[Deferred[Any]]:
        """An engine that is unknown, does not answer or has no link is refused with a different problem for each."""
        engine = self.engine(self.role.port)
        yield engine.start()
        yield poll(lambda: self.ask("GET", "/v1/engines/engine-1").body.get("state") == "running", "it runs")
        self.refused(404, "not_found", "POST", "/v1/engines/nobody/pause", {"reason": "x"})
        answer = self.refused(422, "bad_payload", "POST", "/v1/engines/engine-1/pause", {})
        self.assertEqual(answer.body["path"], "/body/reason")
        engine.freeze()
        answer = yield deferToThread(
            self.refused, 504, "deadline_exceeded", "POST", "/v1/engines/engine-1/pause", {"reason": "x"}
        )
        self.assertIn("engine-1 did not answer, the outcome is unknown", answer.body["detail"])
        engine.kill()
        yield poll(lambda: self.ask("GET", "/v1/engines/engine-1").status == 404, "its link is gone")
        self.execute("insert into s2s.engines (name, wanted) values ('engine-1', 'paused') on conflict do nothing")
        self.refused(409, "not_ready", "POST", "/v1/engines/engine-1/resume", {"reason": "x"})


class BoundTests(ApiTestCase):
    """Bounds of the memory that a client can occupy in the server."""

    #: MiB that are sent: more than the kernel's buffers of a connection hold, and less than the responses would need.
    _SENT_MIB = 12

    def test_answers_that_nobody_reads(self) -> None:
        """While a client does not read responses its requests are not read; the accepted ones are answered later."""
        parts = urlsplit(self.api)
        before = self.role.rss
        # The requests have a token; without one each request would wait for its turn.
        signed = b"GET /%s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n"
        requests = [signed % (path, self.tokens["observer"].encode()) for path in (b"healthz", b"openapi.json")]
        for request in requests:
            with socket.create_connection((parts.hostname, parts.port), timeout=2) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                sent, many = 0, request * 1000
                with self.assertRaises(TimeoutError):
                    while sent < self._SENT_MIB << 20:
                        sent += one.send(many[sent % len(request) :])
                self.assertLess(self.role.rss - before, 16 << 20)
                self.assertEqual(self.ask("GET", "/healthz").status, 200)
                if request is requests[0]:
                    got = bytearray()
                    while got.count(b'{"status":"ok"}') < sent // len(request):
                        got += one.recv(1 << 20)

    @inlineCallbacks
    def test_a_question_that_nobody_waits_for(self) -> Iterator[Deferred[Any]]:
        """A client that disconnects during the health checks of engines leaves no row of a control request."""
        self.execute(
            "insert into s2s.engine_links (server_boot_id, key_id, name, address) values ('b', 'k1', 'e1', 'here')"
        )
        parts = urlsplit(self.api)
        with socket.create_connection((parts.hostname, parts.port), timeout=2) as one:
            one.sendall(
                b"GET /v1/engines HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
                + self.tokens["observer"].encode()
                + b"\r\n\r\n"
            )
            yield poll(lambda: self.count("steering"), "it is asked")
        yield poll(lambda: not self.count("steering"), "the row is gone")

    @inlineCallbacks
    def test_over_tls(self) -> Iterator[Deferred[Any]]:
        """Over TLS too, bytes behind a waiting request are not read while the earlier responses are unread."""
        port, server, root = self.make_tls_server()
        yield server.start()
        order_id = self.ask("POST", TICK, {"job_type": "decay"}).body["order_id"]
        head = f"Host: localhost\r\nAuthorization: Bearer {self.tokens['observer']}\r\n\r\n".encode()
        waits = f"GET /v1/orders/{order_id}?wait=60 HTTP/1.1\r\n".encode() + head
        before = server.rss
        context = ssl.create_default_context(cafile=str(root))
        with socket.create_connection(("127.0.0.1", port), timeout=2) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with context.wrap_socket(plain, server_hostname="localhost") as one:
                sent = 0
                with self.assertRaises(TimeoutError):
                    one.sendall((b"GET /healthz HTTP/1.1\r\n" + head) * 1000 + waits)
                    while sent < self._SENT_MIB << 20:
                        sent += one.send(b"x" * 65536)
                self.assertLess(server.rss - before, 16 << 20)


class ReadinessTests(ApiTestCase):
    """The readiness of a server."""

    def setUp(self) -> Any:
        """Create a PostgreSQL that the test can stop."""
        self.cluster = Cluster()
        self.addCleanup(self.cluster.remove)
        self.cluster.migrate()
        return super().setUp()

    @inlineCallbacks
    def test_rows_that_are_kept(self) -> Iterator[Deferred[Any]]:
        """A rule and a trigger that suppress changes of rows are named, and the server stays ready."""
        with blocking(self.cluster.url) as txn:
            token = tokens.add(txn, "a", "admin")
            txn.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values (%s, %s, 'any')", K1)
            txn.execute(
                "create rule quiet as on update to s2s.orders do instead nothing;"
                "create function keep() returns trigger language plpgsql set search_path from current as $$"
                " begin return null; end $$;"
                "create trigger keep before delete on s2s.outbox for each row execute function keep()"
            )
        self.url = self.cluster.url
        api, server = self.make_server("--executor-workers", "0")
        yield server.start()
        yield poll(lambda: ask(api, "GET", "/readyz", token).body["database"] != "ok", "the look")
        ready = ask(api, "GET", "/readyz", token)
        self.assertEqual(ready.status, 200)
        self.assertRegex(
            ready.body["database"], "^ok, but rule quiet on s2s.orders .*drop rule quiet.*drop trigger keep"
        )
        self.assertEqual(ask(api, "GET", "/readyz").body["database"], "ok")

    @inlineCallbacks
    def test_the_database_is_away(self) -> Iterator[Deferred[Any]]:
        """While the database hangs or is stopped, the server lives, is not ready, and answers with retryable errors."""
        with blocking(self.cluster.url) as txn:
            token = tokens.add(txn, "a", "admin")
            txn.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values (%s, %s, 'any')", K1)
        self.url = self.cluster.url
        api, server = self.make_server("--executor-workers", "0")
        yield server.start()
        ready = ask(api, "GET", "/readyz", token)
        parts = {"database": "ok", "pushes": "ok", "executor": "off"}
        self.assertEqual((ready.status, ready.body), (200, {"status": "ready", **parts}))
        self.cluster.freeze()
        self.addCleanup(self.cluster.thaw)
        hanging = deferToThread(ask, api, "GET", "/v1/config", token)
        # A readiness result is cached for one second.
        yield poll(lambda: ask(api, "GET", "/readyz", token).status == 503, "it is not ready")
        answer = ask(api, "GET", "/readyz", token)
        self.assertEqual((answer.status, answer.body["database"]), (503, "no answer within 2 s"))
        for stranger in (None, "guessed"):
            answer = ask(api, "GET", "/readyz", stranger)
            parts = answer.body["database"], answer.body["executor"]
            self.assertEqual((answer.status, *parts), (503, "not ready", "off"))
            self.assertEqual(answer.body["detail"], "the server is not ready: database: not ready")
        answer = yield hanging
        self.assertEqual((answer.status, answer.body["code"]), (504, "deadline_exceeded"))
        self.cluster.thaw()
        self.cluster.stop()
        self.assertEqual(ask(api, "GET", "/healthz").status, 200)
        yield poll(lambda: ask(api, "GET", "/readyz", token).status == 503, "it is not ready")
        answer = ask(api, "GET", "/readyz", token)
        self.assertEqual((answer.status, answer.body["code"]), (503, "not_ready"))
        self.assertNotEqual(answer.body["database"], "ok")
        answer = ask(api, "GET", "/v1/config", token)
        self.assertEqual(
            (answer.status, answer.body["code"], answer.headers["retry-after"]), (503, "db_unavailable", "1")
        )
        answer = ask(api, "POST", TICK, token, {"job_type": "decay"})
        self.assertEqual((answer.status, answer.body["retryable"]), (503, True))
        self.cluster.start()
        yield poll(lambda: ask(api, "GET", "/readyz", token).status == 200, "it is ready")
        self.assertEqual(ask(api, "GET", "/readyz").body, ready.body)
        self.assertEqual(ask(api, "GET", "/v1/config", token).status, 200)

    @inlineCallbacks
    def test_the_executor(self) -> Iterator[Deferred[Any]]:
        """A server whose executor may not claim commands is not ready, and reports the reason."""
        yield poll(lambda: self.ask("GET", "/readyz").body.get("executor") == "ok", "it is ready")
        lose = (
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-server listen'"
            " and datname = current_database()"
        )
        seen = []

        def look() -> bool:
            self.execute(lose)
            answer = self.ask("GET", "/readyz")
            seen.append(answer.body)
            return answer.status == 503 and answer.body["executor"] != "ok"

        yield poll(look, "it is not ready")
        yield poll(lambda: self.ask("GET", "/readyz").status == 200, "it is ready again")


class WaitingTests(ApiTestCase):
    """The largest number of waiting requests."""

    @inlineCallbacks
    def test_the_most(self) -> Iterator[Deferred[Any]]:
        """Waiting requests delay no other request and end with the order; one above the limit is refused."""
        order_id = self.ask("POST", TICK, {"job_type": "decay"}).body["order_id"]
        # Each group of clients fits into the line for a connection, together with other requests.
        path, part = f"/v1/orders/{order_id}?wait=60", MOST_IN_LINE // 2
        before = self.role.rss
        crowds = []
        for _ in range(MOST // part):
            crowds.append(crowd := ConcurrentClients(self.api, self.tokens["admin"], path, part))
            self.addCleanup(crowd.close)
            crowd.send()
            # This request stands behind the group in the line.
            yield poll(lambda: self.ask("GET", f"/v1/orders/{order_id}").status == 200, "the line is short again")
        peer = self.role.connect()
        self.addCleanup(peer.close)
        peer.greet()
        for number in range(20):
            self.assertTrue(peer.call(PUSH, command(f"c{number}"))["accepted"])
            self.assertEqual(self.ask("GET", "/v1/config").status, 200)
        yield poll(lambda: self.count("notices") == 20, "the commands have run")
        self.assertEqual(sum(crowd.answered() for crowd in crowds), 0)
        self.assertLess(self.role.rss - before, 100 << 20)

        shortly = f"/v1/orders/{order_id}?wait=1"
        yield poll(lambda: self.ask("GET", shortly).status == 503, "all of them wait")
        self.assertEqual(self.refused(503, "overloaded", "GET", path).body["retryable"], True)
        # The order is stored, so the response must not suggest to send it again.
        given = self.ask("POST", TICK + "?wait=5", {"job_type": "decay"})
        self.assertEqual((given.status, given.body["status"]), (202, "queued"))

        self.execute("update s2s.orders set status = 'done', finished_at = now()")
        yield poll(lambda: sum(crowd.answered() for crowd in crowds) == MOST, "all are answered")
        self.assertEqual([crowd.statuses() for crowd in crowds], [{200: part}] * len(crowds))
