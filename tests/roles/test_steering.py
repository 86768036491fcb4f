"""Control requests from a shell, the whole way: command line, database, server, link, engine, and back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from click.testing import CliRunner
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.cli import main
from s2s.errors import StatementRefused
from s2s.store.pool import blocking
from s2s.store.tables import control_requests, engines
from s2s.store.tables.claims import presence_key
from s2s.store.tables.engines import LinkRow
from tests.cli.test_cli import CliTestCase
from tests.support.peer import CHECK, K1, SWEEP, Key, Peer
from tests.support.roles import Engine, RoleTestCase, Server
from tests.support.waiting import poll


class SteeringTests(RoleTestCase, CliTestCase):
    """A server and an engine as real processes."""

    @inlineCallbacks
    def linked(self) -> Iterator[Deferred[Any]]:
        """Start both, and wait until the list of engines shows the engine as running."""
        self.server_role: Server = self.server()
        self.engine_role: Engine = self.engine(self.server_role.port)
        yield self.server_role.start()
        yield self.engine_role.start()
        yield self.seen(state="running")

    def seen(self, **wanted: Any) -> Deferred[Any]:
        """Wait until the list of engines shows exactly one engine with these members."""

        def look() -> bool:
            found = self.json("engine", "list")
            return len(found) == 1 and all(found[0][name] == value for name, value in wanted.items())

        return poll(look, f"an engine {wanted}")

    @inlineCallbacks
    def test_pause_resume_sweep_shutdown(self):
        """Each command shows the engine's answer; after the shutdown the engine has ended with exit code 0."""
        yield self.linked()
        self.assertEqual(self.s2s("engine", "pause", "engine-1", "--reason", "night").output, "engine-1: paused\n")
        yield self.seen(state="paused", wanted="paused", reason="night", degraded=False)
        # With one engine, the name may be omitted.
        self.assertEqual(self.json("engine", "resume"), {"engine": "engine-1", "ok": True, "state": "running"})
        self.execute("insert into s2s.broadcasts (message) values ('hello')")
        yield poll(lambda: self.count("notices") == 1, "the notice is there")
        self.assertEqual(self.s2s("engine", "sweep").output, "engine-1: 0 broadcasts queued\n")
        said = self.s2s("engine", "shutdown", "--grace-ms", "3000").output
        self.assertRegex(said, r"^engine-1: draining, its grace ends at \d\d:\d\d:\d\d UTC\n$")
        yield poll(lambda: not self.engine_role.is_running, "the engine has ended")
        self.engine_role.assert_ended_well()
        yield self.seen_none()
        told = self.server_role.lines("s2s.engine.pause to 'engine-1' (key k1) by 'cli:")
        self.assertEqual(len(told), 1)

    def seen_none(self) -> Deferred[Any]:
        """Wait until no engine is linked."""
        return poll(lambda: [row["state"] for row in self.json("engine", "list")] == ["no link"], "no link is left")

    @inlineCallbacks
    def test_without_a_link(self):
        """A request that no server can send is refused with the cure, and is never sent later."""
        self.assertIn("no engine is linked", self.s2s("engine", "pause", expected=1).output)
        refused = self.s2s("engine", "pause", "engine-1", expected=1).output
        self.assertEqual(refused, "Error: no server has a link to an engine 'engine-1': see s2s engine list\n")
        self.assertEqual(self.count("steering"), 0)
        # This server shows its link and takes no requests, as while another session has locked the audit.
        self.execute(
            "insert into s2s.engine_links (server_boot_id, key_id, name, address) values ('s', 'k', 'there', 'x')"
        )
        refused = self.s2s("engine", "pause", "there", expected=1).output
        self.assertIn("no server took the request to an engine 'there' in time: its link has ended, or the", refused)
        self.assertEqual(self.count("steering"), 0)
        self.execute("delete from s2s.engine_links")
        yield self.linked()
        self.assertEqual(self.count("engines"), 0)

    @inlineCallbacks
    def test_configuration(self):
        """A setting set in a shell is in force in both roles, which log it; the engine's health has its version."""
        yield self.linked()
        self.assertEqual(
            self.s2s("config", "set", "server.sweep_interval_s", "3").output,
            "server.sweep_interval_s is 3, version 1\n",
        )
        self.assertEqual(self.json("config", "set", "relay.window", "7")["version"], 2)
        yield self.seen(config_version=2)
        for role in (self.server_role, self.engine_role):
            yield role.says("relay.window is 7 (was 512)")
        self.assertEqual(self.s2s("config", "set", "relay.window", "7").output, "relay.window is 7 already\n")
        for argv, why in (
            (("relay.window", "0"), "relay.window must be from 1 to 1024"),
            (("relay.window", "many"), "relay.window is a whole number, not 'many'"),
            (("no.such", "1"), "there is no setting 'no.such': see them with: s2s config list"),
        ):
            self.assertEqual(self.s2s("config", "set", *argv, expected=1).output, f"Error: {why}\n")
        history = self.json("config", "history", "--key", "relay.window")
        self.assertEqual([(row["version"], row["old_value"], row["new_value"]) for row in history], [(2, 512, 7)])
        self.assertRegex(history[0]["actor"], r"^cli:.+")
        values = {row["key"]: row["value"] for row in self.json("config", "list")}
        self.assertEqual((values["relay.window"], values["server.sweep_interval_s"]), (7, 3))

    @inlineCallbacks
    def test_an_engine_that_is_behind(self):
        """An engine that was away when the configuration changed is bumped as soon as its link is proven."""
        yield self.linked()
        self.engine_role.stop()
        self.s2s("config", "set", "relay.window", "7")
        # A real engine reads the newest version at its start, so a test peer plays one that does not.
        peer = self.peer(config_version=0)
        self.assertEqual(peer.request("s2s.config.bump")["payload"], {"version": 1})
        self.assertEqual([], [each for each in self.peers(config_version=1) if each == "s2s.config.bump"])

    def peer(self, key: Key = K1, **health: Any) -> Peer:
        """Link a test peer as an engine."""
        peer = self.server_role.connect(name="engine-9", key=key)
        self.addCleanup(peer.close)
        said = peer.serves[CHECK]
        peer.serves[CHECK] = lambda payload: {**said(payload), **health}
        peer.serves["s2s.config.bump"] = lambda payload: {"ok": True, **payload}
        peer.greet()
        return peer

    def peers(self, **health: Any) -> list[str]:
        """Link a test peer as an engine, and return the requests that it receives up to the first sweep."""
        peer = self.peer(**health)
        asked: list[str] = []
        peer.until(lambda frame: asked.append(frame["type"]) or frame["type"] == "s2s.broadcast.sweep")
        return asked

    @inlineCallbacks
    def test_an_engine_that_refuses(self):
        """A refusal is shown with its code, a missing answer as an unknown outcome; both end with exit code 1."""
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(config_version=0)
        refusing = self.in_thread("engine", "pause", "engine-9")
        peer.refuse(peer.request("s2s.engine.pause"), "db_unavailable", retryable=True)
        result = yield refusing
        self.assertEqual(result, (1, "Error: engine-9 refused, db_unavailable: db_unavailable\n"))
        lost = self.in_thread("engine", "pause", "engine-9")
        peer.request("s2s.engine.pause")
        peer.close()
        code, output = yield lost
        self.assertEqual(code, 1)
        self.assertIn("engine-9 did not answer, the outcome is unknown: the link ended", output)

    @inlineCallbacks
    def test_an_answer_that_is_not_valid(self):
        """An answer that breaks its schema is an unknown outcome; the operator and the log get the path."""
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(config_version=0)
        asking = self.in_thread("engine", "pause", "engine-9")
        peer.reply(peer.request("s2s.engine.pause"), "s2s.ack", {"ok": True, "state": 7})
        code, output = yield asking
        self.assertEqual(code, 1)
        why = "s2s.engine.pause was answered by s2s.ack with a bad payload: at /payload/state: must satisfy type"
        told = f"engine-9 gave an answer that is not valid, the outcome is unknown: {why}"
        self.assertIn(told, " ".join(output.split()))
        self.assertEqual(len(self.server_role.lines(f"its answer is not valid: {why}")), 1)
        self.assertEqual(len(self.server_role.lines("s2s.engine.pause to 'engine-9' (key k1) by ")), 1)
        peer.serves[CHECK] = lambda _: {"role": "engine"}
        listing = self.in_thread("engine", "list", "--json")
        peer.until(lambda frame: frame["type"] == CHECK)
        code, output = yield listing
        self.assertIn('"invalid answer"', output)
        self.assertEqual(len(self.server_role.lines("s2s.health.check was answered by s2s.health.ack with a bad")), 1)

    @inlineCallbacks
    def test_many_written_by_hand(self):
        """A bounded number of requests is taken at once; one that no frame holds is answered without being read.

        The texts of a row are logged shortened and without control characters of terminals.
        """
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(config_version=0)
        peer.serves["s2s.engine.pause"] = lambda _: {"ok": True, "state": "paused"}
        many = control_requests.MOST + 20
        self.execute(
            "insert into s2s.steering (engine, type, payload, actor, expires_at)"
            " select 'engine-9', 's2s.engine.pause', '{\"reason\": \"x\"}', 'hand', now() + interval '50 seconds'"
            " from generate_series(1, %s);"
            "insert into s2s.steering (engine, type, payload, actor, expires_at)"
            " select 'engine-9', 's2s.engine.pause', jsonb_build_object('reason', repeat('x', 1000000)),"
            " E'\x1b]0;' || repeat('y', 10000), now() + interval '50 seconds'",
            many,
        )
        for _ in range(many):
            peer.request("s2s.engine.pause")
        query = (
            "select count(*) filter (where is_ok),"
            " count(*) filter (where answer ->> 'message' like '%longer than a frame%') from s2s.steering"
        )
        yield poll(lambda: self.execute(query) == [(many, 1)], "all are answered")
        self.assertNotIn("\x1b", self.server_role.log)
        self.assertLess(max(map(len, self.server_role.lines("s2s.engine.pause to"))), 1000)

    @inlineCallbacks
    def test_a_server_that_dies_with_it(self):
        """The command does not wait for a server that took a request and died; it reports an unknown outcome."""
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(config_version=0)
        asking = self.in_thread("engine", "pause", "engine-9")
        peer.request("s2s.engine.pause")
        began = time.monotonic()
        self.server_role.kill()
        code, output = yield asking
        self.assertEqual(code, 1)
        self.assertIn("the outcome is unknown: the server that took the request did not report", output)
        self.assertLess(time.monotonic() - began, control_requests.GONE_S + 5)

    @inlineCallbacks
    def test_the_newer_of_two_links(self):
        """Of two links of one process, as after a rotation with the older one half open, the newer one is used."""
        self.add_key(other := Key("k2", K1.key_b64))
        self.server_role = self.server()
        yield self.server_role.start()
        old = self.peer(config_version=0, boot_id="b1")
        new = self.peer(key=other, config_version=0, boot_id="b1")
        asking = self.in_thread("engine", "pause", "engine-9")
        new.reply(new.request("s2s.engine.pause"), "s2s.ack", {"ok": True, "state": "paused"})
        result = yield asking
        self.assertEqual(result, (0, "engine-9: paused\n"))
        self.assertEqual(self.server_role.lines("each request to this name"), [])
        old.close()

    @inlineCallbacks
    def test_one_name_under_two_keys(self):
        """A request to a name reaches each engine of it, the list shows the health of each, and a line names the cure.

        The answer names the keys, and an engine that has not done it.
        """
        self.add_key(other := Key("k2", K1.key_b64))
        self.server_role = self.server()
        yield self.server_role.start()
        twins = [
            self.peer(key=key, config_version=0, boot_id=f"boot-{key.key_id}", outbox_depth=depth)
            for depth, key in enumerate((K1, other))
        ]
        # The check that a new link begins with comes before its first sweep. The next check is that of the listing.
        for twin in twins:
            twin.request(SWEEP)
        text = "each request to this name, such as pause or shutdown, goes to both"
        yield self.server_role.says(text)
        [told] = self.server_role.lines(text)
        self.assertIn("has the key k2 and the name of an engine that is up with the key k1", told)
        yield poll(lambda: self.count("engine_links") == 2, "both are shown as linked")
        listing = self.in_thread("engine", "list", "--json")
        for twin in twins:
            twin.until(lambda frame: frame["type"] == CHECK)
        code, output = yield listing
        rows = [(row["name"], row["key_id"], row["outbox_depth"]) for row in json.loads(output)]
        self.assertEqual((code, rows), (0, [("engine-9", "k1", 0), ("engine-9", "k2", 1)]))
        # The server sends sweeps of its own, with since_ts 0.
        asking = self.in_thread("engine", "sweep", "engine-9", "--since", "7")
        for queued, twin in enumerate(twins, 2):

            def swept(payload: dict[str, Any], queued: int = queued) -> dict[str, Any]:
                return {"ok": True, "since_ts": payload["since_ts"], "queued": queued * (payload["since_ts"] == 7)}

            twin.serves[SWEEP] = swept
            twin.until(lambda frame: frame["type"] == SWEEP and frame["payload"]["since_ts"] == 7)
        result = yield asking
        both = " (2 engines have this name, under the keys k1, k2)"
        self.assertEqual(result, (0, f"engine-9: 5 broadcasts queued{both}\n"))
        asking = self.in_thread("engine", "pause", "engine-9")
        twins[0].reply(twins[0].request("s2s.engine.pause"), "s2s.ack", {"ok": True, "state": "paused"})
        twins[1].refuse(twins[1].request("s2s.engine.pause"), "db_unavailable", retryable=True)
        code, output = yield asking
        self.assertEqual(code, 1)
        self.assertIn(
            "the name engine-9 stands for 2 engines, and not all have done it: key k1: done; key k2: db_unavailable:",
            " ".join(output.split()),
        )

    def in_thread(self, *argv: str) -> Deferred[Any]:
        """Run a command line in a thread."""

        def run() -> tuple[int, str]:
            result = CliRunner(env={"S2S_DATABASE_URL": self.url}).invoke(main, list(argv))
            return result.exit_code, result.output

        return deferToThread(run)


class TableTests(RoleTestCase):
    """:mod:`s2s.store.tables.control_requests` and :mod:`s2s.store.tables.engines`."""

    def test_taken_once(self) -> None:
        """A request is taken by one server, the one with the engine's link; an expired request is taken by none."""
        with blocking(self.url) as txn:
            mine = control_requests.ask(txn, "a", "s2s.engine.pause", {"reason": "x"}, "me", 5)
            control_requests.ask(txn, "a", "s2s.engine.resume", {"reason": "x"}, "me", -1)
            control_requests.ask(txn, "b", "s2s.engine.pause", {"reason": "x"}, "me", 5)
        with blocking(self.url) as txn:
            self.assertEqual(
                [each.request_id for each in control_requests.take(txn, "s1", [("a", "k1"), ("c", "k1")])], [mine]
            )
            self.assertEqual(control_requests.take(txn, "s2", [("a", "k1")]), [])
            # The request of b still waits. The expired one is never taken, and the id 0 does not exist.
            self.assertEqual(control_requests.settled(txn, [mine, mine + 1, mine + 2, 0]), {mine + 1, 0})
            found = control_requests.conclude(txn, [mine, mine + 1])
            self.assertEqual(
                [(each.is_taken, each.is_over) for each in found.values()], [(True, False), (False, False)]
            )
            control_requests.answer(txn, mine, False, {"code": "paused"})
            self.assertEqual(control_requests.settled(txn, [mine]), {mine})
            answer = control_requests.conclude(txn, [mine])[mine]
        self.assertEqual(
            (answer.is_taken, answer.is_over, answer.is_ok, answer.answer), (True, True, False, {"code": "paused"})
        )

    def test_bounded_takes(self) -> None:
        """One query takes a bounded number of requests."""
        with blocking(self.url) as txn:
            asked = [control_requests.ask(txn, "a", "s2s.engine.pause", {"reason": "x"}, "me", 60) for _ in range(3)]
        with blocking(self.url) as txn:
            taken = [each.request_id for each in control_requests.take(txn, "s1", [("a", "k1")], 2)]
            self.assertEqual(taken, asked[:2])
            self.assertEqual(
                [each.request_id for each in control_requests.take(txn, "s1", [("a", "k1")], 2)], asked[2:]
            )

    def test_a_trigger_that_returns_the_old_row(self) -> None:
        """A request that a trigger keeps from being taken is not sent; a wanted state that it keeps out is an error."""
        with blocking(self.url) as txn:
            control_requests.ask(txn, "a", "s2s.engine.pause", {"reason": "x"}, "me", 60)
            engines.want(txn, "a", "running", "", "me")
        self.execute(
            "create function old() returns trigger language plpgsql as $$ begin return old; end $$;"
            "create trigger old before update on s2s.steering for each row execute function old();"
            "create trigger old before update on s2s.engines for each row execute function old()"
        )
        with self.assertRaisesRegex(StatementRefused, "trigger old on s2s.steering"), blocking(self.url) as txn:
            self.assertEqual(control_requests.take(txn, "s1", [("a", "k1")]), [])
        with self.assertRaisesRegex(StatementRefused, "trigger old on s2s.engines"), blocking(self.url) as txn:
            engines.want(txn, "a", "paused", "", "me")

    def test_the_desired_state_of_a_stranger(self) -> None:
        """The desired state of a linked engine is unknown unless the engine shares this database, by its lock."""
        with blocking(self.url) as txn:
            links = [LinkRow("k1", name, f"boot-{name}", "here:1") for name in ("ours", "stranger")]
            engines.show_links(txn, "s1", links)
            for name in ("ours", "stranger", "away"):
                engines.want(txn, name, "paused", "night", "key:k1")
        self.execute("select pg_advisory_lock(%s)", presence_key("boot-ours"))
        with blocking(self.url) as txn:
            found = {row.name: (row.wanted, row.reason) for row in engines.list_engines(txn)}
        self.assertEqual(found, {"ours": ("paused", "night"), "stranger": (None, ""), "away": ("paused", "night")})

    def test_links_shown(self) -> None:
        """A server's links are those that it wrote last; a dead server's links are removed; wanted engines stay."""
        first, second = LinkRow("k1", "a", "b1", "here:1"), LinkRow("k1", "b", None, "here:2")
        with blocking(self.url) as txn:
            engines.show_links(txn, "s1", [first, second])
            engines.show_links(txn, "s2", [LinkRow("k1", "c", "b3", "there:3")])
            engines.want(txn, "d", "paused", "night", "key:k1")
            engines.want(txn, "d", "paused", "again", "key:k1")
        with blocking(self.url) as txn:
            found = {row.name: (row.wanted, row.reason, row.address) for row in engines.list_engines(txn)}
            self.assertEqual(
                found,
                {
                    "a": (None, "", "here:1"),
                    "b": (None, "", "here:2"),
                    "c": (None, "", "there:3"),
                    "d": ("paused", "night", None),
                },
            )
            before = {row.name: row.linked_at for row in engines.list_engines(txn)}
        with blocking(self.url) as txn:
            engines.show_links(txn, "s1", [first, LinkRow("k1", "b", None, "here:9")])
            after = {row.name: row.linked_at for row in engines.list_engines(txn)}
            self.assertEqual((before["a"] == after["a"], before["b"] == after["b"]), (True, False))
            engines.show_links(txn, "s1", [])
        self.execute("update s2s.engine_links set seen_at = now() - interval '1 minute'")
        with blocking(self.url) as txn:
            self.assertEqual([row.name for row in engines.list_engines(txn)], ["d"])
            engines.show_links(txn, "s1", [])
        self.assertEqual(self.count("engine_links"), 0)
