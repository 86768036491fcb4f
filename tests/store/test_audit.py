"""The audit: the actor, the action and the result of each change, by any path (docs/protocol.rst, "Audit")."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psycopg2
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BadPayload, Forbidden, NotReady, StatementRefused, WireError
from s2s.protocol.catalogue import SHUTDOWN
from s2s.protocol.envelope import Envelope
from s2s.protocol.limits import Counters
from s2s.protocol.received import Request
from s2s.roles.engine.audit_log import MAX_WAITING, AuditLog
from s2s.roles.engine.responders.shutdown import Shutdown
from s2s.roles.engine.state import EngineState
from s2s.store import driver
from s2s.store.pool import Database, blocking
from s2s.store.tables import actions, audit, commands_admin, config, control_requests, engines, outbox, tokens
from tests.cli.test_cli import CliTestCase
from tests.support.installed import CATALOGUE, ORDERS
from tests.support.peer import CHECK, Key, ListeningPeer, Peer
from tests.support.postgres import DatabaseTestCase, database_url, drop_database, make_database, template
from tests.support.roles import RoleTestCase
from tests.support.waiting import poll

_SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldCE="
_OTHER_SECRET = "b3RoZXItc2VjcmV0LW90aGVyLXNlY3JldC1vdGhlciEhISE="
_CONFIG_SET = "admin.config.set.v1"

#: Actor, action, subject, params and result.
Told = tuple[str, str, str, dict[str, Any], dict[str, Any] | None]


class AuditTestCase(DatabaseTestCase):
    """Base class of tests that read audit entries; the command line runs as Alice."""

    def setUp(self) -> None:
        """Set the user of the command line to Alice."""
        super().setUp()
        self.patch(getpass, "getuser", lambda: "alice")
        self._seen = 0

    def entries(self, **only: str) -> list[Told]:
        """Return the entries, oldest first."""
        with blocking(self.url) as txn:
            found = audit.LISTED.read(txn, 10_000, None, **only)
        return [(each.actor, each.action, each.subject, each.params, each.result) for each in reversed(found)]

    def new(self) -> list[Told]:
        """Return the entries since the last call."""
        found = self.entries()
        before, self._seen = self._seen, len(found)
        return found[before:]

    @property
    def user(self) -> str:
        """Return the session user of the database connection."""
        return str(self.execute("select session_user::text")[0][0])


class AppendOnlyTests(AuditTestCase):
    """The audit table itself."""

    def test_nothing_is_changed_or_removed(self) -> None:
        """UPDATE, DELETE, TRUNCATE and upsert are refused with the reason, even when ordinary triggers are disabled."""
        with blocking(self.url) as txn:
            audit.write(txn, "a.test", "x", {"n": 1}, None, "cli:me")
        before = self.execute("select * from s2s.audit")
        for role in ("origin", "replica"):
            self.execute(f"set session_replication_role = {role}")
            for statement in (
                "update s2s.audit set actor = 'nobody'",
                "update s2s.audit set actor = 'nobody' where false",
                "delete from s2s.audit",
                "truncate s2s.audit",
                "truncate s2s.audit cascade",
                "insert into s2s.audit (audit_id, actor, action) overriding system value select audit_id, 'nobody', 'a'"
                " from s2s.audit on conflict (audit_id) do update set actor = 'nobody'",
            ):
                with self.subTest(role=role, statement=statement):
                    refused = self.assertRaises(psycopg2.errors.InsufficientPrivilege, self.execute, statement)
                    self.assertIn("the audit is append-only", str(refused))
        self.assertEqual(self.execute("select * from s2s.audit"), before)

    def test_rolled_back(self) -> None:
        """A change that is rolled back leaves no entry."""
        with psycopg2.connect(self.url) as conn, conn.cursor() as txn:
            audit.sign(txn, "cli:me")
            txn.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k9', %s, 'any')", (_SECRET,))
            txn.execute("update s2s.config set value = '30' where key = 'server.sweep_interval_s'")
            engines.want(txn, "a", "paused", "night", "key:k1")
            actions.act(txn, commands_admin.RETRY, [1])
            txn.execute("select count(*) from s2s.audit")
            self.assertEqual(txn.fetchone(), (4,))
            conn.rollback()
        conn.close()
        self.assertEqual(self.entries(), [])

    async def test_a_signature_ends_with_its_transaction(self) -> None:
        """On a pooled connection, a transaction without a signature is audited under the session user."""
        database = Database(self.url, threads=1)
        database.start()
        self.addCleanup(database.stop)
        await database.run(engines.want, "a", "paused", "night", "key:k1")
        await database.run(lambda txn: txn.execute("update s2s.engines set wanted = 'running'"))
        self.assertEqual(
            [(actor, params["wanted"]) for actor, _, _, params, _ in self.entries()],
            [("key:k1", "paused"), (self.user, "running")],
        )

    def test_a_signature_of_a_session(self) -> None:
        """A session signature holds for each transaction of a command line, except one that signs for itself."""
        with blocking(self.url) as txn:
            audit.sign(txn, "cli:me", "a.b", for_session=True)
            driver.commit(txn.connection)
            audit.write(txn, "one", "", {})
            config.change(txn, "relay.window", 7, "key:k1")
            driver.commit(txn.connection)
            audit.write(txn, "two", "", {})
            txn.execute("insert into s2s.engines (name) values ('a')")
        self.assertEqual(
            [told[:2] for told in self.entries()],
            [("cli:me", "one"), ("key:k1", "a.b"), ("cli:me", "two"), ("cli:me", "a.b")],
        )


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


class ChangesTests(AuditTestCase, CliTestCase):
    """The triggers of the tables of settings, keys, orders and desired engine states."""

    def test_settings(self) -> None:
        """An entry of a change has the actor, version and old value; a repeated or refused change leaves no entry."""
        for value, expected in (("30", 0), ("30", 0), ("many", 1), ("-1", 1)):
            self.s2s("config", "set", "--", "server.sweep_interval_s", value, expected=expected)
        self.execute("update s2s.config set value = '40' where key = 'server.sweep_interval_s'")
        self.execute("update s2s.config set description = 'x'")
        setting = ("config.set", "server.sweep_interval_s")
        self.assertEqual(
            self.entries(),
            [
                ("cli:alice", *setting, {"value": 30}, {"version": 1, "was": 10}),
                (self.user, *setting, {"value": 40}, {"version": 2, "was": 30}),
            ],
        )

    def test_settings_by_sql(self) -> None:
        """A setting added, removed or redefined by SQL is audited with the old values; a release's settings are not."""
        self.assertEqual(self.new(), [])
        self.execute("insert into s2s.config (key, value, type, max) values ('my.own', '5', 'integer', 9)")
        self.execute("update s2s.config set max = 99 where key = 'my.own'")
        self.execute("update s2s.config set key = 'my.other' where key = 'my.own'")
        self.execute("delete from s2s.config where key = 'my.other'")
        self.execute("update s2s.config_version set version = 7")
        rules = {"value": 5, "type": "integer", "min": None, "description": ""}
        self.assertEqual(
            self.new(),
            [
                (self.user, "config.add", "my.own", {**rules, "key": "my.own", "max": 9}, None),
                (self.user, "config.change", "my.own", {"max": 99}, {"was": {"max": 9}}),
                (self.user, "config.change", "my.other", {"key": "my.other"}, {"was": {"key": "my.own"}}),
                (self.user, "config.delete", "my.other", {}, {"was": {**rules, "key": "my.other", "max": 99}}),
                (self.user, "config.version", "", {"version": 7}, {"was": 0}),
            ],
        )
        ((settings,),) = self.execute("select count(*) from s2s.config")
        self.execute("truncate s2s.config, s2s.config_version")
        told = self.new()
        self.assertEqual([each[1] for each in told].count("config.delete"), settings)
        self.assertIn((self.user, "config.version", "7", {}, {"was": {"version": 7}}), told)

    def test_truncated(self) -> None:
        """A TRUNCATE of tokens or engines leaves one entry per row, without the hash of a token."""
        self.execute("insert into s2s.engines (name, wanted, reason) values ('a', 'paused', 'night')")
        with blocking(self.url) as txn:
            tokens.add(txn, "mine", "admin")
        self.new()
        self.execute("truncate s2s.api_tokens, s2s.engines")
        token, engine = sorted(self.new(), key=lambda each: each[2], reverse=True)
        self.assertEqual(token[:4], (self.user, "tokens.revoke", "mine", {}))
        self.assertEqual(engine[:4], (self.user, "engine.wanted", "a", {}))
        assert token[4] is not None
        assert engine[4] is not None
        self.assertEqual((token[4]["was"]["role"], "token_sha256" in token[4]["was"]), ("admin", False))
        self.assertEqual((engine[4]["was"]["wanted"], engine[4]["was"]["reason"]), ("paused", "night"))

    def test_added_columns(self) -> None:
        """Entries of keys and tokens hold our own columns only, never a column that a DBA derived from a secret."""
        added = "add column copy text generated always as (encode({}, 'hex')) stored"
        for table, secret in (("s2s_keys", "decode(key_b64, 'base64')"), ("api_tokens", "token_sha256")):
            self.execute(f"alter table s2s.{table} {added.format(secret)}")
        self.new()
        with blocking(self.url) as txn:
            tokens.add(txn, "mine", "admin")
        self.execute("update s2s.api_tokens set note = 'x', token_sha256 = sha256('x')")
        self.execute("delete from s2s.api_tokens")
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k1', %s, 'any')", _SECRET)
        self.execute("update s2s.s2s_keys set note = 'x', key_b64 = %s", _OTHER_SECRET)
        self.execute("delete from s2s.s2s_keys")
        with blocking(self.url) as txn:
            tokens.add(txn, "mine", "admin")
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k1', %s, 'any')", _SECRET)
        self.execute("truncate s2s.s2s_keys, s2s.api_tokens")
        told = self.new()
        self.assertEqual(len(told), 10)
        self.assertNotIn("'copy'", str(told))
        self.assertEqual(told[4][3:], ({"note": "x", "key_b64": "changed"}, {"was": {"note": ""}}))
        columns = {"key_id", "role", "active_from", "active_to", "closed_at", "is_default_tx", "note", "created_at"}
        for entry in (told[3][3], (told[5][4] or {})["was"], (told[8][4] or {})["was"]):
            self.assertEqual(set(entry), columns | {"created_by"})
        self.assertEqual(set(told[0][3]), {"role", "note", "expires_at"})
        self.assertEqual(set((told[9][4] or {})["was"]), {"role", "note", "created_at", "created_by", "expires_at"})

    def test_from_any_search_path(self) -> None:
        """The triggers write to our own audit table under any search_path, even if a temporary table is named audit."""
        self.execute("create schema other")
        self.execute("create function other.actor() returns text language sql as $$ select 'nobody' $$")
        for number, path in enumerate(("public", "''", "pg_temp, public", "other", "other, public")):
            with self.subTest(path=path), blocking(self.url) as txn:
                txn.execute("create temporary table audit (like s2s.audit including all)")
                txn.execute("create temporary table config_history (like s2s.config_history)")
                txn.execute(f"set search_path = {path}")
                key = (f"k{number}", _SECRET)
                txn.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values (%s, %s, 'any')", key)
                txn.execute("update s2s.config set value = to_jsonb(%s) where key = 'relay.window'", (number + 1,))
                txn.execute("insert into s2s.broadcasts (message) values ('x')")
                txn.execute("insert into s2s.orders (rpc, params) values ('a.b', '{}')")
                txn.execute(
                    "select (select count(*) from pg_temp.audit), (select count(*) from pg_temp.config_history)"
                )
                self.assertEqual(txn.fetchone(), (0, 0))
                txn.execute("set search_path = public")
            told = self.new()
            self.assertEqual([each[1] for each in told], ["keys.add", "config.set", "a.b"])
            self.assertEqual([each[0] for each in told], [self.user] * 3)

    def test_every_function_has_its_search_path(self) -> None:
        """Each function of ours sets its own search_path, in which temporary tables come last."""
        functions = self.execute("select proname, proconfig from pg_proc where pronamespace = 's2s'::regnamespace")
        self.assertGreater(len(functions), 10)
        for name, settings in functions:
            with self.subTest(function=name):
                self.assertIn("search_path=pg_catalog, pg_temp", settings or [])

    def test_restored(self) -> None:
        """pg_restore --data-only works on a migrated database, and each restored row has an audit entry."""
        with blocking(self.url) as txn:
            tokens.add(txn, "mine", "admin")
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k1', %s, 'any')", _SECRET)
        self.execute("insert into s2s.engines (name, wanted, reason) values ('a', 'paused', 'night')")
        self.execute("insert into s2s.orders (order_id, rpc, params) values ('o', 'a.b', '{}')")
        self.execute("insert into s2s.broadcasts (message) values ('x')")
        dump, other = self.mktemp(), f"{self.id().rpartition('.')[2]}_{os.getpid()}"
        make_database(other, template())
        self.addCleanup(drop_database, other)
        # A migrated database already has rows in these tables.
        tables = ("migrations", "config", "config_version", "audit", "database")
        there = [f"--exclude-table=s2s.{table}" for table in tables]
        ((programs,),) = self.execute("select setting from pg_config where name = 'BINDIR'")
        _run(f"{programs}/pg_dump", "--format=custom", "--data-only", *there, f"--file={dump}", self.url)
        _run(f"{programs}/pg_restore", "--data-only", "--exit-on-error", f"--dbname={database_url(other)}", dump)
        with blocking(database_url(other)) as txn:
            txn.execute("select action, subject from s2s.audit")
            told = set(txn)
        self.assertEqual(told, {("tokens.add", "mine"), ("keys.add", "k1"), ("engine.wanted", "a"), ("a.b", "o")})

    def test_keys_by_command_line(self) -> None:
        """Each row that a rotation step changes has an entry of that step; a refused step leaves no entry."""
        add = ("keys", "add", "--role", "any", "--secret-file", self.file(_SECRET.encode()), "--key-id")
        self.s2s(*add, "k1", "--note", "the first")
        (actor, action, subject, params, result), default = self.new()
        self.assertEqual((actor, action, subject, result), ("cli:alice", "keys.add", "k1", None))
        self.assertEqual((params["role"], params["note"], params["is_default_tx"]), ("any", "the first", False))
        on, off = {"is_default_tx": True}, {"is_default_tx": False}
        self.assertEqual(default, ("cli:alice", "keys.add", "k1", on, {"was": off}))
        self.s2s(*add, "k1", expected=1)
        self.s2s("keys", "retire", "k1", expected=1)
        self.assertEqual(self.new(), [])
        self.s2s(*add, "k2")
        self.s2s("keys", "activate", "k2")
        self.s2s("keys", "activate", "k2")
        added, *activated = self.new()
        self.assertEqual(added[:3], ("cli:alice", "keys.add", "k2"))
        self.assertEqual(
            activated,
            [
                ("cli:alice", "keys.activate", "k1", off, {"was": on}),
                ("cli:alice", "keys.activate", "k2", on, {"was": off}),
            ],
        )
        ended = {"active_to", "closed_at"}
        for step in ("retire", "revoke"):
            self.s2s("keys", step, "k1")
            ((actor, action, subject, params, result),) = self.new()
            self.assertEqual((actor, action, subject, set(params)), ("cli:alice", f"keys.{step}", "k1", ended))
            self.assertEqual(set(result["was"]), ended)
        self.assert_no_secret()

    def test_keys_by_sql(self) -> None:
        """A change of a key row by SQL is audited under the session user, and a changed secret without its value."""
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k1', %s, 'any')", _SECRET)
        self.execute("update s2s.s2s_keys set key_b64 = %s", _OTHER_SECRET)
        self.execute("update s2s.s2s_keys set key_id = 'k2', note = 'mine'")
        self.execute("update s2s.s2s_keys set note = 'mine'")
        self.execute("delete from s2s.s2s_keys")
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k3', %s, 'any')", _SECRET)
        self.execute("truncate s2s.s2s_keys")
        added, *changed, deleted, _, truncated = self.new()
        self.assertEqual((added[:3], added[4]), ((self.user, "keys.add", "k1"), None))
        self.assertEqual(
            changed,
            [
                (self.user, "keys.change", "k1", {"key_b64": "changed"}, None),
                (
                    self.user,
                    "keys.change",
                    "k2",
                    {"key_id": "k2", "note": "mine"},
                    {"was": {"key_id": "k1", "note": ""}},
                ),
            ],
        )
        self.assertEqual(deleted[:4], (self.user, "keys.delete", "k2", {}))
        self.assertEqual(truncated[:4], (self.user, "keys.delete", "k3", {}))
        for key_id, told in (("k2", deleted), ("k3", truncated)):
            self.assertEqual((told[4]["was"]["key_id"], told[4]["was"]["role"]), (key_id, "any"))
        self.assert_no_secret()

    def assert_no_secret(self) -> None:
        """Assert that the audit holds no six consecutive characters of a secret."""
        ((told,),) = self.execute("select string_agg(audit::text, ' ') from s2s.audit")
        for secret in (_SECRET, _OTHER_SECRET):
            self.assertEqual([at for at in range(len(secret) - 5) if secret[at : at + 6] in told], [])

    def test_orders(self) -> None:
        """An order has one entry when it is placed and one when it ends, and none for the steps in between."""
        self.execute(
            "insert into s2s.orders (order_id, rpc, params, actor) values"
            " ('o1', 'admin.config.set.v1', '{\"key\": \"a\"}', 'cli:bob'), ('o2', 'a.b', '{}', default)"
        )
        self.assertEqual(
            self.new(),
            [("cli:bob", _CONFIG_SET, "o1", {"key": "a"}, None), (self.user, "a.b", "o2", {}, None)],
        )
        self.execute("update s2s.orders set status = 'running', attempts = 1, state = '{\"done\": 1}'")
        self.execute("update s2s.orders set state = '{\"done\": 2}'")
        self.assertEqual(self.new(), [])
        over = (
            "update s2s.orders set status = %s, result = '{\"n\": 1}', engine = 'e', way = 'link' where order_id = %s"
        )
        for status, order_id in (("done", "o1"), ("failed", "o2"), ("failed", "o2")):
            self.execute(over, status, order_id)
        result = {"result": {"n": 1}, "engine": "e", "way": "link"}
        self.assertEqual(
            self.new(),
            [
                ("cli:bob", _CONFIG_SET, "o1", {"key": "a"}, {**result, "status": "done"}),
                (self.user, "a.b", "o2", {}, {**result, "status": "failed"}),
            ],
        )

    def test_orders_by_sql(self) -> None:
        """Editing, reopening or removing an order by SQL is audited with the old values; an order's progress is not."""
        self.execute("insert into s2s.orders (order_id, rpc, params) values ('o1', 'a.b', '{}'), ('o2', 'a.b', '{}')")
        self.new()
        self.execute(
            "update s2s.orders set status = 'running', engine = 'e', attempts = 2, retry_at = now(), way = 'table'"
        )
        self.execute("update s2s.orders set state = '{\"done\": 1}', stepped_at = now(), started_at = now()")
        self.assertEqual(self.new(), [])
        self.execute("update s2s.orders set params = '{\"a\": 1}', actor = 'nobody' where order_id = 'o1'")
        was = {"params": {}, "actor": self.user}
        changed = (self.user, "orders.change", "o1", {"params": {"a": 1}, "actor": "nobody"}, {"was": was})
        self.assertEqual(self.new(), [changed])
        self.execute("update s2s.orders set status = 'done', result = '{}' where order_id = 'o2'")
        self.new()
        self.execute("update s2s.orders set status = 'queued' where order_id = 'o2'")
        again = (self.user, "orders.change", "o2", {"status": "queued"}, {"was": {"status": "done"}})
        self.assertEqual(self.new(), [again])
        self.execute("delete from s2s.orders where order_id = 'o1'")
        self.execute("truncate s2s.orders cascade")
        told = self.new()
        self.assertEqual([each[:4] for each in told], [(self.user, "orders.delete", each, {}) for each in ("o1", "o2")])
        for each in told:
            assert each[4] is not None
            self.assertEqual(each[4]["was"]["rpc"], "a.b")

    def test_a_history_by_sql(self) -> None:
        """Changing or removing a row of the settings history by SQL is audited with the old values."""
        for value in (1, 2, 3):
            self.execute("update s2s.config set value = to_jsonb(%s) where key = 'relay.window'", value)
        self.new()
        self.execute("update s2s.config_history set actor = 'nobody' where version = 1")
        self.execute("update s2s.config_history set actor = 'nobody' where version = 1")
        self.execute("delete from s2s.config_history where version = 2")
        self.execute("truncate s2s.config_history")
        changed, *deleted = self.new()
        self.assertEqual(
            changed,
            (
                self.user,
                "config_history.change",
                "relay.window",
                {"actor": "nobody"},
                {"was": {"actor": self.user}},
            ),
        )
        self.assertEqual([each[:4] for each in deleted], [(self.user, "config_history.delete", "relay.window", {})] * 3)
        self.assertEqual(sorted(each[4]["was"]["version"] for each in deleted if each[4]), [1, 2, 3])

    def test_engines_by_sql(self) -> None:
        """A change of an engine's desired state by SQL is audited under the session user; any other update is not."""
        self.execute("insert into s2s.engines (name, wanted, reason) values ('a', 'paused', 'night')")
        self.execute("update s2s.engines set changed_at = now()")
        self.execute("update s2s.engines set wanted = 'running', reason = 'day'")
        self.execute("delete from s2s.engines")
        paused, running, gone = (
            {"wanted": "paused", "reason": "night"},
            {"wanted": "running", "reason": "day"},
            {"wanted": "running", "reason": ""},
        )
        self.assertEqual(
            self.entries(), [(self.user, "engine.wanted", "a", params, None) for params in (paused, running, gone)]
        )

    def test_asked_of_engines(self) -> None:
        """A control request is audited when taken and when answered; a status check or a withdrawn request is not."""
        pause = ("s2s.engine.pause", {"reason": "x"}, "cli:alice", 5.0)
        with blocking(self.url) as txn:
            taken, withdrawn = control_requests.ask(txn, "a", *pause), control_requests.ask(txn, "b", *pause)
            control_requests.ask(txn, "a", CHECK, {}, "cli:alice", 5.0)
            self.assertFalse(control_requests.conclude(txn, [withdrawn])[withdrawn].is_taken)
        self.assertEqual(self.new(), [])
        asked = ("cli:alice", "s2s.engine.pause", "a", {"reason": "x"})
        with blocking(self.url) as txn:
            for each in control_requests.take(txn, "s1", [("a", "k1")]):
                control_requests.answer(
                    txn, each.request_id, False, {"code": "not_ready", "message": "no", "details": {}}
                )
            # No answer is stored yet, as when the server died after it took the request.
            silent = control_requests.ask(txn, "a", *pause)
            control_requests.take(txn, "s1", [("a", "k1")])
        self.assertEqual(
            self.new(),
            [
                (*asked, None),
                (*asked, {"ok": False, "code": "not_ready", "message": "no", "details": {}}),
                (*asked, None),
            ],
        )
        with blocking(self.url) as txn:
            control_requests.answer(txn, silent, None, {"message": "the link ended"})
        self.assertEqual(self.new(), [(*asked, {"ok": None, "message": "the link ended"})])
        self.assertNotEqual(taken, silent)


class DeadLettersTests(AuditTestCase, CliTestCase):
    """Operators' actions on commands and outbox rows."""

    def insert(self, status: str = "dead", count: int = 1, cmd_type: str = "test.run") -> int:
        """Store commands, and return the id of the first one."""
        return int(
            self.execute(
                "with made as (insert into s2s.commands (cmd_type, idem_key, payload, status) select %s,"
                " gen_random_uuid()::text, '{}', %s from generate_series(1, %s) returning cmd_id, idem_key)"
                " insert into s2s.idempotency_keys (cmd_id, idem_key, fingerprint)"
                " select *, decode(repeat('00', 32), 'hex') from made order by cmd_id returning cmd_id",
                cmd_type,
                status,
                count,
            )[0][0]
        )

    def told(self, action: str, params: dict[str, Any], **result: Any) -> Told:
        """Return the expected entry of an action."""
        return "cli:alice", action, "", params, result

    def test_by_ids(self) -> None:
        """An entry has the requested ids, the changed ids, and the reason for each id that was left."""
        dead, done, ready = self.insert(), self.insert("done"), self.insert("ready")
        ids = [ready, 99, dead, done]
        self.s2s("commands", "retry", *map(str, ids), str(dead), expected=1)
        left = {"missing": [99], "done": [done], "ready": [ready]}
        self.assertEqual(self.new(), [self.told("commands.retry", {"ids": ids}, done={"retried": [dead]}, left=left)])
        for verb, word in (("cancel", "cancelled"), ("discard", "discarded")):
            self.s2s("commands", verb, str(dead))
            told = self.told(f"commands.{verb}", {"ids": [dead]}, done={word: [dead]}, left={})
            self.assertEqual(self.new(), [told])

    def test_an_attempt(self) -> None:
        """An action that changes no row leaves an entry; a usage error before it leaves none."""
        self.s2s("commands", "discard", "99", expected=1)
        told = self.told("commands.discard", {"ids": [99]}, done={}, left={"missing": [99]})
        self.assertEqual(self.new(), [told])
        self.s2s("commands", "discard", expected=1)
        self.s2s("commands", "discard", "99", "--all-dead", expected=1)
        self.assertEqual(self.new(), [])

    def test_all_dead(self) -> None:
        """An action on all dead rows leaves one entry per transaction that changed rows, with those rows."""
        self.patch(actions, "STEP_ROWS", 2)
        first = self.insert(count=3)
        other = self.insert(cmd_type="test.other")
        self.s2s("commands", "retry", "--all-dead", "--type", "test.run")
        asked = {"all_dead": True, "type": "test.run"}
        self.assertEqual(
            self.new(),
            [
                self.told("commands.retry", asked, done={"retried": [first, first + 1]}),
                self.told("commands.retry", asked, done={"retried": [first + 2]}),
            ],
        )
        self.s2s("commands", "discard", "--all-dead")
        self.s2s("commands", "discard", "--all-dead")
        asked = {"all_dead": True, "type": None}
        self.assertEqual(self.new(), [self.told("commands.discard", asked, done={"discarded": [other]})])

    def test_outbox(self) -> None:
        """An outbox action leaves the same kind of entry, which marks a cancelled row that the relay had claimed."""
        with blocking(self.url) as txn:
            rows = [outbox.put(txn, "test.run", key, {}) for key in "abc"]
        with blocking(self.url) as txn:
            outbox.Claims().claim(txn, 1, 60.0)
        ((held,),) = self.execute("select outbox_id from s2s.outbox where send_at <> created_at")
        fresh, other = (row for row in rows if row != held)
        self.s2s("outbox", "cancel", str(held), str(fresh))
        self.s2s("outbox", "retry", str(fresh), str(other), expected=1)
        self.s2s("outbox", "discard", "--all-dead")
        self.assertEqual(
            self.new(),
            [
                self.told(
                    "outbox.cancel",
                    {"ids": [held, fresh]},
                    done={"cancelled_late": [held], "cancelled": [fresh]},
                    left={},
                ),
                self.told(
                    "outbox.retry", {"ids": [fresh, other]}, done={"retried": [fresh]}, left={"waiting": [other]}
                ),
                self.told("outbox.discard", {"all_dead": True, "type": None}, done={"discarded": [held]}),
            ],
        )


class ListTests(AuditTestCase, CliTestCase):
    """``s2s audit``."""

    def setUp(self) -> None:
        """Write some entries."""
        super().setUp()
        self.assertEqual(self.s2s("audit").output, "there is nothing in the audit\n")
        with blocking(self.url) as txn:
            audit.write(txn, "config.set", "relay.window", {"value": 7}, {"was": 512, "version": 1}, "cli:alice")
            audit.write(txn, "config.set", "link.window", {"value": 7}, None, "cli:bob")
            audit.write(txn, "keys.add", "k1", {"note": "\x1b[31m"}, None, "cli:alice")
            done = {"done": {"retried": list(range(12))}}
            audit.write(txn, "commands.retry", "", {"all_dead": True, "type": None}, done, "cli:alice")
            order = "01JD3YV7M2S4K8Q0X6W9ZC5B1T"
            params = {"update_field": "shields", "new_value": 100}
            audit.write(txn, "admin.player.update_all_ships.v1", order, params, None, "cli:alice")

    def test_filters(self) -> None:
        """Entries come newest first, limited in number, and filtered by actor, action or subject."""

        def listed(*argv: str) -> list[int]:
            return [entry["audit_id"] for entry in self.json("audit", *argv)]

        self.assertEqual(listed(), [5, 4, 3, 2, 1])
        self.assertEqual(listed("--limit", "2"), [5, 4])
        self.assertEqual(listed("--actor", "cli:bob"), [2])
        self.assertEqual(listed("--action", "config.set"), [2, 1])
        self.assertEqual(listed("--action", "config.set", "--actor", "cli:alice"), [1])
        self.assertEqual(listed("--subject", "k1"), [3])
        self.assertEqual(listed("--subject", "k"), [])
        self.assertEqual(listed("--before", "3"), [2, 1])

    def test_json(self) -> None:
        """The JSON output has every field of an entry."""
        *_, first = self.json("audit")
        self.assertRegex(first.pop("at"), r"^\d{4}-\d\d-\d\dT[\d:.]+\+00:00$")
        self.assertEqual(
            first,
            {
                "audit_id": 1,
                "actor": "cli:alice",
                "action": "config.set",
                "subject": "relay.window",
                "params": {"value": 7},
                "result": {"was": 512, "version": 1},
            },
        )

    def test_table(self) -> None:
        """The table fits into 100 columns, shortens long lists, and escapes control characters."""
        shown = self.s2s("audit", env={"COLUMNS": "100"}).output
        self.assertEqual([line for line in shown.splitlines() if len(line) > 100], [])
        self.assertNotIn("\x1b[31m", shown)
        told = [line.split(maxsplit=5)[5].strip() for line in shown.splitlines() if line[0].isdecimal()]
        self.assertEqual(
            told,
            [
                "01JD3YV7M2S4K8Q0X6W9ZC5B1T",
                "(all_dead true) -> done",
                "k1 (note \\x1b[31m)",
                "link.window (value 7)",
                "relay.window (value 7) ->",
            ],
        )
        self.assertIn("(retried 0 1 2 3 4 5 6 7 8 9 and 2", " ".join(shown.split()))


class _Slow:
    """A database whose writes end when the test fires their Deferreds."""

    def __init__(self) -> None:
        self.running: list[tuple[Deferred[None], Any]] = []
        self.noted: list[tuple[str, str]] = []
        self.troubles = SimpleNamespace(note=lambda state, text: self.noted.append((state, text)))

    def run(self, _: Any, entries: Any) -> Deferred[None]:
        """Record the entries to be written."""
        self.running.append((Deferred(), entries))
        return self.running[-1][0]


class AuditLogTests(SynchronousTestCase):
    """:class:`AuditLog`."""

    def setUp(self) -> None:
        """Make an audit log on a slow database."""
        self.database, self.counters = _Slow(), Counters()
        self.ledger = AuditLog(self.database, self.counters, "engine-1", ORDERS)  # type: ignore[arg-type]

    def refuse(self, error: WireError, type: str = _CONFIG_SET, **payload: Any) -> None:
        """Report a refused request to the audit log."""
        self.ledger.refused(Envelope("i", 0, "server", "engine", type, payload), "k1", error)

    def test_a_flood(self) -> None:
        """One write runs at a time, a bounded number of entries waits for the next one, and the others are counted."""
        for number in range(MAX_WAITING + 11):
            self.refuse(BadPayload("no"), order_id=f"o{number}")
        self.assertEqual(self.counters.met, {"audit": 10})
        ((writing, entries),) = self.database.running
        self.assertEqual([subject for _, subject, *_ in entries], ["o0"])
        quiet = self.ledger.wait_idle()
        writing.callback(None)
        writing, entries = self.database.running[1]
        self.assertEqual([subject for _, subject, *_ in entries], [f"o{n}" for n in range(1, MAX_WAITING + 1)])
        self.assertNoResult(quiet)
        writing.callback(None)
        self.successResultOf(quiet)
        self.refuse(BadPayload("no"))
        self.assertEqual(len(self.database.running), 3)

    def test_what_the_database_refuses(self) -> None:
        """Entries that the database refuses are counted, and each refusal is noted in the rate-limited log."""
        for _ in range(10):
            self.refuse(BadPayload("no"), order_id="o1")
            self.database.running[-1][0].errback(StatementRefused("not here", state="P0001"))
        self.assertEqual(self.counters.met, {"audit": 10})
        self.assertEqual(self.database.noted, [("P0001", "not here")] * 10)

    def test_what_is_told(self) -> None:
        """An order refused by its schema or its sender's role is audited; other requests and other errors are not."""
        for error, type in (
            (NotReady("later"), _CONFIG_SET),
            (BadPayload("no"), SHUTDOWN),
        ):
            self.refuse(error, type)
        self.assertEqual(self.database.running, [])
        for type in ORDERS:
            self.refuse(Forbidden("no"), type, order_id="o1")
        self.assertEqual(len(self.database.running), 1)
        ((_, entries),) = self.database.running
        result = {"status": "refused", "result": {"code": "forbidden", "message": "no"}}
        self.assertEqual(entries, [(ORDERS[0], "o1", {"order_id": "o1"}, result, "key:k1")])

    def test_a_long_payload(self) -> None:
        """A long payload is cut at a character boundary within KEPT_BYTES, and an invalid order id is not a subject."""
        for order_id in (7, None, "", "a b", "o" * 65, ["o1"]):
            self.refuse(BadPayload("no"), order_id=order_id, text="é" * 5000)
        self.database.running[0][0].callback(None)
        entries = [entry for _, entries in self.database.running for entry in entries]
        self.assertEqual({entry[1] for entry in entries}, {""})
        for _, _, params, *_ in entries:
            self.assertEqual(list(params), ["cut"])
            self.assertTrue(audit.KEPT_BYTES - 2 < len(params["cut"].encode()) <= audit.KEPT_BYTES)


class AwayTests(AuditTestCase):
    """The audit log while the database is away."""

    async def test_a_shutdown(self) -> None:
        """A shutdown request is answered immediately, and its missing entry is counted."""
        database, counters, condition = Database(self.url), Counters(), EngineState()
        ledger = AuditLog(database, counters, "engine-1", ORDERS)
        shutdown = Shutdown(lambda *_: 7.5, condition, ledger.answered)
        payload = {"grace_ms": 1, "reason": "x"}
        request = Request(
            Envelope("i", 1, "server", "engine", SHUTDOWN, payload), CATALOGUE[SHUTDOWN], payload, "k1", 9
        )
        answer = {"ok": True, "state": "draining", "deadline_ms": 7500}
        self.assertEqual(shutdown(request), answer)
        await ledger.wait_idle()
        self.assertEqual(counters.met, {"audit": 1})
        database.start()
        self.addCleanup(database.stop)
        shutdown(request)
        await ledger.wait_idle()
        self.assertEqual(self.entries(), [("key:k1", SHUTDOWN, "engine-1", payload, answer)])


class SteeringTests(AuditTestCase, RoleTestCase, CliTestCase):
    """A real engine, controlled by a real server or by a test peer."""

    @inlineCallbacks
    def test_by_command_line(self):
        """A control command is audited with its operator, the engine's answer, and the key that signed the request."""
        server = self.server()
        engine = self.engine(server.port)
        yield server.start()
        yield engine.start()

        def runs() -> bool:
            return [row["state"] for row in self.json("engine", "list")] == ["running"]

        yield poll(runs, "it runs")
        self.new()
        why, grace = ("--reason", "night"), {"grace_ms": 3000}
        for argv, params, result, stored in (
            (("pause", *why), {"reason": "night"}, {"ok": True, "state": "paused"}, "paused"),
            (("pause", *why), {"reason": "night"}, {"ok": True, "state": "paused"}, None),
            (("resume", *why), {"reason": "night"}, {"ok": True, "state": "running"}, "running"),
            (("sweep",), {"since_ts": 0}, {"ok": True, "since_ts": 0, "queued": 0}, None),
        ):
            self.s2s("engine", *argv)
            action = "s2s.broadcast.sweep" if argv == ("sweep",) else f"s2s.engine.{argv[0]}"
            asked = ("cli:alice", action, "engine-1", params)
            change = ("key:k1", "engine.wanted", "engine-1", {**params, "wanted": stored}, None)
            self.assertEqual(self.new(), [(*asked, None), *([change] if stored else []), (*asked, result)])
        self.s2s("engine", "shutdown", "engine-1", *why, "--grace-ms", "3000")
        yield poll(lambda: not engine.is_running, "it has ended")
        engine.assert_ended_well()
        asked, *ended = self.new()
        params = {"reason": "night", **grace}
        self.assertEqual(asked, ("cli:alice", SHUTDOWN, "engine-1", params, None))
        # Two processes write these two entries, in either order.
        self.assertEqual({told[0] for told in ended}, {"cli:alice", "key:k1"})
        for _, action, subject, told, result in ended:
            self.assertEqual((action, subject, told), (SHUTDOWN, "engine-1", params))
            self.assertEqual((result["ok"], result["state"]), (True, "draining"))

    @inlineCallbacks
    def linked(self, key: Key | None = None) -> Iterator[Deferred[Any]]:
        """Act as the server of a running engine."""
        listening = ListeningPeer()
        self.addCleanup(listening.close)
        self.role = self.engine(listening.port)
        yield self.role.start()
        peer = listening.accept(**({"key": key} if key else {}))
        self.addCleanup(peer.close)
        peer.greet()
        yield poll(lambda: peer.call(CHECK, {})["state"] == "running", "it runs")
        self.new()
        self.peer: Peer = peer

    @inlineCallbacks
    def test_by_any_server(self):
        """A foreign server is audited by the key that it signs with, and a repeated pause leaves no second entry."""
        self.add_key(other := Key("k2", _SECRET))
        self.new()
        yield self.linked(other)
        why = {"reason": "a test"}
        for type in ("s2s.engine.pause", "s2s.engine.pause", "s2s.engine.resume"):
            self.peer.call(type, why)
        # The grace is 0 ms, and the entry must still be written.
        ack = self.peer.call(SHUTDOWN, {**why, "grace_ms": 0})
        self.peer.rest()
        yield poll(lambda: not self.role.is_running, "it has ended")
        self.role.assert_ended_well()
        self.assertEqual(
            self.new(),
            [
                ("key:k2", "engine.wanted", "engine-1", {**why, "wanted": "paused"}, None),
                ("key:k2", "engine.wanted", "engine-1", {**why, "wanted": "running"}, None),
                ("key:k2", SHUTDOWN, "engine-1", {**why, "grace_ms": 0}, ack),
            ],
        )

    @inlineCallbacks
    def test_orders_refused_at_the_door(self):
        """An order with a bad payload or a forbidden sender leaves an audit entry with the error code, but no row."""
        yield self.linked()
        for payload in (
            {"order_id": "o1", "key": "relay.window", "value": None},
            {"order_id": "no id", "key": "relay.window", "value": 7},
            {"order_id": "o2", "key": "x" * 3000, "value": 7},
        ):
            self.assertEqual(self.peer.call(_CONFIG_SET, payload)["code"], "bad_payload")
        self.assertEqual(self.peer.call("s2s.engine.pause", {})["code"], "bad_payload")
        reflected = {"order_id": "o3", "key": "relay.window", "value": 7}
        self.peer.send(_CONFIG_SET, reflected, src="engine", dst="server")
        self.assertEqual(self.peer.refusal()["payload"]["code"], "forbidden")
        yield poll(lambda: len(self.entries(action=_CONFIG_SET)) == 4, "the entries are there")
        told = self.new()
        self.assertEqual({each[:2] for each in told}, {("key:k1", _CONFIG_SET)})
        self.assertEqual([each[2] for each in told], ["o1", "", "o2", "o3"])
        self.assertEqual([each[4]["result"]["code"] for each in told], ["bad_payload"] * 3 + ["forbidden"])
        self.assertIn("at /payload/value", told[0][4]["result"]["message"])
        self.assertEqual(told[0][3], {"order_id": "o1", "key": "relay.window", "value": None})
        self.assertEqual((list(told[2][3]), len(told[2][3]["cut"])), (["cut"], audit.KEPT_BYTES))
        self.assertEqual(told[3][3], reflected)
        self.assertEqual((self.count("orders"), self.count("config_history")), (0, 0))
