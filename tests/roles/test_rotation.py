"""Keys that change while links are up: a rotation loses nothing, and a revoked key loses its links."""

from __future__ import annotations

import base64
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twisted.internet import reactor, task, utils
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import clientFromString
from twisted.python.failure import Failure

from s2s.link.connection import Link
from s2s.link.dispatcher import Dispatcher
from s2s.link.factory import LinkFactory
from s2s.protocol.catalogue import COMMAND_PUSH, HEALTH_CHECK
from s2s.roles.live_keys import LiveKeys
from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.runtime.clock import Clock
from s2s.store.listen import Listener
from s2s.store.pool import Database, blocking
from s2s.store.tables import keys, rotation
from tests.support.peer import CHECK, K1, PUSH, Key, Peer, command, notice
from tests.support.roles import RoleTestCase, Server, SharedServerTestCase, environment
from tests.support.waiting import poll

S2S = str(Path(sys.executable).with_name("s2s"))
#: Pushes a second, the largest number in flight, and the least number of pushes.
RATE, WINDOW, LEAST = 5000, 300, 30_000
#: Seconds between two bursts.
BEAT_S = 0.01
_SECRET = base64.b64encode(b"the second secret, of 32 bytes or more").decode()
_numbers = itertools.count(1)
#: Seconds within which a link ends after its key was revoked: by a NOTIFY, and by the poll alone.
NOTIFIED_S, POLLED_S = 1.0, 6.5


class Pusher:
    """An engine made of parts of s2s, which pushes at an even pace. It receives the events of its link.

    :param url: the database with the keys.
    :ivar signed_by: the keys of the answers, without repetitions in a row.
    """

    def __init__(self, url: str) -> None:
        clock = Clock(reactor)
        self._database = Database(url, "s2s-test pusher", threads=1)
        with blocking(url) as txn:
            table = keys.read(txn)
        self.keys = LiveKeys(self._database, clock, table.by_clock(clock.now()))
        self._listener = Listener(url, {keys.CHANNEL: self.keys.notify})
        responders = {HEALTH_CHECK: lambda _: {"role": "engine", "version": "9", "uptime_s": 1, "name": "pusher"}}
        self.factory = LinkFactory("engine", Dispatcher(self.keys, responders, clock), self.keys, clock, self)
        self.keys.watchers.append(lambda keyring: self.factory.drop_revoked(self.links, keyring))
        self.links: list[Link] = []
        self.proven: Deferred[None] = Deferred()
        self.lost: list[str] = []
        self.failed: list[Failure] = []
        self.signed_by: list[str | None] = []
        self.sent = self.answered = 0
        self._began = 0.0
        self._beat = task.LoopingCall(self._push)

    def start(self, port: int) -> Deferred[Any]:
        """Connect; fires when the link is proven, and then pushes begin."""
        self._database.start()
        self.keys.start()
        self._listener.start()
        endpoint = clientFromString(reactor, f"tcp:host=127.0.0.1:port={port}")
        return endpoint.connect(self.factory).addCallback(lambda _: self.proven)

    @inlineCallbacks
    def finish(self) -> Iterator[Deferred[Any]]:
        """Stop pushing, and wait for the last answers."""
        self._beat.stop()
        yield poll(lambda: self.answered == self.sent, "every push is answered")

    @inlineCallbacks
    def forget_the_table(self) -> Iterator[Deferred[Any]]:
        """Stop reading the keys."""
        self.keys.stop()
        yield self._listener.stop()
        yield self._database.stop()

    def link_made(self, link: Link) -> None:
        """Remember the link."""
        self.links.append(link)

    def link_proven(self, link: Link) -> None:
        """Start pushing."""
        self._began = reactor.seconds()
        self._beat.start(BEAT_S)
        self.proven.callback(None)

    def link_lost(self, link: Link) -> None:
        """Remember the reason."""
        self.lost.append(link.close_reason.text)

    def _push(self) -> None:
        due = (reactor.seconds() - self._began) * RATE
        while self.sent < due and self.sent - self.answered < WINDOW:
            self.sent += 1
            push = self.links[0].call(COMMAND_PUSH, command(f"push {self.sent}", notice("a push")), timeout=10)
            push.addCallbacks(self._accepted, self.failed.append).addErrback(self.failed.append)

    def _accepted(self, ack: dict[str, Any]) -> None:
        assert ack["accepted"] and not ack["duplicate"], ack
        self.answered += 1
        signed_by = self.links[0].session.peer_key_id
        if self.signed_by[-1:] != [signed_by]:
            self.signed_by.append(signed_by)


class RotationTests(RoleTestCase):
    """``s2s keys`` in a shell, while an engine pushes."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Start a server that only accepts, and a pusher."""
        super().setUp()
        self.role: Server = self.server("--executor-workers", "0")
        yield self.role.start()
        self.pusher = Pusher(self.url)
        self.addCleanup(self.pusher.factory.tell_rest)
        # Registered for every outcome of the test; a second call does nothing.
        self.addCleanup(self.pusher.forget_the_table)
        self.addCleanup(lambda: [link.abort("the test is over") for link in self.pusher.links])
        yield self.pusher.start(self.role.port)

    @inlineCallbacks
    def s2s(self, *argv: str) -> Iterator[Deferred[Any]]:
        """Run ``s2s keys`` with arguments, and return its output."""
        out, err, code = yield utils.getProcessOutputAndValue(
            S2S, ["keys", *argv], env=environment(**{DATABASE_VARIABLE: self.url})
        )
        self.assertEqual(code, 0, err)
        return (out + err).decode()

    def more_pushed(self, count: int) -> Deferred[Any]:
        """Wait until this many more commands are pushed."""
        wanted = self.pusher.sent + count
        return poll(lambda: self.pusher.failed or self.pusher.sent >= wanted, f"{count} more are pushed")

    @inlineCallbacks
    def rotate(self, old: str, new: str) -> Iterator[Deferred[Any]]:
        """Change from one key to another, and wait until the old one has expired."""
        yield self.more_pushed(1000)
        yield self.s2s("add", "--key-id", new, "--role", "any")
        yield self.s2s("activate", new)
        yield self.s2s("retire", old)
        yield self.more_pushed(1000)
        # Shorten the 60 s of the overlap.
        self.execute("update s2s.s2s_keys set active_to = now() + interval '1 s' where key_id = %s", old)
        yield poll(
            lambda: self.execute("select 1 from s2s.s2s_keys where active_to < now() and key_id = %s", old), "its end"
        )
        yield self.more_pushed(1000)

    @inlineCallbacks
    def test_under_load(self):
        """Two rotations under 5,000 pushes a second lose and refuse nothing, and keep the one link."""
        pusher = self.pusher
        yield self.rotate("k1", "k2")
        yield self.rotate("k2", "k3")
        yield poll(lambda: pusher.failed or pusher.sent >= LEAST, f"{LEAST} are pushed")
        yield pusher.finish()
        self.assertEqual((pusher.failed, pusher.lost, len(pusher.links)), ([], [], 1))
        self.assertGreaterEqual(pusher.sent, LEAST)
        self.assertEqual(self.role.lines(": refused, "), [])
        found = self.execute("select count(*), count(distinct idem_key) from s2s.commands")
        self.assertEqual(found, [(pusher.sent, pusher.sent)])
        # The server never returned to an older key, and the pusher's last frames had the newest key too.
        self.assertEqual(pusher.signed_by, ["k1", "k2", "k3"])
        yield pusher.forget_the_table()
        said = yield self.s2s("revoke", "k3")
        self.assertIn("warning: no key can sign for engine and server any more", said)
        yield self.role.says("the key k3 is no longer valid")
        yield poll(lambda: pusher.lost, "the link ends")


class RevocationTests(SharedServerTestCase):
    """Links of a revoked key."""

    def new_key(self) -> Key:
        """Add a key whose name the server has never seen, since it does not look up a key that it knows as expired."""
        key = Key(f"revoked-{next(_numbers)}", _SECRET)
        self.add_key(key)
        return key

    def linked(self, key: Key) -> Peer:
        """Make a proven link that signs with a key."""
        peer = self.shared.connect(key=key)
        self.addCleanup(peer.close)
        peer.greet()
        return peer

    def ends(
        self, key: Key, peers: list[Peer], change: Callable[[str], object], within_s: float = NOTIFIED_S
    ) -> Deferred[Any]:
        """Assert that links end within a time after their key is changed, and that the server logs the reason."""
        began = time.monotonic()
        change(key.key_id)
        for peer in peers:
            peer.rest()
        self.assertLess(time.monotonic() - began, within_s)
        told = "not known here" if change == self.delete else "no longer valid"
        return self.shared.says(f"the key {key.key_id} is {told}", len(peers))

    def revoke(self, key_id: str) -> None:
        """Revoke a key as ``s2s keys revoke`` does."""
        with blocking(self.url) as txn:
            rotation.revoke(txn, key_id)

    def end(self, key_id: str) -> None:
        """Let a key expire now, in plain SQL."""
        self.execute("update s2s.s2s_keys set active_to = now() where key_id = %s", key_id)

    def delete(self, key_id: str) -> None:
        """Delete a key, in plain SQL."""
        self.execute("delete from s2s.s2s_keys where key_id = %s", key_id)

    @inlineCallbacks
    def test_revoked(self):
        """All links of a revoked, expired or deleted key close within a second, and those of other keys stay."""
        other = self.linked(K1)
        for change in (self.revoke, self.end, self.delete):
            key = self.new_key()
            yield self.ends(key, [self.linked(key), self.linked(key)], change)
            late = self.shared.connect(key=key)
            self.addCleanup(late.close)
            late.write(late.frame(PUSH, command("stolen")))
            self.assertEqual(late.refusal()["payload"]["code"], "auth_bad")
        self.assertEqual(other.call(CHECK, {})["role"], "server")
        self.assertEqual(self.count("commands"), 0)

    @inlineCallbacks
    def test_the_last_key_counts(self):
        """A peer that signs with another key now keeps its link; one that returned to the revoked key does not."""
        key = self.new_key()
        forth, back = self.linked(key), self.linked(K1)
        forth.key, back.key = K1, key
        for peer in (forth, back):
            peer.call(CHECK, {})
        yield self.ends(key, [back], self.revoke)
        self.assertEqual(forth.call(CHECK, {})["role"], "server")

    @inlineCallbacks
    def test_deaf(self):
        """A NOTIFY that is lost with the LISTEN connection does not keep a revoked key's link up."""
        key = self.new_key()
        yield self.ends(key, [self.linked(key)], self.end_unheard, POLLED_S)
        self.assertEqual(len(self.shared.lines("notifications of the database do not arrive")), 1)

    def end_unheard(self, key_id: str) -> None:
        """Let a key expire, and end the LISTEN connection just before."""
        [(count,)] = self.execute(
            "with deaf as (select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where application_name = 's2s-server listen' and datname = current_database()),"
            " ended as (update s2s.s2s_keys set active_to = now() where key_id = %s and (select count from deaf) > 0"
            " returning 1) select count(*) from ended",
            key_id,
        )
        self.assertEqual(count, 1)

    @inlineCallbacks
    def test_never_told(self):
        """Without any NOTIFY the poll detects within 5 s that a key has expired."""
        key = self.new_key()
        peer = self.linked(key)
        self.execute("alter table s2s.s2s_keys disable trigger s2s_keys_notify")
        self.addCleanup(self.execute, "alter table s2s.s2s_keys enable trigger s2s_keys_notify")
        yield self.ends(key, [peer], self.end, POLLED_S)


class ClockTests(RoleTestCase):
    """A server whose clock differs from that of the database."""

    @inlineCallbacks
    def test_behind_and_ahead(self):
        """With a clock two minutes behind or ahead, a new key is valid at once, and a revoked one invalid at once."""
        for shift in (-120, 120):
            self.execute("delete from s2s.s2s_keys")
            self.add_key(K1, is_default=True)
            self.execute("update s2s.s2s_keys set active_from = now()")
            at = int(time.time()) + shift
            server = self.server(at=at)
            yield server.start()
            self.linked(server, K1, at)
            self.add_key(key := Key("k2", _SECRET))
            self.execute("update s2s.s2s_keys set active_from = now() where key_id = 'k2'")
            peer = self.linked(server, key, at)
            began = time.monotonic()
            self.execute("update s2s.s2s_keys set active_to = now() where key_id = 'k2'")
            peer.rest()
            self.assertLess(time.monotonic() - began, NOTIFIED_S)
            yield server.says("the key k2 is no longer valid")
            peer = server.connect(key=key, now=at)
            self.addCleanup(peer.close)
            peer.write(peer.frame(PUSH, command("stolen")))
            self.assertEqual(peer.refusal()["payload"]["code"], "auth_bad")

    def linked(self, server: Server, key: Key, at: int) -> Peer:
        """Make a proven link."""
        peer = server.connect(key=key, now=at)
        self.addCleanup(peer.close)
        peer.greet()
        return peer
