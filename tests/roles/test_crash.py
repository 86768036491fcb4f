"""Either role killed in the middle: every accepted command exists once and takes effect once."""

from __future__ import annotations

from twisted.internet.defer import inlineCallbacks

from tests.support.peer import PUSH, Peer, command, framed, sign
from tests.support.roles import RoleTestCase, Server
from tests.support.waiting import poll

#: Enough pushes for a kill in the middle of the stream.
MANY = 2000


class CrashTests(RoleTestCase):
    """SIGKILL, and a new start."""

    def peer(self, server: Server) -> Peer:
        """Connect to a server."""
        peer = server.connect()
        self.addCleanup(peer.close)
        return peer

    def settled(self, count: int) -> bool:
        """Return whether every command has run, and no sender has anything left."""
        return self.count("notices") >= count and self.count("outbox") == 0

    def assert_once(self, count: int) -> None:
        """Assert the number of commands, and that each exists once, is done, and has one notice."""
        once = [(count, count, count)]
        self.assertEqual(
            self.execute(
                "select count(*), count(distinct idem_key), count(*) filter (where status = 'done') from s2s.commands"
            ),
            once,
        )
        self.assertEqual(
            self.execute("select count(*), count(distinct message), count(distinct cmd_id) from s2s.notices"), once
        )
        self.assertEqual(self.execute("select count(*) from s2s.commands join s2s.notices using (cmd_id)"), [(count,)])
        self.assertEqual(self.count("batch_notes"), 0)

    @inlineCallbacks
    def test_server_killed(self):
        """A server killed in a stream of pushes keeps every accepted command, and accepts the others again."""
        server = self.server()
        yield server.start()
        peer = self.peer(server)
        keys = [f"key-{number}" for number in range(MANY)]
        accepted: dict[str, int] = {}
        envelopes = {str(each["id"]): each for each in (peer.envelope(PUSH, command(key)) for key in keys)}
        peer.write(b"".join(framed(sign(each)) for each in envelopes.values()))
        while len(accepted) < MANY // 3:
            answer = peer.until(lambda frame: "ack_of" in frame)
            accepted[envelopes[answer["ack_of"]]["payload"]["idem_key"]] = answer["payload"]["cmd_id"]
        server.kill()
        # Acks that were in flight count too.
        for answer in peer.rest(is_killed=True):
            accepted[envelopes[answer["ack_of"]]["payload"]["idem_key"]] = answer["payload"]["cmd_id"]
        self.assertLess(len(accepted), MANY)
        found = dict(self.execute("select idem_key, cmd_id from s2s.commands"))
        self.assertEqual({key: found.get(key) for key in accepted}, accepted)

        yield server.start()
        peer = self.peer(server)
        sent = {peer.send(PUSH, command(key)): key for key in keys}
        for message_id, answer in peer.answers(list(sent)).items():
            key = sent[message_id]
            self.assertTrue(answer["accepted"], answer)
            self.assertEqual(answer["duplicate"], key in found, key)
            self.assertEqual(answer["cmd_id"], found.get(key, answer["cmd_id"]))
        yield poll(lambda: self.settled(MANY), "all of them have run")
        self.assert_once(MANY)

    @inlineCallbacks
    def test_both_killed(self):
        """If engine and server are killed in turn with a full outbox, each command and broadcast takes effect once."""
        server = self.server()
        engine = self.engine(server.port)
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) select 'notice.publish', 'key-' || n,"
            " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', 'outbox ' || n)"
            " from generate_series(1, %s) n",
            MANY,
        )
        yield engine.start()
        yield engine.says("retry")
        engine.kill()
        self.assertEqual(self.count("outbox"), MANY)
        self.execute(
            "insert into s2s.broadcasts (message) select 'broadcast ' || n from generate_series(1, %s) n", MANY
        )
        yield server.start()
        yield engine.start()
        for role, wanted in ((server, MANY // 3), (engine, MANY)):
            yield poll(lambda wanted=wanted: self.count("commands") >= wanted, "the stream flows")
            role.kill()
            self.assertGreater(self.count("outbox"), 0)
            yield role.start()
        yield poll(lambda: self.settled(2 * MANY), "everything has become a notice")
        self.assert_once(2 * MANY)
        self.assertEqual(self.execute("select distinct state from s2s.broadcasts"), [("queued",)])
