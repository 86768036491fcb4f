"""Every operation by the command line, by the client and by a bare HTTP request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.client import AdminClient
from s2s.admin.operations import all_operations
from s2s.admin.operations.operation import encode
from s2s.cli import main
from s2s.errors import Refused
from s2s.handlers.discovery import Found
from s2s.world.tables import COUNTS
from tests.cli.test_order import GIVEN, WorldTestCase
from tests.support.http import ApiTestCase
from tests.support.installed import OPERATIONS
from tests.support.waiting import poll

#: Commands that do not work over HTTP, because they need the database itself or this machine.
NOT_OVER_HTTP = {
    "up", "certs make", "plugins list", "db migrate", "db status", "db fix-sequences", "db fix-id", "world seed",
    "keys add", "keys activate", "keys retire", "keys revoke", "tokens add", "tokens list", "tokens revoke",
}  # fmt: skip


@dataclass(frozen=True)
class Deed:
    """One operation in three forms.

    :param line: the command line, beginning with the command's name.
    :param call: the call of the client.
    :param request: method, path and body of the bare request.
    :param before: SQL that restores the state before the deed.
    :param check: SQL, and its result after the deed.
    """

    line: tuple[str, ...]
    call: Callable[[AdminClient], Deferred[Any]]
    request: tuple[Any, ...]
    before: str = "select"
    check: tuple[str, Any] = ("select", None)

    @property
    def command(self) -> str:
        """The name of the command."""
        return next(name for name in COMMANDS if (*self.line,)[: len(name.split())] == tuple(name.split()))


def _commands(group: click.Group, *before: str) -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, *before, name)
        else:
            yield " ".join((*before, name))


COMMANDS = sorted(_commands(main), key=len, reverse=True)

#: Lists and single rows: each way returns the same.
READS = (
    Deed(("engine", "list"), lambda c: c.list_engines(), ("GET", "/v1/engines")),
    Deed(("order", "list"), lambda c: c.list_orders(), ("GET", "/v1/orders")),
    Deed(
        (
            "order",
            "list",
            "--status",
            "queued",
            "--rpc",
            "admin.engine.force_tick.v1",
            "--limit",
            "1",
            "--before",
            "o2",
        ),
        lambda c: c.list_orders(status="queued", rpc="admin.engine.force_tick.v1", limit=1, cursor="o2"),
        ("GET", "/v1/orders?status=queued&rpc=admin.engine.force_tick.v1&limit=1&cursor=o2"),
    ),
    Deed(("order", "show", "o1"), lambda c: c.show_order("o1"), ("GET", "/v1/orders/o1")),
    Deed(("commands", "list"), lambda c: c.list_commands(), ("GET", "/v1/commands")),
    Deed(
        ("commands", "list", "--status", "dead", "--type", "a.b", "--limit", "2", "--before", "3"),
        lambda c: c.list_commands(status="dead", cmd_type="a.b", limit=2, cursor="3"),
        ("GET", "/v1/commands?status=dead&cmd_type=a.b&limit=2&cursor=3"),
    ),
    Deed(("commands", "show", "2"), lambda c: c.show_command(2), ("GET", "/v1/commands/2")),
    Deed(("outbox", "list"), lambda c: c.list_outbox(), ("GET", "/v1/outbox")),
    Deed(
        ("outbox", "list", "--state", "dead", "--type", "a.b", "--limit", "2", "--before", "3"),
        lambda c: c.list_outbox(state="dead", cmd_type="a.b", limit=2, cursor="3"),
        ("GET", "/v1/outbox?state=dead&cmd_type=a.b&limit=2&cursor=3"),
    ),
    Deed(("outbox", "show", "2"), lambda c: c.show_outbox_row(2), ("GET", "/v1/outbox/2")),
    Deed(("notices", "list"), lambda c: c.list_notices(), ("GET", "/v1/notices")),
    Deed(
        ("notices", "list", "--limit", "1", "--before", "2"),
        lambda c: c.list_notices(limit=1, cursor="2"),
        ("GET", "/v1/notices?limit=1&cursor=2"),
    ),
    Deed(("config", "list"), lambda c: c.list_config(), ("GET", "/v1/config")),
    Deed(("config", "history"), lambda c: c.list_config_history(), ("GET", "/v1/config/history")),
    Deed(
        ("config", "history", "--key", "relay.window", "--limit", "1", "--before", "2"),
        lambda c: c.list_config_history(key="relay.window", limit=1, cursor="2"),
        ("GET", "/v1/config/history?key=relay.window&limit=1&cursor=2"),
    ),
    Deed(("audit",), lambda c: c.list_audit(), ("GET", "/v1/audit")),
    Deed(
        (
            "audit",
            "--actor",
            "tester",
            "--action",
            "config.set",
            "--subject",
            "relay.window",
            "--limit",
            "1",
            "--before",
            "99",
        ),
        lambda c: c.list_audit(actor="tester", action="config.set", subject="relay.window", limit=1, cursor="99"),
        ("GET", "/v1/audit?actor=tester&action=config.set&subject=relay.window&limit=1&cursor=99"),
    ),
    Deed(("keys", "list"), lambda c: c.list_keys(), ("GET", "/v1/keys")),
    Deed(("jobs", "list"), lambda c: c.list_jobs(), ("GET", "/v1/jobs")),
    Deed(("world", "show"), lambda c: c.show_report(COUNTS), ("GET", "/v1/world")),
)

_DEAD_COMMANDS = (
    "select setval('s2s.commands_cmd_id_seq', 3); delete from s2s.commands;"
    " insert into s2s.commands (cmd_id, cmd_type, idem_key, payload, status, finished_at, due_at)"
    " select n, case n when 3 then 'c.d' else 'a.b' end, n::text, '{}', 'dead', now(), now() + interval '1 hour'"
    " from generate_series(1, 3) n"
)
_READY_COMMANDS = f"{_DEAD_COMMANDS}; update s2s.commands set status = 'ready', due_at = now() + interval '1 hour'"
_COMMANDS_NOW = "select array_agg(cmd_id || status order by cmd_id) from s2s.commands"
_DEAD_ROWS = (
    "delete from s2s.outbox; insert into s2s.outbox (outbox_id, cmd_type, idem_key, payload, state)"
    " select n, case n when 3 then 'c.d' else 'a.b' end, n::text, '{}', 'dead' from generate_series(1, 3) n"
)
_WAITING_ROWS = f"{_DEAD_ROWS}; update s2s.outbox set state = 'waiting', send_at = now() + interval '1 hour'"
_ROWS_NOW = "select array_agg(outbox_id || state order by outbox_id) from s2s.outbox"

#: Changes of rows: each way has the same result.
WRITES = (
    Deed(
        ("commands", "retry", "1", "2"),
        lambda c: c.retry_commands([1, 2]),
        ("POST", "/v1/commands/retry", {"ids": [1, 2]}),
        _DEAD_COMMANDS,
        (_COMMANDS_NOW, ["1ready", "2ready", "3dead"]),
    ),
    Deed(
        ("commands", "retry", "--all-dead", "--type", "a.b"),
        lambda c: c.retry_dead_commands(cmd_type="a.b"),
        ("POST", "/v1/commands/retry-dead", {"cmd_type": "a.b"}),
        _DEAD_COMMANDS,
        (_COMMANDS_NOW, ["1ready", "2ready", "3dead"]),
    ),
    Deed(
        ("commands", "cancel", "3"),
        lambda c: c.cancel_commands([3]),
        ("POST", "/v1/commands/cancel", {"ids": [3]}),
        _READY_COMMANDS,
        (_COMMANDS_NOW, ["1ready", "2ready", "3cancelled"]),
    ),
    Deed(
        ("commands", "discard", "1"),
        lambda c: c.discard_commands([1]),
        ("POST", "/v1/commands/discard", {"ids": [1]}),
        _DEAD_COMMANDS,
        (_COMMANDS_NOW, ["2dead", "3dead"]),
    ),
    Deed(
        ("commands", "discard", "--all-dead"),
        lambda c: c.discard_dead_commands(),
        ("POST", "/v1/commands/discard-dead", {}),
        _DEAD_COMMANDS,
        (_COMMANDS_NOW, None),
    ),
    Deed(
        ("outbox", "retry", "1"),
        lambda c: c.retry_outbox_rows([1]),
        ("POST", "/v1/outbox/retry", {"ids": [1]}),
        _DEAD_ROWS,
        (_ROWS_NOW, ["1waiting", "2dead", "3dead"]),
    ),
    Deed(
        ("outbox", "retry", "--all-dead", "--type", "c.d"),
        lambda c: c.retry_dead_outbox_rows(cmd_type="c.d"),
        ("POST", "/v1/outbox/retry-dead", {"cmd_type": "c.d"}),
        _DEAD_ROWS,
        (_ROWS_NOW, ["1dead", "2dead", "3waiting"]),
    ),
    Deed(
        ("outbox", "cancel", "2"),
        lambda c: c.cancel_outbox_rows([2]),
        ("POST", "/v1/outbox/cancel", {"ids": [2]}),
        _WAITING_ROWS,
        (_ROWS_NOW, ["1waiting", "2dead", "3waiting"]),
    ),
    Deed(
        ("outbox", "discard", "1", "3"),
        lambda c: c.discard_outbox_rows([1, 3]),
        ("POST", "/v1/outbox/discard", {"ids": [1, 3]}),
        _DEAD_ROWS,
        (_ROWS_NOW, ["2dead"]),
    ),
    Deed(
        ("outbox", "discard", "--all-dead"),
        lambda c: c.discard_dead_outbox_rows(),
        ("POST", "/v1/outbox/discard-dead"),
        _DEAD_ROWS,
        (_ROWS_NOW, None),
    ),
    Deed(
        ("broadcast", "Hello", "--scope", "sector", "--sector-id", "5", "--severity", "warn", "--ttl", "60"),
        lambda c: c.add_broadcast("Hello", scope="sector", sector_id=5, severity="warn", ttl_s=60),
        (
            "POST",
            "/v1/broadcasts",
            {"message": "Hello", "scope": "sector", "sector_id": 5, "severity": "warn", "ttl_s": 60},
        ),
        "delete from s2s.broadcasts",
        (
            "select array_agg(row(message, scope, sector_id, severity, ttl_s)::text) from s2s.broadcasts",
            ["(Hello,sector,5,warn,60)"],
        ),
    ),
    Deed(
        ("config", "set", "relay.window", "7"),
        lambda c: c.set_config("relay.window", 7),
        ("PUT", "/v1/config/relay.window", {"value": 7}),
        "update s2s.config set value = '9' where key = 'relay.window'",
        ("select value from s2s.config where key = 'relay.window'", 7),
    ),
)
#: Operations that the command line does in another way, and single settings and rows.
CLIENT_ONLY = (
    Deed(
        (),
        lambda c: c.retry_command(1),
        ("POST", "/v1/commands/1/retry"),
        _DEAD_COMMANDS,
        (_COMMANDS_NOW, ["1ready", "2dead", "3dead"]),
    ),
    Deed(
        (),
        lambda c: c.cancel_command(1),
        ("POST", "/v1/commands/1/cancel", {}),
        _READY_COMMANDS,
        (_COMMANDS_NOW, ["1cancelled", "2ready", "3ready"]),
    ),
    Deed(
        (),
        lambda c: c.discard_command(1),
        ("POST", "/v1/commands/1/discard"),
        _DEAD_COMMANDS,
        (_COMMANDS_NOW, ["2dead", "3dead"]),
    ),
    Deed(
        (),
        lambda c: c.retry_outbox_row(1),
        ("POST", "/v1/outbox/1/retry"),
        _DEAD_ROWS,
        (_ROWS_NOW, ["1waiting", "2dead", "3dead"]),
    ),
    Deed(
        (),
        lambda c: c.cancel_outbox_row(1),
        ("POST", "/v1/outbox/1/cancel"),
        _WAITING_ROWS,
        (_ROWS_NOW, ["1dead", "2waiting", "3waiting"]),
    ),
    Deed(
        (),
        lambda c: c.discard_outbox_row(1),
        ("POST", "/v1/outbox/1/discard"),
        _DEAD_ROWS,
        (_ROWS_NOW, ["2dead", "3dead"]),
    ),
    Deed((), lambda c: c.show_config("relay.window"), ("GET", "/v1/config/relay.window")),
    Deed((), lambda c: c.show_catalogue(), ("GET", "/v1/catalogue")),
)


class ThreeWaysTestCase(ApiTestCase, WorldTestCase):
    """A server with its API, and a client of it."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Create the client."""
        yield super().setUp()
        self.client = AdminClient(self.api, self.tokens["admin"])
        self.addCleanup(self.client.close)

    def bare(self, deed: Deed) -> Any:
        """Perform a deed by a bare request."""
        answer = self.ask(*deed.request)
        self.assertIn(answer.status, (200, 201), (deed.request, answer.raw))
        return answer.body

    def called(self, deed: Deed) -> Deferred[Any]:
        """Perform a deed by the client, and return its reply as on the wire."""
        return deed.call(self.client).addCallback(lambda reply: json.loads(encode(reply)))

    def typed(self, *deeds: Deed) -> list[Any]:
        """Perform deeds by the command line, and return their JSON output."""
        told = self.shell(*((*deed.line, "--json") for deed in deeds))
        for deed, (code, _, stderr) in zip(deeds, told, strict=True):
            self.assertEqual((code, stderr), (0, ""), deed.line)
        return [json.loads(stdout) for _, stdout, _ in told]


class RowTests(ThreeWaysTestCase):
    """Reading and changing rows, without an engine."""

    @inlineCallbacks
    def test_reads(self) -> Iterator[Deferred[Any]]:
        """Each way returns the same rows, with the same filters and pages."""
        self.execute(f"{_DEAD_COMMANDS}; {_DEAD_ROWS}")
        self.execute(
            "insert into s2s.orders (order_id, rpc, params, created_at) select 'o' || n, 'admin.engine.force_tick.v1',"
            " '{\"job_type\": \"decay\"}', now() + n * interval '1 second' from generate_series(1, 3) n"
        )
        self.execute(
            "insert into s2s.notices (notice_id, cmd_id, scope, message, severity)"
            " select n, n, 'global', 'hello ' || n, 'info' from generate_series(1, 3) n"
        )
        for value in (5, 6, 7):
            self.execute(
                f"set s2s.actor = 'tester'; update s2s.config set value = '{value}' where key = 'relay.window'"
            )
        self.execute("insert into s2s.engines (name, wanted, reason) values ('e1', 'paused', 'night')")
        typed = yield deferToThread(self.typed, *READS)
        for deed, shown in zip(READS, typed, strict=True):
            body = self.bare(deed)
            called = yield self.called(deed)
            self.assertEqual(called, body, deed.request)
            rows = body["items"] if set(body) == {"items", "next_cursor"} else body
            self.assertTrue(rows, deed.request)
            self.assertEqual(_times(shown), _times(rows), deed.line)

    @inlineCallbacks
    def test_writes(self) -> Iterator[Deferred[Any]]:
        """Each way has the same effect, and an audit entry with the actor."""
        for deed in WRITES:
            self.execute(deed.before)
            yield deferToThread(self.typed, deed)
            self.assert_done(deed)
        yield self.without_the_shell(WRITES)

    @inlineCallbacks
    def test_what_the_shell_has_no_word_for(self) -> Iterator[Deferred[Any]]:
        """Operations that no command calls have the same effect by the client and by a bare request."""
        yield self.without_the_shell(CLIENT_ONLY)

    @inlineCallbacks
    def without_the_shell(self, deeds: Sequence[Deed]) -> Iterator[Deferred[Any]]:
        """Perform deeds by the client and by bare requests, and compare the replies."""
        for deed in deeds:
            self.execute(deed.before)
            body = self.bare(deed)
            self.assert_done(deed)
            self.execute(deed.before)
            called = yield self.called(deed)
            self.assert_done(deed)
            for each in (body, called):
                for changing in ("broadcast_id", "version"):
                    each.pop(changing, None)
            self.assertEqual(called, body)

    def assert_done(self, deed: Deed) -> None:
        """Assert the effect of a deed and its actor in the audit."""
        say, wanted = deed.check
        if wanted is None and say == "select":
            return
        self.assertEqual(self.execute(say)[0][0], wanted, deed)
        [(actor,)] = self.execute("select actor from s2s.audit order by audit_id desc limit 1")
        self.assertEqual(actor, "token:an-admin", deed)


class EngineTests(ThreeWaysTestCase):
    """Control requests and orders for a real engine."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Start the engine."""
        yield super().setUp()
        self.peer = self.engine(self.role.port)
        yield self.peer.start()
        yield self.linked()

    @inlineCallbacks
    def linked(self) -> Iterator[Deferred[Any]]:
        """Wait until the engine is running or paused."""
        yield poll(
            lambda: self.ask("GET", "/v1/engines/engine-1").body.get("state") in ("running", "paused"), "it is up"
        )

    @inlineCallbacks
    def test_steering(self) -> Iterator[Deferred[Any]]:
        """Health, pause, resume, sweep and shutdown return the engine's answer by each way."""
        why = {"reason": "a test"}
        steps: tuple[tuple[str, Mapping[str, Any], Callable[[AdminClient], Deferred[Any]], str, Any], ...] = (
            ("health", {}, lambda c: c.health_engine("engine-1"), "role", "engine"),
            ("pause", why, lambda c: c.pause_engine("engine-1", **why), "state", "paused"),
            ("resume", why, lambda c: c.resume_engine("engine-1", **why), "state", "running"),
            ("sweep", {"since_ts": 9}, lambda c: c.sweep_engine("engine-1", since_ts=9), "since_ts", 9),
        )
        words = {"reason": "--reason", "since_ts": "--since", "grace_ms": "--grace-ms"}

        def line(verb: str, body: Mapping[str, Any]) -> list[str]:
            options = [text for name, value in body.items() for text in (words[name], str(value))]
            return ["engine", verb, "engine-1", *options, "--json"]

        for verb, body, call, member, wanted in steps:
            [(code, stdout, stderr)] = yield deferToThread(self.shell, line(verb, body))
            self.assertEqual((code, stderr), (0, ""))
            answer = self.ask("POST", f"/v1/engines/engine-1/{verb}", body)
            called = yield call(self.client)
            for said in (json.loads(stdout), answer.body, called):
                self.assertEqual((said["engine"], said[member]), ("engine-1", wanted))
        shown = yield self.client.show_engine("engine-1")
        self.assertEqual((shown.name, shown.state, shown.wanted), ("engine-1", "running", "running"))
        self.assertEqual(json.loads(encode(shown)).keys(), self.ask("GET", "/v1/engines/engine-1").body.keys())

        body = {"grace_ms": 3000, **why}
        [(code, stdout, stderr)] = yield deferToThread(self.shell, line("shutdown", body))
        self.assertEqual((code, stderr, json.loads(stdout)["state"]), (0, "", "draining"))
        self.peer.assert_ended_well()
        yield self.peer.start()
        yield self.linked()
        self.assertEqual(self.ask("POST", "/v1/engines/engine-1/shutdown", body).body["state"], "draining")
        self.peer.assert_ended_well()
        yield self.peer.start()
        yield self.linked()
        called = yield self.client.shutdown_engine("engine-1", **why)
        self.assertEqual(called["state"], "draining")
        self.peer.assert_ended_well()

    @inlineCallbacks
    def test_orders(self) -> Iterator[Deferred[Any]]:
        """Each way can give each order and follow it to its end, and the order's row has the actor."""
        told = yield deferToThread(self.shell, *[["order", *argv, "--json"] for argv, *_ in GIVEN])
        for (_, rpc, params, result, *_), (code, stdout, stderr) in zip(GIVEN, told, strict=True):
            self.assertEqual((code, stderr), (0, ""))
            self.assert_order(json.loads(stdout), rpc, params, result)
        for _, rpc, params, result, *_ in GIVEN:
            answer = self.ask("POST", f"/v1/orders/{rpc}?wait=20", params)
            self.assertEqual(answer.status, 201, answer.raw)
            self.assertEqual(answer.headers["location"], f"/v1/orders/{answer.body['order_id']}")
            self.assert_order(answer.body, rpc, params, result)
        for _, rpc, params, result, *_ in GIVEN:
            order = yield self.client.give_order(rpc, params, wait_s=20)
            self.assert_order(json.loads(encode(order)), rpc, params, result)

    def assert_order(self, row: Mapping[str, Any], rpc: str, params: Any, result: Mapping[str, Any]) -> None:
        """Assert that an order is done by the link; the values of its result depend on earlier orders."""
        self.assertEqual((row["rpc"], row["params"], row["status"]), (rpc, params, "done"), row)
        self.assertEqual(row["result"].keys(), result.keys())
        self.assertEqual((row["actor"], row["way"], row["engine"]), ("token:an-admin", "link", "engine-1"))


class WholenessTests(SynchronousTestCase):
    """The coverage of these tests."""

    def test_whole(self) -> None:
        """Every command that works over HTTP, and every operation, is covered by these tests."""
        over_http = set(COMMANDS) - NOT_OVER_HTTP
        done = {deed.command for deed in (*READS, *WRITES)}
        steered = {f"engine {verb}" for verb in ("health", "pause", "resume", "sweep", "shutdown")}
        ordered = {f"order {argv[0]}" for argv, *_ in GIVEN}
        self.assertEqual(over_http, done | steered | ordered)
        for name in over_http:
            command: Any = main
            for word in name.split():
                command = command.get_command(click.Context(command), word)
            self.assertIn("url", {param.name for param in command.params}, name)
        methods = {operation.name for operation in all_operations(Found())}
        self.assertEqual({name for name in methods if not hasattr(AdminClient, name)}, set())


class ObserverTests(ThreeWaysTestCase):
    """A token of the role observer."""

    @inlineCallbacks
    def test_it_reads_all(self) -> Iterator[Deferred[Any]]:
        """An observer can read every resource, by each way."""
        self.execute(f"{_DEAD_COMMANDS}; {_DEAD_ROWS}")
        self.execute(
            "insert into s2s.orders (order_id, rpc, params) select 'o' || n, 'x', '{}' from generate_series(1, 3) n"
        )
        self.execute("insert into s2s.engines (name) values ('e1')")
        where = {"order_id": "o1", "cmd_id": "2", "outbox_id": "2", "name": "e1", "key": "relay.window"}
        for operation in OPERATIONS:
            if operation.method == "GET":
                answer = self.ask("GET", operation.path.format_map(where), role="observer")
                self.assertEqual(answer.status, 200, (operation, answer.raw))
        for path in ("/healthz", "/readyz", "/openapi.json"):
            self.assertEqual(self.ask("GET", path, role="observer").status, 200)
        told = yield deferToThread(self.shell, *[deed.line for deed in READS], role="observer")
        self.assertEqual({code for code, *_ in told}, {0})
        client = AdminClient(self.api, self.tokens["observer"])
        for deed in READS:
            yield deed.call(client)
        yield client.close()

    @inlineCallbacks
    def test_it_changes_nothing(self) -> Iterator[Deferred[Any]]:
        """Every write is refused, by each way, and leaves no trace but an audit entry for each order."""
        self.execute(f"{_DEAD_COMMANDS}; {_DEAD_ROWS}")
        before = self.everything()
        where = {"cmd_id": "2", "outbox_id": "2", "name": "e1", "key": "relay.window"}
        writes = [operation for operation in OPERATIONS if operation.is_write]
        for operation in writes:
            path = operation.path.format_map(where)
            answer = self.refused(403, "forbidden", operation.method, path, {}, role="observer")
            self.assertIn(
                f"it takes a token of role {operation.access}, and yours is of role observer", answer.body["detail"]
            )
        lines = [deed.line for deed in WRITES if deed.line != ("config", "set", "relay.window", "7")]
        told = yield deferToThread(self.shell, *lines, ("config", "set", "relay.window", "7"), role="observer")
        for code, stdout, stderr in told:
            self.assertEqual((code, stdout), (1, ""))
            self.assertRegex(stderr, "^Error: .*it takes a token of role .*, and yours is of role observer\n$")
        client = AdminClient(self.api, self.tokens["observer"])
        for deed in WRITES:
            refused = yield self.assertFailure(deed.call(client), Refused)
            self.assertEqual(refused.code, "forbidden")
        yield client.close()
        self.assertEqual(self.everything(), before)
        audit = self.execute(
            "select action, actor, result -> 'result' ->> 'code' from s2s.audit where actor like 'token:%'"
        )
        orders = [operation.path.rpartition("/")[2] for operation in writes if operation.takes_key]
        self.assertEqual(sorted(audit), sorted((rpc, "token:an-observer", "forbidden") for rpc in orders))

    def everything(self) -> dict[str, list[Any]]:
        """Return all rows except those of the audit and of the links."""
        tables = self.execute("select table_name from information_schema.tables where table_schema like 's2s%'")
        names = sorted({name for (name,) in tables} - {"audit", "engine_links"})
        return {name: self.execute(f"select t::text from {name} t order by 1") for name in names}

    def test_an_operator(self) -> None:
        """An operator may steer engines and change rows, but neither settings nor every ship."""
        self.execute(_DEAD_COMMANDS)
        self.assertEqual(self.ask("POST", "/v1/commands/1/retry", role="operator").status, 200)
        tick = self.ask("POST", "/v1/orders/admin.engine.force_tick.v1", {"job_type": "decay"}, role="operator")
        self.assertEqual(tick.status, 202)
        self.refused(404, "not_found", "POST", "/v1/engines/e1/pause", {"reason": "x"}, role="operator")
        for rpc in ("admin.config.set.v1", "admin.player.update_all_ships.v1"):
            self.refused(403, "forbidden", "POST", f"/v1/orders/{rpc}", {}, role="operator")
        self.refused(403, "forbidden", "PUT", "/v1/config/relay.window", {"value": 7}, role="operator")


def _times(value: Any) -> Any:
    """Normalize times to one notation, and drop the uptime."""
    if isinstance(value, dict):
        return {name: _times(each) for name, each in value.items() if name != "uptime_s"}
    if isinstance(value, list):
        return [_times(each) for each in value]
    return value.replace("+00:00", "Z") if isinstance(value, str) else value
