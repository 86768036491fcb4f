"""Pushes to a real server over a real socket: the guarantees for engines (docs/protocol.rst, "Commands")."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from tests.support.peer import PUSH, Frame, Peer, command, framed, notice, sign
from tests.support.roles import RoleTestCase, SharedServerTestCase
from tests.support.waiting import poll


class PushTests(SharedServerTestCase):
    """``s2s.command.push`` from a test peer."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Link to the server."""
        yield super().setUp()
        self.peer: Peer = self.shared.connect()
        self.addCleanup(self.peer.close)
        self.peer.greet()

    @inlineCallbacks
    def ran(self, count: int) -> Iterator[Deferred[Any]]:
        """Wait until this many commands are done."""
        yield poll(lambda: self.statuses().get("done") == count, f"{count} commands are done")

    def statuses(self) -> dict[str, int]:
        """Count the commands by status."""
        return dict(self.execute("select status, count(*) from s2s.commands group by status"))

    def pushed(self, *payloads: Frame) -> tuple[list[str], bytes]:
        """Create pushes; return their ids, and all their frames in one piece."""
        envelopes = [self.peer.envelope(PUSH, payload) for payload in payloads]
        return [str(each["id"]) for each in envelopes], b"".join(framed(sign(each)) for each in envelopes)

    def test_accepted(self):
        """An accepted command is committed when its ack arrives, under the cmd_id in the ack."""
        ack = self.peer.call(PUSH, command("one", notice("Harbour closed"), priority=7))
        found = self.execute("select cmd_id, cmd_type, idem_key, payload, priority from s2s.commands")
        self.assertEqual(found, [(ack["cmd_id"], "notice.publish", "one", notice("Harbour closed"), 7)])
        self.assertEqual({**ack, "cmd_id": 1}, {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"})

    @inlineCallbacks
    def test_duplicate(self):
        """The same content again is a duplicate with the first cmd_id and its current status, whatever its priority."""
        first = self.peer.call(PUSH, command("one"))
        yield self.ran(1)
        for again in (command("one"), command("one", priority=1, due_at=4102444800)):
            expected = {"accepted": True, "duplicate": True, "cmd_id": first["cmd_id"], "status": "done"}
            self.assertEqual(self.peer.call(PUSH, again), expected)
        self.assertEqual((self.count("commands"), self.count("notices")), (1, 1))

    @inlineCallbacks
    def test_conflict(self):
        """Other content under a used key is a conflict that names the first command, and changes nothing."""
        first = self.peer.call(PUSH, command("one"))
        yield self.ran(1)
        before = self.execute("select * from s2s.commands")
        error = self.peer.call(PUSH, command("one", notice("something else")))
        self.assertEqual(error["code"], "idem_conflict")
        self.assertEqual(error["details"], {"retryable": False, "cmd_id": first["cmd_id"]})
        self.assertEqual(self.execute("select * from s2s.commands"), before)
        self.assertEqual(self.execute("select message from s2s.notices"), [("one",)])

    @inlineCallbacks
    def test_refused(self):
        """A command without a handler, or refused by its schema, is refused at the push and uses up no key."""
        huge = 2**53 - 1
        for code, path, payload in (
            ("unknown_command", None, command("one", cmd_type="nobody.serves")),
            ("bad_payload", "/payload/payload/colour", command("one", notice(colour="red"))),
            ("bad_payload", "/payload/payload/message", command("one", notice(""))),
            ("bad_payload", "/payload/payload/message", command("one", notice(7))),
            ("bad_payload", "/payload/payload/severity", command("one", {"scope": "global", "message": "m"})),
            ("bad_payload", "/payload/payload/sector_id", command("one", notice(scope="sector"))),
            ("bad_payload", "/payload/payload/corp_id", command("one", notice(scope="sector", sector_id=1, corp_id=1))),
            ("bad_payload", "/payload/payload/ttl_s", command("one", notice(ttl_s=0))),
            ("bad_payload", "/payload/priority", command("one", priority="high")),
            ("bad_payload", "/payload/due", command("one", due=0)),
        ):
            error = self.peer.call(PUSH, payload)
            self.assertEqual((error["code"], error["details"].get("path")), (code, path), error["message"])
            self.assertFalse(error["details"]["retryable"])
        self.assertEqual((self.count("commands"), self.count("idempotency_keys")), (0, 0))
        self.assertTrue(
            self.peer.call(PUSH, command("one", notice(scope="sector", sector_id=huge, ttl_s=huge)))["accepted"]
        )
        yield self.ran(1)
        self.assertEqual(self.execute("select sector_id from s2s.notices"), [(huge,)])

    @inlineCallbacks
    def test_one_write(self):
        """In one write of 2,000 pushes the first push of a repeated key wins, with the same or other content."""
        payloads = [command(f"key-{number}") for number in range(2000)]
        payloads[700] = payloads[1900] = command("key-3")
        payloads[4] = command("key-1990", notice("the first"))
        ids, data = self.pushed(*payloads)
        self.peer.write(data)
        answers = self.peer.answers(ids)
        first, contender = (answers[ids[at]] for at in (3, 4))
        for at, sent in enumerate(ids):
            answer = answers[sent]
            if at == 1990:
                self.assertEqual((answer["code"], answer["details"]["cmd_id"]), ("idem_conflict", contender["cmd_id"]))
            else:
                self.assertEqual((answer["accepted"], answer["duplicate"]), (True, at in (700, 1900)))
        self.assertEqual([answers[ids[at]]["cmd_id"] for at in (700, 1900)], [first["cmd_id"]] * 2)
        yield self.ran(1997)
        self.assertEqual(self.execute("select count(*), count(distinct cmd_id) from s2s.notices"), [(1997, 1997)])
        self.assertEqual(
            self.execute(
                "select message from s2s.notices n join s2s.commands using (cmd_id) where idem_key = 'key-1990'"
            ),
            [("the first",)],
        )

    @inlineCallbacks
    def test_pipelined(self):
        """A thousand pushes in flight at once are each answered once, in any order, and run once."""
        started = time.monotonic()
        ids, data = self.pushed(*(command(f"key-{number}") for number in range(1000)))
        # The pieces do not match the frames.
        for start in range(0, len(data), 7919):
            self.peer.write(data[start : start + 7919])
        answers = self.peer.answers(ids)
        self.assertLess(time.monotonic() - started, 10)
        numbers = {answers[sent]["cmd_id"] for sent in ids}
        self.assertEqual(len(numbers), 1000)
        yield self.ran(1000)
        self.assertEqual({number for (number,) in self.execute("select cmd_id from s2s.notices")}, numbers)

    @inlineCallbacks
    def test_refusals_between(self):
        """Among good pushes in one piece, each refused one gets its own error and the others are accepted."""
        payloads = [command(f"key-{number}") for number in range(300)]
        bad = dict.fromkeys(range(7, 300, 50), "unknown_command") | dict.fromkeys(range(9, 300, 50), "bad_payload")
        for at, code in bad.items():
            payloads[at] = command(f"bad-{at}", cmd_type="no.such") if code == "unknown_command" else {"cmd_type": 1}
        ids, data = self.pushed(*payloads)
        self.peer.write(data)
        answers = self.peer.answers(ids)
        self.assertEqual({at: answers[sent]["code"] for at, sent in enumerate(ids) if "code" in answers[sent]}, bad)
        yield self.ran(300 - len(bad))

    @inlineCallbacks
    def test_due_at(self):
        """A command that is not due waits, and others pass it; it runs when its second has come."""
        peer = self.peer
        due_at = int(time.time()) + 5
        peer.call(PUSH, command("later", priority=0, due_at=due_at))
        peer.call(PUSH, command("never", priority=0, due_at=4102444800))
        peer.call(PUSH, command("at once", priority=1000))
        yield poll(lambda: self.count("notices") >= 1, "the one that is due has run")
        self.assertEqual(self.execute("select message from s2s.notices"), [("at once",)])
        yield poll(lambda: self.count("notices") >= 2, "the one that became due has run")
        found = self.execute("select message, extract(epoch from created_at) >= %s from s2s.notices", due_at)
        self.assertEqual(found, [("at once", False), ("later", True)])
        self.assertEqual(self.execute("select status from s2s.commands where idem_key = 'never'"), [("ready",)])


class OrderTests(RoleTestCase):
    """The order in which commands run: a server without workers fills the table, then one with a worker runs it."""

    @inlineCallbacks
    def test_priority(self):
        """A lower priority number runs first, then the earlier due_at, then the earlier command."""
        filler = self.server("--executor-workers", "0")
        yield filler.start()
        peer = filler.connect()
        self.addCleanup(peer.close)
        wanted = [(priority, due, n) for priority in (0, 99, 100, 1000) for due in (5, 6) for n in range(20)]
        mixed = random.Random(7).sample(wanted, len(wanted))
        mixed.sort(key=lambda each: each[2])  # equal ones in their expected order
        hour_ago = int(time.time()) - 3600
        for priority, due, number in mixed:
            payload = command(f"{priority} {due} {number}", priority=priority, due_at=hour_ago + due)
            self.assertEqual(peer.call(PUSH, payload)["status"], "ready")
        self.assertEqual(self.count("notices"), 0)
        yield self.server("--executor-workers", "1").start()
        yield poll(lambda: self.count("notices") == len(wanted), "all have run")
        ran = [message for (message,) in self.execute("select message from s2s.notices order by notice_id")]
        self.assertEqual(ran, ["{} {} {}".format(*each) for each in wanted])
