"""A real server under attack: its cost to the server, and its effect on the server's engines and operators."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import psutil
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.admin.http.operation_runner import THREADS
from s2s.runtime.line_quota import TOLD
from tests.support.flood import StrangersFlood
from tests.support.http import ApiTestCase
from tests.support.peer import PUSH, Peer, command
from tests.support.postgres import Session
from tests.support.roles import RoleTestCase
from tests.support.waiting import poll

#: Seconds that the flood lasts.
_FLOOD_S = 6.0


class ObserverTests(ApiTestCase):
    """A client with an observer's token that makes as many expensive requests as it can."""

    @inlineCallbacks
    def test_lists_that_take_long(self) -> Iterator[Deferred[Any]]:
        """While observers' lists occupy all their threads, operators are answered; each list ends with its reason."""
        # The lock blocks every list of notices, as if it had to read millions of rows.
        with Session(self.url) as other:
            other.run("begin; lock table s2s.notices in access exclusive mode")
            lists = [deferToThread(self.ask, "GET", "/v1/notices", role="observer") for _ in range(6)]
            waiting = "select count(*) from pg_locks where not granted and relation = 's2s.notices'::regclass"
            yield poll(lambda: self.execute(waiting)[0][0] >= THREADS["observers"], "the places of observers are taken")
            for _ in range(10):
                steered = yield deferToThread(self.ask, "POST", "/v1/commands/retry", {"ids": [1]}, role="operator")
                self.assertEqual(steered.status, 200, steered.raw)
                looked = yield deferToThread(self.ask, "GET", "/v1/config/relay.window", role="operator")
                self.assertEqual(looked.status, 200, looked.raw)
            answers = yield gatherResults(lists)
            for answer in answers:
                self.assertEqual((answer.status, answer.body["code"]), (504, "deadline_exceeded"), answer.raw)
                self.assertIn("has locked the table of the list", answer.body["detail"])
            other.run("rollback")
        self.assertEqual(self.ask("GET", "/v1/notices").status, 200)


class PreAuthTests(RoleTestCase):
    """Clients without a key at the port of the links."""

    def pushing(self, peer: Peer, name: str, seconds: float) -> list[float]:
        """Push one command after the other, assert that each is accepted, and return how long each took."""
        took: list[float] = []
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            at = time.monotonic()
            self.assertTrue(peer.call(PUSH, command(f"{name}-{len(took)}"))["accepted"])
            took.append(time.monotonic() - at)
            time.sleep(0.02)
        return took

    @inlineCallbacks
    def test_a_flood_of_large_frames(self) -> Iterator[Deferred[Any]]:
        """40 large frames a second that do not verify use less than half of a core, and delay no engine."""
        server = self.server()
        yield server.start()
        engine = server.connect()
        self.addCleanup(engine.close)
        engine.greet()
        calm = yield deferToThread(self.pushing, engine, "calm", 2.0)
        process = psutil.Process(server.pid)
        flood = StrangersFlood(server.port, seconds=_FLOOD_S + 10)
        flood.start()
        self.addCleanup(flood.finish)
        spent = sum(process.cpu_times()[:2])
        flooded = yield deferToThread(self.pushing, engine, "flooded", _FLOOD_S)
        # An engine can still connect, from the address of the flood.
        late = server.connect(name="late")
        self.addCleanup(late.close)
        yield deferToThread(late.greet)
        spent = sum(process.cpu_times()[:2]) - spent
        flood.finish()
        yield deferToThread(flood.join)
        self.assertGreater(flood.sent, _FLOOD_S * 20)
        # A generous bound for a busy machine; without the protection it was 10 s.
        self.assertLess(median(flooded), 2 * median(calm) + 0.1)
        # Without its bounds the server would spend all its time on the flood.
        self.assertLess(spent, _FLOOD_S / 2)
        yield server.says("strangers")
        self.assertLessEqual(len(server.lines(": refused, ") + server.lines(": closed: ")), TOLD)
        self.assertEqual(server.lines("engine down"), [])
