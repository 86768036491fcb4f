"""The relay from the outbox to the server: every row is sent until it is settled, and none is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock as FakeClock
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import (
    BadReply,
    DatabaseUnavailable,
    DeadlineExceeded,
    DeadlinePassed,
    InvalidPayload,
    LineFull,
    LinkLost,
    Refused,
    TooBigToSend,
)
from s2s.protocol.catalogue import COMMAND_PUSH
from s2s.protocol.limits import Bounds
from s2s.protocol.settings import number
from s2s.roles.engine import relay
from s2s.roles.engine.congestion_window import CongestionWindow
from s2s.roles.engine.relay import PUSH_S, Relay
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import PERIOD_S, TOLD
from s2s.store.pool import Database
from s2s.store.tables import outbox
from s2s.store.tables.outbox import OutboxRow, Settlement
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_NEW = {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"}


class _Link:
    """A link whose pushes the test answers.

    :ivar pushes: every payload, in the order of sending.
    """

    def __init__(self) -> None:
        self.session = SimpleNamespace(is_open=True, max_frame=Bounds.frame_size)
        self.pushes: list[dict[str, Any]] = []
        self.waiting: dict[str, Deferred[Any]] = {}
        self.most = 0

    def call(self, type: str, payload: dict[str, Any], timeout: float) -> Deferred[Any]:
        """Send a push."""
        assert (type, timeout) == (COMMAND_PUSH, PUSH_S)
        assert payload["idem_key"] not in self.waiting, "the same row is in flight twice"
        self.pushes.append(payload)
        self.waiting[payload["idem_key"]] = Deferred()
        self.most = max(self.most, len(self.waiting))
        return self.waiting[payload["idem_key"]]

    def accept(self, *keys: str, **ack: Any) -> None:
        """Answer these pushes, or all that wait for a reply."""
        for key in keys or list(self.waiting):
            self.waiting.pop(key).callback({**_NEW, **ack})

    def refuse(self, error: Exception, *keys: str) -> None:
        """Fail these pushes, or all that wait for a reply."""
        for key in keys or list(self.waiting):
            self.waiting.pop(key).errback(error)

    def close(self) -> None:
        """Accept no more pushes, and fail the waiting ones, as a link does long before it is lost."""
        self.session.is_open = False
        self.refuse(LinkLost("closing"))

    @property
    def keys(self) -> list[str]:
        """The keys that were sent."""
        return [push["idem_key"] for push in self.pushes]


class RelayTests(DatabaseTestCase):
    """:class:`Relay` on a real outbox."""

    def setUp(self) -> None:
        """Start a relay without a link."""
        super().setUp()
        self.relay = self.make_relay()
        self.link: Any = _Link()
        self.addCleanup(self.hang_up)

    def hang_up(self) -> None:
        """Leave no push in flight, since a stop waits for it."""
        self.relay.linked(None)
        self.link.refuse(LinkLost("the test is over"))

    def make_relay(self) -> Relay:
        """Start a relay on a pool of its own, with the shortest pauses."""
        database = Database(self.url, threads=2)
        database.start()
        self.addCleanup(database.stop)
        made = Relay(database, Clock(reactor), rng=lambda: 0.0)
        made.start()
        self.addCleanup(made.stop)
        return made

    def put(self, count: int, text: str = "", since: int = 0) -> list[str]:
        """Put commands with the keys k0, k1, ... into the outbox."""
        keys = [f"k{at}" for at in range(since, since + count)]
        connection = psycopg2.connect(self.url)
        try:
            with connection, connection.cursor() as cursor:
                outbox.put_batch(cursor, "a.b", [(key, {"text": text}) for key in keys])
        finally:
            connection.close()
        return keys

    def left(self) -> list[Any]:
        """Return the rows that are left in the outbox."""
        return self.execute("select idem_key, state, error_code from s2s.outbox order by outbox_id")

    def until(self, condition: Callable[[], Any], what: str) -> Deferred[Any]:
        """Wait for a condition, and wake the relay so that it does not wait for its poll."""

        def woken() -> Any:
            self.relay.wake()
            return condition()

        return poll(woken, what)

    def sent(self, count: int) -> Deferred[Any]:
        """Wait until this many pushes are in flight."""
        return self.until(lambda: len(self.link.waiting) == count, f"{count} pushes in flight")

    def empty(self) -> Deferred[Any]:
        """Wait until the outbox is empty."""
        return self.until(lambda: not self.left(), "an empty outbox")

    async def test_what_cannot_be_removed(self) -> None:
        """An accepted row that cannot be deleted is logged and not sent again; it is deleted once that is possible."""
        self.patch(outbox, "KEPT_S", 0.2)
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
            " return null; end $$;"
            "create trigger keep before delete on s2s.outbox for each row when (old.idem_key <> 'k1')"
            " execute function keep()"
        )
        keys = self.put(3)
        self.relay.linked(self.link)
        with capturedLogs() as told:
            await self.sent(3)
            self.link.accept()
            await self.until(lambda: len(self.left()) == 2, "the removal of the one that can be removed")
            # The rows become due again meanwhile.
            await deferLater(reactor, 1.0)
            self.relay.wake()
            await deferLater(reactor, 0.2)
        self.assertEqual(self.link.keys, keys)
        lines = [line for event in told if "outbox" in (line := str(formatEvent(event)))]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn(
            "(delete on s2s.outbox): trigger keep on s2s.outbox (delete, function public.keep()): drop trigger",
            lines[0],
        )
        self.execute("drop trigger keep on s2s.outbox")
        await self.empty()
        self.assertEqual((self.link.keys, self.relay.accepted, self.relay.duplicates), (keys, 3, 0))
        await self.until(lambda: self.relay._undeleted == {}, "the relay knows that they are removed")

    async def test_what_cannot_be_leased(self) -> None:
        """Rows that the database refuses to lease are logged, and do not delay others."""
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
            " return null; end $$;"
            "create trigger keep before update on s2s.outbox for each row when (old.idem_key <> 'k1')"
            " execute function keep()"
        )
        self.patch(relay, "CLAIM_ROWS", 2)
        self.put(4)
        with capturedLogs() as told:
            self.relay.linked(self.link)
            await self.sent(1)
            self.link.accept()
            await self.until(lambda: len(self.left()) == 3, "the removal")
        self.assertEqual(self.link.keys, ["k1"])
        lines = [line for event in told if "outbox" in (line := str(formatEvent(event)))]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("(update on s2s.outbox): trigger keep on s2s.outbox", lines[0])

    async def test_what_is_refused_by_a_claim(self) -> None:
        """A row whose lease the database refuses, at once or at the COMMIT, is logged and does not delay others."""
        raising = (
            "create function no() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.idem_key = 'k1' then raise exception 'not this one'; end if; return new; end $$;"
        )
        for make, drop, why in (
            (
                "alter table s2s.outbox add constraint c check (idem_key <> 'k1') not valid",
                "alter table s2s.outbox drop constraint c",
                'new row for relation "outbox" violates check constraint "c" (SQLSTATE 23514)',
            ),
            (
                f"{raising} create constraint trigger no after update on s2s.outbox deferrable initially deferred"
                " for each row execute function no()",
                "drop trigger no on s2s.outbox; drop function no()",
                "not this one: mend the function no(), which s2s has not made",
            ),
            (
                raising.replace("one'", "one' using errcode = 'XX001'")
                + " create trigger no before update on s2s.outbox for each row execute function no()",
                "drop trigger no on s2s.outbox",
                "not this one: mend the function no(), which s2s has not made",
            ),
        ):
            self.put(4)
            self.execute(make)
            self.relay, self.link = self.make_relay(), _Link()
            with capturedLogs() as told:
                self.relay.linked(self.link)
                await self.sent(3)
                self.link.accept()
                await self.until(lambda: len(self.left()) == 1, "the removal of the others")
            self.assertEqual(self.link.keys, ["k0", "k2", "k3"])
            lines = [line for event in told if "s2s.outbox" in (line := str(formatEvent(event)))]
            self.assertEqual(len(lines), 1, lines)
            self.assertIn(f"rows of s2s.outbox are left out: {why}", lines[0])
            self.assertIn(why, self.relay._database.kept)
            self.relay.linked(None)
            self.execute(f"{drop}; delete from s2s.outbox")

    async def test_what_is_refused_by_a_settlement(self) -> None:
        """A row whose deletion or change is refused is logged and has a pause, and the others are settled."""
        self.execute(
            "create table public.notes (outbox_id bigint references s2s.outbox (outbox_id));"
            "alter table s2s.outbox add constraint c check (idem_key <> 'k3' or attempts = 0)"
        )
        self.put(6)
        self.execute("insert into public.notes select outbox_id from s2s.outbox where idem_key = 'k1'")
        with capturedLogs() as told:
            self.relay.linked(self.link)
            await self.sent(6)
            self.link.refuse(Refused("teapot", "no", {"retryable": False}), "k3", "k4")
            self.link.accept()
            await self.until(
                lambda: self.left() == [("k1", "waiting", None), ("k3", "waiting", None), ("k4", "dead", "teapot")],
                "the settlement of the others",
            )
            [(rests,)] = self.execute(
                "select min(send_at) > now() + interval '10 s' from s2s.outbox where state <> 'dead'"
            )
        self.assertTrue(rests)
        lines = [line for event in told if "rows of s2s.outbox are left out" in (line := str(formatEvent(event)))]
        self.assertEqual(len(lines), 2, lines)
        self.assertIn('violates check constraint "c"', lines[0])
        self.assertIn("violates foreign key constraint", lines[1])
        self.assertEqual(len(self.relay._undeleted), 1)

    async def test_what_is_too_long_to_be_read(self) -> None:
        """A payload too long for a frame is set aside unread; one that fits is sent, though its text is longer."""
        self.put(1)
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) values"
            " ('a.b', 'long', jsonb_build_object('text', repeat('x', 5000000))),"
            " ('a.b', 'spaces', jsonb_build_object('n', (select jsonb_agg(1) from generate_series(1, 32000))))"
        )
        read: list[Any] = []
        claimed = self.relay._claimed
        self.patch(self.relay, "_claimed", lambda rows, *args: (read.extend(rows), claimed(rows, *args)))
        self.relay.linked(self.link)
        await self.sent(2)
        self.assertEqual([row.idem_key for row in read if row.payload is None], ["long"])
        self.assertEqual(self.link.keys, ["k0", "spaces"])
        self.link.accept()
        await self.until(lambda: self.left() == [("long", "dead", "toolarge")], "the row that is set aside")

    async def test_accepted(self) -> None:
        """An accepted row, new or duplicate, is deleted and counted."""
        keys = self.put(3)
        self.relay.linked(self.link)
        await self.sent(3)
        self.assertEqual(self.link.keys, keys)
        self.link.accept("k0", "k2")
        self.link.accept("k1", duplicate=True)
        await self.empty()
        self.assertEqual(
            (self.relay.accepted, self.relay.duplicates, self.relay.dead, self.relay.retried), (2, 1, 0, 0)
        )

    async def test_what_is_pushed(self) -> None:
        """A push contains the members of the row, and no due_at if the row has none."""
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload, priority, due_at) values"
            " ('a.b', 'k1', '{\"b\": [1, null], \"a\": \"é\"}', 7, 4102444800), ('c', 'k2', '{}', 100, null)"
        )
        self.relay.linked(self.link)
        await self.sent(2)
        one = {"cmd_type": "a.b", "idem_key": "k1", "payload": {"a": "é", "b": [1, None]}, "priority": 7}
        two = {"cmd_type": "c", "idem_key": "k2", "payload": {}, "priority": 100}
        self.assertEqual(self.link.pushes, [{**one, "due_at": 4102444800}, two])
        self.link.accept()

    async def test_only_with_a_link(self) -> None:
        """Without a link no row is claimed; new rows are sent when there is a link, and when the relay is woken."""
        self.put(2)
        self.relay.wake()
        await poll(lambda: self.relay.depth == 2, "the outbox counted")
        self.assertEqual(self.execute("select count(*) from s2s.outbox where send_at > now()"), [(0,)])
        self.relay.linked(self.link)
        await poll(lambda: len(self.link.waiting) == 2, "both sent")
        self.put(1, since=2)
        self.relay.wake()
        await poll(lambda: len(self.link.waiting) == 3, "the third sent", timeout=0.9)
        self.link.accept()
        await self.empty()

    async def test_the_poll_finds_them(self) -> None:
        """Rows without a wake are found within a second or so."""
        self.relay.linked(self.link)
        self.put(1)
        await poll(lambda: self.link.waiting, "the row sent", timeout=3.0)
        self.link.accept()

    async def test_sent_again(self) -> None:
        """After a retryable refusal, replay, forbidden, deadline, lost link or full queue a row is sent again."""
        errors = [
            Refused("overloaded", "m", {"retryable": True, "retry_after_ms": 10}),
            Refused("db_unavailable", "m", {}),
            Refused("internal_error", "m", {"incident": "i"}),
            Refused("replay", "m", {"retryable": False}),
            Refused("forbidden", "m", {"retryable": False}),
            DeadlinePassed("late"),
            LinkLost("gone"),
            BadReply("nonsense"),
            LineFull("full"),
        ]
        self.put(1)
        self.relay.linked(self.link)
        for error in errors:
            await self.sent(1)
            self.link.refuse(error)
        await self.sent(1)
        self.link.accept()
        await self.empty()
        self.assertEqual(self.link.keys, ["k0"] * (len(errors) + 1))
        self.assertEqual((self.relay.retried, self.relay.accepted, self.relay.dead), (len(errors), 1, 0))

    async def test_the_peers_pause(self) -> None:
        """A row waits for as long as the peer asks for, but not for hours."""
        self.put(2)
        self.relay.linked(self.link)
        await self.sent(2)
        self.link.refuse(Refused("overloaded", "m", {"retry_after_ms": 30_000}), "k0")
        self.link.refuse(Refused("overloaded", "m", {"retry_after_ms": 10**12}), "k1")
        await poll(lambda: self.execute("select 1 from s2s.outbox where attempts = 1")[1:], "both settled")
        pauses = self.execute("select extract(epoch from send_at - now())::float8 from s2s.outbox order by outbox_id")
        self.assertTrue(25 < pauses[0][0] <= 30 and 55 < pauses[1][0] <= 60, pauses)

    async def test_set_aside(self) -> None:
        """Any other refusal sets the row aside as dead with its code and text; the others are sent."""
        self.put(5)
        self.relay.linked(self.link)
        await self.sent(5)
        for key, error in (
            ("k0", Refused("idem_conflict", "used before", {"retryable": False})),
            ("k1", Refused("made_up", "x" * 10_000, {})),
            ("k2", TooBigToSend(70000, 65536)),
            ("k3", InvalidPayload("at /payload/x: no")),
        ):
            self.link.refuse(error, key)
        self.link.accept("k4")
        await self.until(lambda: not [row for row in self.left() if row[1] == "waiting"], "nothing left waiting")
        self.assertEqual(
            self.left(),
            [
                ("k0", "dead", "idem_conflict"),
                ("k1", "dead", "made_up"),
                ("k2", "dead", "toolarge"),
                ("k3", "dead", "bad_payload"),
            ],
        )
        ((text,),) = self.execute("select error_message from s2s.outbox where idem_key = 'k0'")
        self.assertIn("used before", text)
        self.assertEqual((self.relay.dead, self.relay.accepted), (4, 1))

    async def test_a_row_that_cannot_be_said(self) -> None:
        """A row of plain SQL that canonical JSON cannot express is set aside, and the rows around it are sent."""
        self.put(1)
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) values"
            """ ('a.b', 'odd', '{"n": 1.5}'), ('a.b', 'huge', '{"n": 1e400}'), ('a.b', 'deep', %s),"""
            " ('a.b', 'long', %s)",
            '{"a":' * 4000 + "1" + "}" * 4000,
            '{"a":' + "1" * 100_000 + "}",
        )
        self.put(1, since=1)
        self.relay.linked(self.link)
        await poll(lambda: set(self.link.waiting) == {"k0", "k1"}, "the good rows sent", timeout=3.0)
        self.link.accept()
        dead = [(name, "dead", "bad_payload") for name in ("odd", "huge", "deep", "long")]
        await self.until(lambda: self.left() == dead, "the odd rows set aside")
        out_of_range = "the payload cannot be read: a number in it is out of range, beyond 1.8e308: say it as a string"
        self.assertEqual(
            [text for (text,) in self.execute("select error_message from s2s.outbox order by outbox_id")],
            [
                "at /payload/n: a number is not an integer: say it in basis points, in permille or as a decimal string",
                out_of_range,
                "the payload cannot be read: it is nested deeper than 32 levels",
                out_of_range,
            ],
        )

    async def test_window(self) -> None:
        """At most 512 rows are in flight; as they are answered the others follow, each once."""
        keys = self.put(1200)
        self.relay.linked(self.link)
        await self.sent(number("relay.window"))
        while len(self.link.pushes) < 1200 or self.link.waiting:
            self.link.accept(*list(self.link.waiting)[:100])
            await self.until(
                lambda: len(self.link.waiting) > number("relay.window") - 100 or len(self.link.pushes) == 1200, "more"
            )
        await self.empty()
        self.assertEqual(sorted(self.link.keys), sorted(keys))
        self.assertLessEqual(self.link.most, number("relay.window"))
        self.assertEqual(self.relay.accepted, 1200)

    async def test_window_in_bytes(self) -> None:
        """Large rows are in flight up to the congestion window, the others follow, and each is sent once."""
        count = 100
        self.put(count, "x" * 60_000)
        self.relay.linked(self.link)
        await self.sent(CongestionWindow.START_BYTES // 60_000)
        while self.left():
            await self.until(lambda: self.link.waiting or not self.left(), "more pushes")
            self.link.accept()
        self.assertEqual(len(self.link.pushes), count)
        # The window has grown with every reply, up to its limit of 2 MiB.
        self.assertIn(self.link.most, range(15, CongestionWindow.MOST_BYTES // 60_000 + 1))

    async def test_window_rows(self) -> None:
        """The window in rows can be set at any time, and is in force from the next claim on."""
        self.put(600)
        self.relay.window_rows = 3
        self.relay.linked(self.link)
        await self.sent(3)
        self.relay.window_rows = 520
        await self.sent(520)
        self.relay.window_rows = 1
        self.link.accept(*list(self.link.waiting)[:-1])
        await self.until(lambda: len(self.left()) == 81, "519 settled")
        self.assertEqual(len(self.link.pushes), 520)
        self.link.accept()
        await self.sent(1)

    def test_half_of_a_links_window(self) -> None:
        """The relay's window uses at most half of the link's window."""
        self.assertEqual(
            (number("relay.window") * 2, CongestionWindow.MOST_BYTES * 2),
            (Bounds().window_frames, Bounds().window_bytes),
        )

    async def test_the_link_is_lost(self) -> None:
        """Rows that were in flight on a lost link are sent again over the next link, under the same keys."""
        keys = self.put(600)
        self.relay.linked(self.link)
        await self.sent(number("relay.window"))
        self.relay.linked(None)
        self.link.refuse(LinkLost("gone"))
        self.link = _Link()
        self.relay.linked(self.link)
        while self.left():
            await self.until(lambda: self.link.waiting or not self.left(), "more pushes")
            self.link.accept()
        self.assertEqual(sorted(self.link.keys), sorted(keys))
        self.assertEqual(self.relay.retried, number("relay.window"))

    async def test_a_link_that_fails_at_once(self) -> None:
        """A link on which every call fails at once causes no endless loop."""
        dead: Any = _Link()
        dead.call = lambda *_: fail(LinkLost("gone"))
        self.put(50)
        self.relay.linked(dead)
        await self.until(lambda: self.relay.retried >= 50, "all tried")
        self.assertEqual(len(self.left()), 50)
        self.relay.linked(self.link)
        await self.sent(50)
        self.link.accept()
        await self.empty()

    async def test_a_link_that_is_closing(self) -> None:
        """While its link is closing the relay claims nothing, and other relays can claim its unsent rows at once."""
        self.put(100, "x" * 10_000)
        self.relay.linked(self.link)
        await self.until(lambda: self.link.waiting, "some in flight")
        self.link.close()
        sent = len(self.link.pushes)
        free = "select count(*)::int from s2s.outbox where send_at <= now() and attempts = 0"
        await self.until(lambda: self.execute(free) == [(100 - sent,)], "the rest given back")
        other, other_link = self.make_relay(), _Link()
        other.linked(other_link)  # type: ignore[arg-type]
        await poll(lambda: other_link.waiting, "another relay sends them", timeout=0.9)
        self.assertEqual(len(self.link.pushes), sent)
        other_link.close()

    async def test_flush(self) -> None:
        """A flush ends when every due row is sent and settled; rows that are added meanwhile are sent too."""
        self.put(600)
        self.relay.linked(self.link)
        await self.sent(number("relay.window"))
        flushing = self.relay.flush()
        self.put(1, since=600)
        self.link.refuse(Refused("overloaded", "m", {"retry_after_ms": 30_000}), "k0")
        while not flushing.called:
            self.link.accept()
            await poll(lambda: self.link.waiting or flushing.called, "more pushes, or the end")
        await flushing
        self.assertEqual(self.left(), [("k0", "waiting", "overloaded")])

    async def test_stop(self) -> None:
        """A stop ends when the rows in flight are settled, sends no more, and leaves the rest for the next start."""
        self.put(number("relay.window") + 100)
        self.relay.linked(self.link)
        await self.sent(number("relay.window"))
        stopping = self.relay.stop()
        self.link.accept("k0", "k1")
        self.assertNoResult(stopping)
        self.link.refuse(DeadlinePassed("late"))
        await stopping
        self.assertEqual(len(self.link.pushes), number("relay.window"))
        self.assertEqual(len(self.left()), number("relay.window") + 98)
        self.relay.wake()
        other = self.make_relay()
        self.link = _Link()
        self.relay = other
        other.linked(self.link)
        await self.sent(number("relay.window"))
        self.link.accept()

    async def test_two_relays(self) -> None:
        """Two relays on one outbox share the rows, and no row is in flight on both."""
        keys = self.put(300)
        other, other_link = self.make_relay(), _Link()
        self.relay.linked(self.link)
        other.linked(other_link)  # type: ignore[arg-type]
        await poll(lambda: len(self.link.waiting) + len(other_link.waiting) == 300, "all in flight")
        self.assertEqual(sorted(self.link.keys + other_link.keys), sorted(keys))
        self.link.accept()
        other_link.accept()
        await self.empty()


class _Database:
    """A database whose transactions the test ends.

    :ivar under_way: ``(name of the function, Deferred)`` of each transaction in progress.
    :ivar limits: the number of rows that each claim has asked for.
    :ivar settlements: the settlement of each transaction that settles.
    """

    def __init__(self) -> None:
        self.limits: list[int] = []
        self.settlements: list[Settlement] = []
        self.under_way: list[tuple[str, Deferred[Any]]] = []
        self.began: list[str] = []

    def run(self, function: Any, *args: Any) -> Deferred[Any]:
        """Begin a transaction."""
        self.began.append(function.__name__)
        if function.__name__ == "claim":
            self.limits.append(args[0])
        if function.__name__ == "settle":
            self.settlements.append(function.__self__)
        self.under_way.append((function.__name__, Deferred()))
        return self.under_way[-1][1]

    def end(self, name: str, result: Any) -> None:
        """End the oldest transaction of this function."""
        at = next(at for at, (each, _) in enumerate(self.under_way) if each == name)
        answer = self.under_way.pop(at)[1]
        if isinstance(result, Exception):
            answer.errback(result)
        else:
            answer.callback(result)


class RelayTimingTests(SynchronousTestCase):
    """:class:`Relay` and its database, step by step."""

    def setUp(self) -> None:
        """Start a relay with a link; its first claim is in progress."""
        self.time = FakeClock()
        self.database = _Database()
        self.relay = Relay(self.database, Clock(self.time), rng=lambda: 0.0)  # type: ignore[arg-type]
        self.link: Any = _Link()
        self.relay.start()
        self.relay.linked(self.link)

    def claims(self) -> int:
        """Return the number of claims in progress."""
        return [name for name, _ in self.database.under_way].count("claim")

    def rows(self, *keys: str) -> list[OutboxRow]:
        """Create rows as a claim returns them."""
        return [OutboxRow(at, "a.b", key, {}, 100, None, 0) for at, key in enumerate(keys, 1)]

    def test_one_claim_at_a_time(self) -> None:
        """Despite wakes, polls and failed counts, only one claim is in progress at a time."""
        self.assertEqual(self.claims(), 1)
        for _ in range(5):
            self.relay.wake()
        self.time.advance(1)
        self.database.end("depth", DatabaseUnavailable("away"))
        self.relay.wake()
        self.assertEqual(self.claims(), 1)

    def test_a_wake_during_a_claim(self) -> None:
        """A row committed after the query of a claim leads to another claim at once, and not at the next poll."""
        self.relay.wake()
        self.database.end("claim", [])
        self.assertEqual(self.claims(), 1)

    def test_the_poll_survives_a_slow_claim(self) -> None:
        """A claim that lasts longer than the poll interval does not end the polling."""
        self.time.advance(1)
        self.database.end("depth", 3)
        self.time.advance(5)
        self.database.end("claim", [])
        if self.claims():
            self.database.end("claim", [])
        for _ in range(3):
            began = self.database.began.count("claim")
            self.time.advance(1.1)
            self.assertGreater(self.database.began.count("claim"), began)
            while self.claims():
                self.database.end("claim", [])

    def test_the_database_is_away(self) -> None:
        """While the database is away a claim is tried at every poll, and the relay goes on when it is back."""
        for _ in range(5):
            while self.claims():
                self.database.end("claim", DatabaseUnavailable("away"))
            self.time.advance(1.1)
        self.assertEqual(self.claims(), 1)
        self.database.end("claim", self.rows("k1"))
        self.assertEqual(self.link.keys, ["k1"])

    def test_settled_in_groups(self) -> None:
        """Rows that are answered during a settlement are settled together by the next one."""
        self.database.end("claim", self.rows("k1", "k2", "k3"))
        self.link.accept("k1")
        self.link.accept("k2")
        self.link.refuse(Refused("overloaded", "m", {}), "k3")
        self.assertEqual(self.database.began.count("settle"), 1)
        self.database.end("settle", None)
        self.assertEqual(self.database.began.count("settle"), 2)
        self.database.end("settle", None)
        self.assertEqual(self.database.began.count("settle"), 2)

    def test_a_settlement_that_fails(self) -> None:
        """Rows that could not be settled are released: their lease ends, and they are claimed and sent again."""
        self.database.end("claim", self.rows("k1"))
        self.link.accept("k1")
        self.database.end("settle", DatabaseUnavailable("away"))
        self.time.advance(relay.LEASE_S + 1)
        while self.claims():
            self.database.end("claim", self.rows("k1"))
            self.time.advance(1.1)
            if len(self.link.keys) == 2:
                break
        self.assertEqual(self.link.keys, ["k1", "k1"])

    def test_claimed_without_a_link(self) -> None:
        """Rows whose claim ends after the link is lost are given back at once."""
        self.relay.linked(None)
        self.database.end("claim", self.rows("k1", "k2"))
        self.assertEqual((self.link.keys, self.database.began.count("settle")), ([], 1))

    def test_stop_with_nothing_under_way(self) -> None:
        """An idle relay stops at once, and leaves no timer."""
        self.database.end("claim", [])
        while self.claims():
            self.database.end("claim", [])
        self.successResultOf(self.relay.stop())
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_stop_during_a_claim(self) -> None:
        """Rows that a last claim returns after the stop are given back and not sent, and then the stop ends."""
        stopping = self.relay.stop()
        self.assertNoResult(stopping)
        self.database.end("claim", self.rows("k1"))
        self.assertNoResult(stopping)
        self.database.end("settle", None)
        self.successResultOf(stopping)
        self.assertEqual((self.link.keys, self.time.getDelayedCalls()), ([], []))

    def test_stop_with_the_database_away(self) -> None:
        """The stop ends even if the last settlement fails."""
        self.database.end("claim", self.rows("k1"))
        stopping = self.relay.stop()
        self.link.accept()
        self.database.end("settle", DatabaseUnavailable("away"))
        self.successResultOf(stopping)

    def test_stop_during_a_claim_that_fails(self) -> None:
        """The stop ends if the last claim fails: an engine must not hang because its database is away."""
        stopping = self.relay.stop()
        self.database.end("claim", DatabaseUnavailable("away"))
        self.successResultOf(stopping)

    def test_claims_what_will_soon_be_sent(self) -> None:
        """Once the relay knows the size of rows, it leases hardly more rows than the window takes."""
        large = [OutboxRow(at, "a.b", f"k{at}", {"text": "x" * 60_000}, 100, None, 0) for at in range(4)]
        self.database.end("claim", large)
        self.relay.wake()
        soon = 2 * CongestionWindow.START_BYTES // 60_000
        self.assertEqual(self.database.limits[0], 256)
        self.assertIn(self.database.limits[1], range(soon - 1, soon + 2))
        self.database.end("claim", self.rows("small"))
        self.link.accept()
        self.database.end("settle", None)
        self.relay.wake()
        self.assertEqual(self.database.limits[2], 256)

    # --- leases ---------------------------------------------------------------------------------------------------

    def pass_s(self, seconds: int) -> None:
        """Let time pass; the database answers at once, and a claim finds no row."""
        for _ in range(seconds * 10):
            self.time.advance(0.1)
            for name, answer in (("claim", []), ("depth", 0), ("settle", None)):
                while name in [each for each, _ in self.database.under_way]:
                    self.database.end(name, answer)

    def test_leases_are_renewed(self) -> None:
        """As long as a row is in flight its lease is renewed before it ends, and no longer."""
        self.database.end("claim", self.rows("k1", "k2"))
        leased_at, renewals = self.time.seconds(), 0
        for _ in range(15):
            self.pass_s(1)
            for settlement in self.database.settlements[renewals:]:
                renewals += 1
                self.assertEqual(settlement, Settlement(renewed=[1, 2]))
                self.assertLess(self.time.seconds() - leased_at, relay.LEASE_S - relay.POLL_S)
                leased_at = self.time.seconds()
        self.assertGreaterEqual(renewals, 5)
        self.link.accept()
        self.pass_s(1)
        settled = len(self.database.settlements)
        self.pass_s(10)
        self.assertEqual(self.database.settlements[settled:], [])

    def test_quick_answers_need_no_renewal(self) -> None:
        """A row that is answered soon needs no renewal, so a full window at full speed needs none."""
        self.database.end("claim", self.rows("k1"))
        self.pass_s(1)
        self.link.accept()
        self.pass_s(5)
        self.assertEqual(self.database.settlements, [Settlement(accepted=[1])])

    def test_no_lease_after_a_settlement(self) -> None:
        """A row that was answered before its renewal is not leased again, which would undo its pause."""
        self.database.end("claim", self.rows("k1", "k2"))
        self.link.refuse(Refused("overloaded", "m", {"retry_after_ms": 30_000}), "k1")
        self.time.advance(1.1)
        self.time.advance(1.1)
        self.database.end("settle", None)
        self.assertEqual(
            self.database.settlements,
            [Settlement(retries=[(1, 30.0, "overloaded", "overloaded: m")]), Settlement(renewed=[2])],
        )

    # --- flush and stop -------------------------------------------------------------------------------------------

    def test_flush_without_a_link(self) -> None:
        """Without a link, or with a closing one, a flush ends at once."""
        self.database.end("claim", [])
        self.link.close()
        self.successResultOf(self.relay.flush())
        self.relay.linked(None)
        self.successResultOf(self.relay.flush())

    def test_flush_looks_again(self) -> None:
        """Neither a claim that began before the flush nor one that found a row ends the flush."""
        flushing = self.relay.flush()
        self.database.end("claim", [])
        self.assertNoResult(flushing)
        self.database.end("claim", self.rows("k1"))
        self.database.end("claim", [])
        self.assertNoResult(flushing)
        self.link.accept()
        self.assertNoResult(flushing)
        self.database.end("settle", None)
        self.successResultOf(flushing)

    def test_flush_with_the_database_away(self) -> None:
        """A failed claim does not end a flush, which goes on with the polls."""
        flushing = self.relay.flush()
        self.database.end("claim", DatabaseUnavailable("away"))
        self.assertNoResult(flushing)
        self.pass_s(2)
        self.successResultOf(flushing)

    def test_the_link_closes_during_a_flush(self) -> None:
        """A flush ends with its link, and the rows in flight stay in the outbox."""
        self.database.end("claim", self.rows("k1"))
        flushing = self.relay.flush()
        self.database.end("claim", [])
        self.link.close()
        self.assertNoResult(flushing)
        self.database.end("settle", None)
        self.successResultOf(flushing)

    def test_stop_during_a_flush(self) -> None:
        """A stop during a flush claims no more, and both end with the rows in flight."""
        flushing = self.relay.flush()
        self.database.end("claim", self.rows("k1"))
        stopping = self.relay.stop()
        self.database.end("claim", [])
        self.link.accept()
        self.assertNoResult(stopping)
        self.database.end("settle", None)
        self.successResultOf(stopping)
        self.successResultOf(flushing)
        self.assertEqual((self.claims(), self.time.getDelayedCalls()), (0, []))

    def test_stop_gives_up(self) -> None:
        """A stop waits a few seconds for replies; a later reply is dropped."""
        self.database.end("claim", self.rows("k1"))
        stopping = self.relay.stop(patience_s=3.0)
        self.time.advance(2.9)
        self.assertNoResult(stopping)
        self.time.advance(0.2)
        self.database.end("settle", None)
        self.successResultOf(stopping)
        why = (DeadlineExceeded.code, "it was given up before it was answered")
        self.assertEqual(self.database.settlements, [Settlement(retries=[(1, 0.1, *why)])])
        self.link.accept()
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_pauses(self) -> None:
        """The pause of a row grows with its attempts, also if the peer asks for 0 ms."""
        for error in (LinkLost("gone"), Refused("overloaded", "m", {"retry_after_ms": 0})):
            self.setUp()
            self.relay._rng = lambda: 1.0
            rows = [replace(row, attempts=at) for row, at in zip(self.rows("k1", "k2", "k3"), (0, 3, 100), strict=True)]
            self.database.end("claim", rows)
            self.link.refuse(error)
            while self.database.under_way and len(self.pauses()) < len(rows):
                self.database.end("settle", None)
            self.assertEqual(sorted(self.pauses()), [0.2, 1.6, 5.0])

    def test_pauses_of_an_internal_error(self) -> None:
        """The pause of a row with internal errors grows up to a minute, and the row never becomes dead."""
        self.relay._rng = lambda: 1.0
        rows = [replace(row, attempts=at) for row, at in zip(self.rows("k1", "k2", "k3"), (0, 6, 100_000), strict=True)]
        self.database.end("claim", rows)
        self.link.refuse(Refused("internal_error", "m", {"retryable": True}))
        while self.database.under_way and len(self.pauses()) < len(rows):
            self.database.end("settle", None)
        self.assertEqual(sorted(self.pauses()), [0.2, 12.8, 60.0])
        self.assertEqual(self.relay.dead, 0)

    def pauses(self) -> list[float]:
        """Return the pauses of the rows that are settled as to be sent again."""
        return [pause for settlement in self.database.settlements for _, pause, *_ in settlement.retries]

    def test_what_is_sent_again_is_told(self) -> None:
        """A row sent again for a lasting cause has a line with the cause; many rows share one line a minute."""
        self.database.end("claim", self.rows(*(f"k{number}" for number in range(100))))
        with capturedLogs() as logs:
            self.link.refuse(DeadlinePassed("s2s.command.push was not answered in time"), *list(self.link.waiting)[:50])
            self.link.refuse(Refused("teapot", "no", {"retryable": True}), *list(self.link.waiting)[:10])
            self.link.refuse(Refused("overloaded", "later", {"retry_after_ms": 30_000}))
            self.time.advance(PERIOD_S)
        lines = [formatEvent(event) for event in logs]
        row = "outbox row 1 is sent again: s2s.command.push was not answered in time: see s2s outbox show 1"
        self.assertEqual(lines[0], row)
        self.assertIn("teapot: no", lines[TOLD])
        self.assertEqual([line for line in lines if "overloaded" in line], [])
        self.assertEqual(
            lines[TOLD + 1 :],
            ["47 more outbox rows are sent again: 'deadline_exceeded'", "9 more outbox rows are sent again: 'teapot'"],
        )
