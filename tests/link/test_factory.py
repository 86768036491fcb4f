"""The factory of links, and the set of a server's links."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock as FakeClock
from twisted.internet.testing import StringTransport
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import Overloaded, WireError
from s2s.link import factory
from s2s.link.connection import CloseReason
from s2s.link.dispatcher import Dispatcher
from s2s.link.factory import MAX_CLOSING, MAX_LINKS, MAX_SILENT, LinkFactory, ServerLinks
from s2s.protocol.limits import Bounds, Counters, Timing
from s2s.protocol.signing import Key, Keyring, Secret
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, PERIOD_S, TOLD


class _Session:
    """The members of a session that ServerLinks reads."""

    def __init__(self, key_id: str | None) -> None:
        self.peer_key_id = key_id
        self.has_been_heard = key_id is not None
        self.is_open = True
        #: No frame has come for a while.
        self.is_checking = False


class _Link:
    """A link that only records why it was closed; its connection ends when the test ends it."""

    def __init__(self, key_id: str | None = None, network: str = "127.0.0.1", **peer: Any) -> None:
        self.network = network
        self.session = _Session(key_id)
        self.peer = peer
        self.close_reason = CloseReason("the connection was lost")
        self.closed: str | None = None
        self.is_cut = False
        self.dismissed: WireError | None = None

    def may_tell(self, why: str) -> bool:
        """Allow every line."""
        return True

    def close(self, why: str) -> None:
        """Close the link, once."""
        if self.session.is_open:
            self.session.is_open = False
            self.closed = self.close_reason.text = why

    def abort(self, why: str) -> None:
        """Close the link and cut its connection."""
        self.is_cut = True
        self.close(why)

    def dismiss(self, error: WireError, why: str) -> None:
        """Close the link with an error."""
        self.dismissed = error
        self.close(why)


class ServerLinksTests(SynchronousTestCase):
    """:class:`ServerLinks`."""

    def setUp(self) -> None:
        """Make an empty set of links."""
        self.up: list[Any] = []
        self.counters = Counters()
        self.time = FakeClock()
        self.links = ServerLinks(self.counters, Clock(self.time), self.up.append)

    def made(self, key_id: str | None = None, **peer: Any) -> Any:
        """Make a connection."""
        link: Any = _Link(key_id, **peer)
        self.links.link_made(link)
        return link

    def lines(self) -> list[str]:
        """Return a list to which every line of the log is appended."""
        lines: list[str] = []
        observer = lambda event: lines.append(str(event["log_format"]).format(**event))  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        return lines

    def loop(self, *names: str) -> None:
        """Let engines connect, prove their links and disconnect."""
        for name in names:
            self.links.link_proven(link := self.made("k1", name=name))
            self.links.link_lost(link)

    def test_engines(self) -> None:
        """An engine is up while its proven link exists."""
        link = self.made("k1", name="e1")
        self.assertEqual((len(self.links), self.links.engines, self.up), (1, [], []))
        self.links.link_proven(link)
        self.assertEqual((self.links.engines, self.up), ([link], [link]))
        self.links.link_lost(link)
        self.assertEqual((len(self.links), self.links.engines), (0, []))

    def test_a_newer_link_replaces_the_older(self) -> None:
        """A new proven link of an engine closes the old one, whose end then changes nothing."""
        old, new = (self.made("k1", name="e1", boot_id="a") for _ in range(2))
        self.links.link_proven(old)
        self.links.link_proven(new)
        self.assertEqual((self.links.engines, old.closed), ([new], "the same engine has a newer link"))
        self.links.link_lost(old)
        self.assertEqual((self.links.engines, len(self.links), new.closed), ([new], 1, None))

    def test_another_process_of_the_same_name(self) -> None:
        """A replaced link of another process is closed with an error, and one of the same process without an error."""
        old, new, again = (self.made("k1", name="e1", boot_id=boot) for boot in ("a", "b", "b"))
        self.links.link_proven(old)
        self.links.link_proven(new)
        assert old.dismissed is not None
        self.assertEqual(old.dismissed.code, "forbidden")
        self.assertIn("give each a --name", old.dismissed.message)
        self.links.link_proven(again)
        self.assertEqual((new.closed, new.dismissed), ("the same engine has a newer link", None))
        self.assertEqual(self.links.engines, [again])

    def test_one_name_under_two_keys(self) -> None:
        """An engine with the name of another process under another key has a line, and many have one a minute."""
        lines = self.lines()
        for key_id, name, boot_id in (
            ("k1", "e1", "a"), ("k2", "e2", "b"), ("k1", None, "a"), ("k2", None, "b"), ("k3", "e1", "a"),
        ):  # fmt: skip
            self.links.link_proven(self.made(key_id, name=name, boot_id=boot_id))
        self.assertEqual([line for line in lines if "same name" in line or "the name of" in line], [])
        for key_id in ("k4", "k5", "k6", "k7", "k8"):
            self.links.link_proven(self.made(key_id, name="e1", boot_id=key_id))
        told = [line for line in lines if "the name of an engine that is up with the key" in line]
        self.assertEqual(len(told), TOLD)
        self.assertIn("has the key k4 and the name of an engine that is up with the key k3", told[0])
        self.time.advance(PERIOD_S)
        self.assertIn("up under another key: 2 as e1: give each a --name of its own", lines[-1])

    def test_processes_without_a_boot_id(self) -> None:
        """Without a boot_id a link with recent frames is another process's, and a silent one is the same process's."""
        for peer, who in (({}, "without a name"), ({"name": "e1"}, "as e1")):
            lines = self.lines()
            old, new, again = (self.made("k1", **peer) for _ in range(3))
            self.links.link_proven(old)
            self.links.link_proven(new)
            assert old.dismissed is not None
            cure = "give each a name of its own, and a boot_id, in its health ack"
            self.assertEqual(
                (old.dismissed.code, old.dismissed.message),
                ("forbidden", f"another process has linked {who} with this key: {cure}"),
            )
            self.assertIn(f"if both run, {cure}", lines[1])
            new.session.is_checking = True
            self.links.link_proven(again)
            self.assertEqual((new.closed, new.dismissed), ("the same engine has a newer link", None))
            self.links.link_lost(again)

    def test_a_fight_is_told_once_a_minute(self) -> None:
        """Links of one engine that replace each other many times a second cause one line a minute, with the count."""
        lines = self.lines()
        for number in range(1, 17 * 120):
            self.time.advance(number / 17 - self.time.seconds())
            self.links.link_proven(link := self.made("k1", name="e1", boot_id=str(number)))
            for each in list(self.links):
                if each is not link:
                    self.links.link_lost(each)
        self.assertEqual(len(lines), 3 * 2 + 1, lines)
        self.assertIn("as 1019 others did", lines[4])

    def test_an_engine_that_comes_and_goes_is_told_once_a_minute(self) -> None:
        """A peer that closes each link after its proof has a few lines, then one a minute, with the likely cause."""
        lines = self.lines()
        for _ in range(181 * 10):
            self.loop("e1")
            self.time.advance(0.1)
        self.assertEqual(len(lines), 2 * TOLD + 3, lines)
        self.assertIn("engine e1 (key k1) came up 597 more times, and is down now", lines[2 * TOLD])
        self.assertIn("it may close each link right after it was proven: see its log", lines[-1])

    def test_a_healthy_engine_beside_one_that_comes_and_goes(self) -> None:
        """An engine that reconnects often hides no other engine, and once it stays up its end has a line again."""
        self.loop(*["e1"] * 100)
        lines = self.lines()
        self.loop("e2")
        self.assertEqual(len(lines), 2)
        self.links.link_proven(link := self.made("k1", name="e1"))
        self.time.advance(PERIOD_S)
        self.assertIn("and is up now", lines[-1])
        self.links.link_lost(link)
        self.assertEqual(len(lines), 4)

    def test_engines_of_many_names_are_told_together(self) -> None:
        """However many names a peer uses, the log and the memory are bounded."""
        lines = self.lines()
        self.loop(*(f"e{number}" for number in range(MAX_LINKS + 50)))
        self.assertEqual(len(lines), 2 * factory.MOST_ENGINES_TOLD)
        self.time.advance(PERIOD_S)
        self.assertEqual(lines[-1], "engines came up 950 more times: s2s engine list shows those that are up")
        self.assertEqual(len(self.links._lines), MAX_LINKS)

    def test_fights_under_many_names_are_told_together(self) -> None:
        """A peer that replaces its links, or reconnects, under ever new names has a bounded number of lines."""
        lines = self.lines()
        for number in range(500):
            pair = [self.made("k1", name=str(number), boot_id=boot) for boot in "ab"]
            for link in pair:
                self.links.link_proven(link)
            for link in pair:
                self.links.link_lost(link)
        self.loop(*(f"e{number % 300}" for number in range(3000)))
        self.time.advance(PERIOD_S)
        self.assertLessEqual(len(lines), 3 * factory.MOST_ENGINES_TOLD + 1)

    def test_memory_of_fights_is_bounded(self) -> None:
        """However many names are contested, only the newest are remembered, and no link of them is kept."""
        for number in range(MAX_LINKS + 50):
            pair = [self.made("k1", name=str(number), boot_id=boot) for boot in "ab"]
            for link in pair:
                self.links.link_proven(link)
            for link in pair:
                self.links.link_lost(link)
        self.assertEqual(len(self.links._replaced), MAX_LINKS)

    def test_other_engines(self) -> None:
        """Another name or another key is another engine; engines without a name are one engine for each key."""
        made = [
            self.made("k1", name="e1"),
            self.made("k1", name="e2"),
            self.made("k2", name="e1"),
            self.made("k1"),
            self.made("k2"),
        ]
        for link in made:
            self.links.link_proven(link)
        self.assertEqual(self.links.engines, made)
        self.links.link_proven(self.made("k1"))
        self.assertEqual([link.closed is None for link in made], [True, True, True, False, True])

    def test_too_many(self) -> None:
        """With 1,000 links the newest link of the key with the most links is closed for a new one, with a line."""
        lines = self.lines()
        others = [self.made("k2") for _ in range(MAX_LINKS // 2 - 1)]
        made = [self.made("k1") for _ in range(MAX_LINKS // 2 + 1)]
        self.assertEqual(lines, [])
        new = [self.made("k3") for _ in range(3)]
        self.assertEqual([link for link in (*others, *made, *new) if link.closed], [others[-1], *made[-2:]])
        self.assertIn("of 1000 links the key k1 has the most: 501: find the process that opens them", lines[0])
        self.assertIn("the key k2 has the most: 499:", lines[2])
        self.assertEqual((len(lines), made[-1].dismissed.code), (3, "forbidden"))
        self.assertEqual(self.counters.met, {"links": 3})

    def test_too_many_silent(self) -> None:
        """With 100 silent links the oldest of them is closed for a new one; links that were heard do not count."""
        heard = [self.made("k1") for _ in range(50)]
        silent = [self.made() for _ in range(MAX_SILENT)]
        self.assertEqual([link for link in silent if link.closed], [])
        new = self.made()
        self.assertEqual([link for link in (*heard, *silent, new) if link.closed], [silent[0]])
        self.assertEqual(self.counters.met, {"silent_links": 1})

    def test_a_flood_of_silent_links(self) -> None:
        """A flood of silent links from one address closes its own links, and no older one of another address."""
        alone = self.made(network="2001:db8::/64")
        flood = [self.made() for _ in range(3 * MAX_SILENT)]
        self.assertIsNone(alone.closed)
        self.assertEqual(sum(link.closed is None for link in flood), MAX_SILENT - 1)

    def test_a_burst_of_silent_links(self) -> None:
        """In a burst the oldest silent links are closed one by one, even if their connections end later."""
        silent = [self.made() for _ in range(MAX_SILENT + 30)]
        self.assertEqual([link.closed is not None for link in silent], [True] * 30 + [False] * MAX_SILENT)

    def test_silent_links_take_no_place_once_they_are_cut(self) -> None:
        """Silent links are cut at once: however many come before one of them has ended, an engine gets in."""
        flood = [self.made() for _ in range(2 * MAX_LINKS)]
        self.assertTrue(all(link.is_cut for link in flood if link.closed))
        self.assertEqual(len(self.links), MAX_SILENT)
        self.assertIsNone(self.made("k1").closed)

    def test_closing_links_have_a_bound(self) -> None:
        """Closing links block no new link, and above 100 the oldest is cut."""
        made = [self.made("k1") for _ in range(MAX_LINKS)]
        for link in made[: MAX_CLOSING + 50]:
            link.close("a frame was refused")
        new = [self.made("k1") for _ in range(MAX_CLOSING + 50)]
        self.assertEqual([link for link in new if link.closed], [])
        self.assertEqual(sum(link.is_cut for link in made), 51)
        self.assertEqual(len(self.links), MAX_LINKS + 99)

    def test_a_silent_link_makes_room(self) -> None:
        """With 1,000 links, of which one is silent, the silent one is closed for a new one."""
        stranger = self.made()
        made = [self.made("k1") for _ in range(MAX_LINKS)]
        self.assertTrue(stranger.is_cut)
        self.assertEqual([link for link in made if link.closed], [])

    def test_a_link_heard_in_time(self) -> None:
        """A silent link that was heard meanwhile is not closed as the oldest silent one."""
        silent = [self.made() for _ in range(MAX_SILENT)]
        silent[0].session.has_been_heard = True
        self.made()
        self.made()
        self.assertEqual([link for link in silent if link.closed], [silent[1]])

    def test_close_all(self) -> None:
        """close_all closes every link."""
        made = [self.made("k1", name="e1"), self.made()]
        self.links.close_all("the server stops")
        self.assertEqual([link.closed for link in made], ["the server stops"] * 2)

    def test_losing_what_was_never_kept(self) -> None:
        """The end of a link that was never added is ignored."""
        self.links.link_lost(_Link())  # type: ignore[arg-type]
        self.assertEqual(len(self.links), 0)

    def test_numbers(self) -> None:
        """The bounds are those of the protocol."""
        self.assertEqual((factory.MAX_LINKS, factory.MAX_SILENT, factory.MAX_CLOSING), (1000, 100, 100))


class LinkFactoryTests(SynchronousTestCase):
    """:class:`LinkFactory`."""

    def setUp(self) -> None:
        """Make a factory of a server's links."""
        self.time = FakeClock()
        clock = Clock(self.time, lambda: 1e9)
        keys: Any = type("Keys", (), {"keyring": Keyring([Key("k1", Secret(bytes(32)), "any", 0.0)])})()
        self.links = ServerLinks(Counters(), clock, lambda link: None)
        self.factory = LinkFactory(
            "server",
            Dispatcher(keys, {}, clock),
            keys,
            clock,
            self.links,
            Bounds(frame_size=8192),
            Timing(proof=2.0, flush=1.0),
        )

    def connect(self) -> tuple[Any, StringTransport]:
        """Make a link and connect it."""
        link, transport = self.factory.buildProtocol(None), StringTransport()
        link.makeConnection(transport)
        return link, transport

    def test_links_are_of_one_process(self) -> None:
        """Links share the replay cache and the counters, and each has its own session and limit."""
        (one, _), (two, _) = self.connect(), self.connect()
        self.assertIs(one.session._replay, two.session._replay)
        self.assertIs(one._counters, two._counters)
        self.assertIsNot(one.session, two.session)
        self.assertEqual((one.MAX_LENGTH, one.session.max_frame, one.session.role), (8192, 8192, "server"))
        self.assertEqual(len(self.links), 2)

    def test_a_key_that_floods_the_replay_cache(self) -> None:
        """The log names the key whose requests have no room in the replay cache, in a few lines a minute."""
        lines: list[str] = []
        observer = lambda event: lines.append(str(formatEvent(event)))  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.factory.replay._capacity = 2
        self.factory.replay.enter("k1", "a", 0.0)
        for _ in range(100):
            self.assertRaises(Overloaded, self.factory.replay.enter, "k1", "b", 0.0)
        self.assertEqual((len(lines), self.factory.counters.met["replay_cache"]), (MOST_TOLD, 100))
        self.assertIn("requests signed by the key k1 are refused", lines[0])

    def test_a_key_that_verifies_no_more(self) -> None:
        """Links whose peer last signed with a key that is no longer valid are closed with the reason; others stay."""
        made = [self.connect()[0] for _ in range(5)]
        for link, key_id in zip(made, ("k1", "gone", "ended", "later"), strict=False):
            link.session.heard(key_id, 0.0)
        windows = {"k1": (0.0, None), "ended": (0.0, 1e9), "later": (1e12, None)}
        keyring = Keyring(Key(key_id, Secret(bytes(32)), "any", *window) for key_id, window in windows.items())
        self.factory.drop_revoked(self.links, keyring)
        self.assertEqual([link.session.is_open for link in made], [True, False, False, False, True])
        self.assertEqual(made[1].close_reason.text, "the key gone is not known here")
        self.assertEqual(made[2].close_reason.text, "the key ended is no longer valid")
        self.assertIn("the key later is not active yet, but in ", made[3].close_reason.text)

    def test_a_hundred_silent_connections(self) -> None:
        """Of 130 silent connections 30 are cut at once and the others after the proof timeout, and none is left."""
        made = [self.connect() for _ in range(130)]
        self.assertEqual([transport.disconnected for _, transport in made], [True] * 30 + [False] * 100)
        self.time.advance(2.0)
        self.assertTrue(all(transport.disconnecting for _, transport in made))
        self.time.advance(1.0)
        for link, transport in made:
            self.assertTrue(transport.disconnected)
            link.connectionLost()
        # The ends without a line of their own are counted in one line.
        self.time.advance(PERIOD_S)
        self.time.advance(PERIOD_S)
        self.assertEqual((len(self.links), self.time.getDelayedCalls()), (0, []))
