"""The link without I/O: its states, its checks of requests, its pending requests and its timers."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import Forbidden, NotReady, Overloaded, Replay, TsSkew, UnsupportedType, WireError
from s2s.protocol import session
from s2s.protocol.catalogue import BY_NAME
from s2s.protocol.envelope import Envelope, other
from s2s.protocol.limits import Bounds, Timing
from s2s.protocol.replay import ReplayCache
from s2s.protocol.session import TRANSITIONS, Event, Session, State
from s2s.protocol.signing import Key, Role, Secret
from s2s.protocol.window import Call

_NOW = 1_737_990_000
_KEY = Key("k1", Secret(bytes(32)), "any", 0.0)
_PUSH, _SWEEP, _CHECK = BY_NAME["s2s.command.push"], BY_NAME["s2s.broadcast.sweep"], BY_NAME["s2s.health.check"]
_SERVED = {
    "server": ("s2s.health.check", "s2s.command.push"),
    "engine": ("s2s.health.check", "s2s.broadcast.sweep", "s2s.engine.pause"),
}


def _session(role: Role = "engine", *, bounds: Bounds = Bounds(), capacity: int = 1000) -> Session:  # noqa: B008 - frozen
    return Session(role, ReplayCache(0.0, 300.0, capacity), Timing(), bounds, 0.0)


def _request(type: str, role: Role = "engine", **changes: Any) -> Envelope:
    """Return a request to ``role``."""
    said = {"id": "i1", "ts": _NOW, "src": other(role), "dst": role, "type": type, "payload": {}}
    return Envelope(**{**said, **changes})


def _call(message: Any = _PUSH, size: int = 100, deadline: float = 3.0) -> Call:
    return Call(message, b"{}", size, deadline, None)


def _proven(**more: Any) -> Session:
    made = _session(**more)
    made.heard("k1", 0.0)
    made.prove(_NOW)
    return made


class StateTests(SynchronousTestCase):
    """The table of transitions."""

    def test_every_transition(self) -> None:
        """Every state answers every event as the table defines, and an event that is not in it changes nothing."""
        for state in State:
            for event in Event:
                each = _session()
                each.state = state
                with self.subTest(state=state, event=event):
                    target = TRANSITIONS.get((state, event))
                    self.assertEqual(each.move(event), target is not None)
                    self.assertIs(each.state, target or state)

    def test_the_table(self) -> None:
        """The table has these rows and no others."""
        c, p, closing, closed = State.CHALLENGING, State.PROVEN, State.CLOSING, State.CLOSED
        expected = {(c, Event.PROOF): p}
        expected |= {(each, Event.CLOSE): closing for each in (c, p)}
        expected |= {(each, Event.LOST): closed for each in (c, p, closing)}
        self.assertEqual(TRANSITIONS, expected)

    @settings(max_examples=100)
    @given(st.lists(st.sampled_from(Event), max_size=8))
    def test_the_dead_stay_dead(self, events: list[Event]) -> None:
        """A lost link stays closed after any event, and a closing link never opens again."""
        each, was_closing, was_lost = _session(), False, False
        for event in events:
            each.move(event)
            was_lost |= event is Event.LOST
            was_closing |= event is Event.CLOSE
            if was_lost:
                self.assertIs(each.state, State.CLOSED)
            if was_closing:
                self.assertFalse(each.is_open)

    def test_open(self) -> None:
        """A link is open before and after its proof, and not when it closes."""
        each = _session()
        seen = [each.is_open]
        for event in (Event.PROOF, Event.CLOSE, Event.LOST):
            each.move(event)
            seen.append(each.is_open)
        self.assertEqual(seen, [True, True, False, False])

    def test_proof_comes_once(self) -> None:
        """The first answer proves the link; a later one neither proves it again nor changes the proof's ts."""
        each = _session()
        self.assertTrue(each.prove(_NOW))
        self.assertFalse(each.prove(_NOW + 100))
        each.admit(_request("s2s.broadcast.sweep"), _KEY, _SERVED["engine"], _NOW, 0.0)

    def test_a_closing_link_cannot_be_proven(self) -> None:
        """An answer that comes while the link closes proves nothing."""
        each = _session()
        each.move(Event.CLOSE)
        self.assertFalse(each.prove(_NOW))

    def test_stamps_never_go_back(self) -> None:
        """The ts of our frames follows the clock forward and stays the same when the clock steps back."""
        each = _session()
        self.assertEqual([each.stamp(now) for now in (5.9, 7.0, 3.0, 7.5, 8.0)], [5, 7, 7, 7, 8])


class AdmissionTests(SynchronousTestCase):
    """The checks of a request, and their order."""

    def admit(self, to: Session, request: Envelope, now: float = _NOW, mono: float = 0.0) -> Any:
        """Return the message type, or the code of the refusal."""
        try:
            return to.admit(request, _KEY, _SERVED[to.role], now, mono)
        except WireError as error:
            return error.code

    def test_ways(self) -> None:
        """Only the other role may send, only to us, and only with a key that may sign for it."""
        server, engine_key = _session("server"), Key("k", Secret(bytes(32)), "engine", 0.0)
        server.check_way(_request("t", "server"), engine_key)
        for wrong, path in (
            ({"src": "server", "dst": "engine"}, "/src"),
            ({"src": "server"}, "/src"),
            ({"dst": "engine"}, "/dst"),
            ({"src": "moon"}, "/src"),
            ({"dst": ""}, "/dst"),
        ):
            error = self.assertRaises(Forbidden, server.check_way, _request("t", "server", **wrong), _KEY)
            self.assertEqual(error.details["path"], path)
            self.assertTrue(error.closes)
        error = self.assertRaises(Forbidden, _session("engine").check_way, _request("t", "engine"), engine_key)
        self.assertEqual(error.details["path"], "/auth/key_id")

    def test_freshness_at_the_bounds(self) -> None:
        """Clocks 300 s apart pass and 301 s apart do not, in either direction and at every fraction of a second."""
        for fraction in (0.0, 0.4, 0.999):
            for skew, passes in ((-301, False), (-300, True), (0, True), (300, True), (301, False)):
                with self.subTest(skew=skew, fraction=fraction):
                    request = _request("s2s.command.push", "server", ts=_NOW - skew)
                    outcome = self.admit(_session("server"), request, now=_NOW + fraction)
                    self.assertEqual(outcome, _PUSH if passes else "ts_skew")

    def test_what_a_skew_says(self) -> None:
        """A refusal for skew holds our clock in seconds, the difference to ts and the window, and does not close."""
        for now, ts in ((_NOW, _NOW - 301), (_NOW + 0.7, _NOW + 302), (_NOW + 0.7, _NOW - 400)):
            request = _request("s2s.command.push", "server", ts=ts)
            error = self.assertRaises(TsSkew, _session("server").admit, request, _KEY, _SERVED["server"], now, 0.0)
            expected = {"path": "/ts", "server_ts": _NOW, "skew_s": _NOW - ts, "max_skew_s": 300}
            self.assertEqual(error.details, expected)
            self.assertFalse(error.closes)

    def test_third_skew_in_a_row(self) -> None:
        """The third refusal in a row closes the link; a fresh request in between resets the count."""

        def closes(each: Session, *skews: int) -> list[bool | None]:
            outcome: list[bool | None] = []
            for at, skew in enumerate(skews):
                try:
                    request = _request("s2s.command.push", "server", id=f"i{at}", ts=_NOW - skew)
                    each.admit(request, _KEY, _SERVED["server"], _NOW, 0.0)
                    outcome.append(None)
                except TsSkew as error:
                    outcome.append(error.closes)
            return outcome

        self.assertEqual(closes(_session("server"), 301, -301, 999), [False, False, True])
        self.assertEqual(
            closes(_session("server"), 301, 301, 0, 301, 301, 301), [False, False, None, False, False, True]
        )

    def test_replay(self) -> None:
        """A request seen before is refused, on this link or on another of the process."""
        first = _proven()
        second = Session("engine", first._replay, Timing(), Bounds(), 0.0)
        second.prove(_NOW)
        sweep = _request("s2s.broadcast.sweep")
        self.assertIs(self.admit(first, sweep), _SWEEP)
        self.assertEqual([self.admit(first, sweep), self.admit(second, sweep)], ["replay", "replay"])

    def test_replay_as_long_as_it_is_fresh(self) -> None:
        """A repeated request is refused at every moment of its window, and as stale just after it."""
        for ahead in (300, 0, -300):
            for later in (1, 299, 300, 301, 599, 600):
                each = _proven()
                check = _request("s2s.health.check", ts=_NOW + ahead)
                self.assertIs(self.admit(each, check), _CHECK)
                outcome = self.admit(each, check, now=_NOW + later, mono=float(later))
                with self.subTest(ahead=ahead, later=later):
                    self.assertEqual(outcome, "replay" if later - ahead <= 300 else "ts_skew")

    @settings(max_examples=300)
    @given(st.integers(-301, 301), st.floats(0, 700), st.floats(0, 650), st.sampled_from([0.0, 0.25, 0.999]))
    @example(300, 0.0, 600.9, 0.0)
    @example(300, 599.9, 600.8, 0.25)
    def test_never_admitted_twice(self, ahead: int, arrival: float, later: float, fraction: float) -> None:
        """Whenever a request arrives and whatever its ts, it is not admitted twice while the clocks agree."""
        each = _proven()
        now = _NOW + fraction + arrival
        check = _request("s2s.health.check", ts=int(now) + ahead)
        if self.admit(each, check, now, arrival) is _CHECK:
            self.assertIn(self.admit(each, check, now + later, arrival + later), ("replay", "ts_skew"))

    def test_pushes_are_not_entered(self) -> None:
        """A push may come twice and takes no room in the cache; its idem_key identifies it."""
        each = _session("server", capacity=1)
        for _ in range(3):
            self.assertIs(self.admit(each, _request("s2s.command.push", "server")), _PUSH)
        self.assertIs(self.admit(each, _request("s2s.health.check", "server")), _CHECK)

    def test_overloaded(self) -> None:
        """With a full cache requests are refused as overloaded, pushes pass, and replays are still detected."""
        each = _session("server", capacity=1)
        self.admit(each, _request("s2s.health.check", "server"))
        self.assertRaises(
            Overloaded, each.admit, _request("s2s.health.check", "server", id="i2"), _KEY, _SERVED["server"], _NOW, 0.0
        )
        self.assertEqual(self.admit(each, _request("s2s.health.check", "server")), "replay")
        self.assertIs(self.admit(each, _request("s2s.command.push", "server")), _PUSH)

    def test_unknown_types_and_wrong_ways(self) -> None:
        """A type that is unknown, reply-only, for the other role or not served is refused with the served types."""
        for role, types in (
            ("server", ("moon.landing", "s2s.broadcast.sweep", "s2s.engine.pause", "", "s2s.ack")),
            ("engine", ("s2s.command.push", "s2s.config.bump", "s2s.error")),
        ):
            for type in types:
                each = _proven(role=role)
                error = self.assertRaises(
                    UnsupportedType, each.admit, _request(type, role), _KEY, _SERVED[role], _NOW, 0.0
                )
                self.assertEqual(error.details, {"path": "/type", "supported": sorted(_SERVED[role])})

    def test_unknown_types_are_entered(self) -> None:
        """The replay check comes before the type check: an unknown type sent twice is a replay."""
        each = _session("server")
        request = _request("moon.landing", "server")
        self.assertEqual([self.admit(each, request), self.admit(each, request)], ["unsupported_type", "replay"])

    def test_not_ready_before_the_proof(self) -> None:
        """Before the proof every control request is not_ready with a retry pause, and health checks pass."""
        each = _session()
        error = self.assertRaises(
            NotReady, each.admit, _request("s2s.broadcast.sweep"), _KEY, _SERVED["engine"], _NOW, 0.0
        )
        self.assertEqual(error.details, {"retry_after_ms": 100})
        self.assertEqual(self.admit(each, _request("s2s.engine.pause", id="i2")), "not_ready")
        self.assertIs(self.admit(each, _request("s2s.health.check", id="i3")), _CHECK)

    def test_older_than_the_proof(self) -> None:
        """A control request older than the proof's ts is a replay and an equal ts passes; a health check may be old."""
        each = _session()
        each.prove(_NOW)
        error = self.assertRaises(
            Replay, each.admit, _request("s2s.broadcast.sweep", ts=_NOW - 1), _KEY, _SERVED["engine"], _NOW, 0.0
        )
        self.assertEqual(error.details["path"], "/ts")
        self.assertTrue(error.closes)
        self.assertIs(self.admit(each, _request("s2s.broadcast.sweep", id="i2", ts=_NOW)), _SWEEP)
        self.assertIs(self.admit(each, _request("s2s.health.check", id="i3", ts=_NOW - 1)), _CHECK)

    def test_pushes_need_no_proof(self) -> None:
        """A server accepts pushes before its own challenge is answered, and pushes that are older than the proof."""
        each = _session("server")
        self.assertIs(self.admit(each, _request("s2s.command.push", "server")), _PUSH)
        each.prove(_NOW + 50)
        self.assertIs(self.admit(each, _request("s2s.command.push", "server")), _PUSH)

    def test_order_of_checks(self) -> None:
        """Of several faults the first in the protocol's order is named: ts, replay, type, proof."""
        each = _session()
        faulty = _request("moon.landing", ts=_NOW - 301)
        self.assertEqual(self.admit(each, faulty), "ts_skew")
        # The request was not entered at that time.
        self.assertEqual(self.admit(each, _request("moon.landing")), "unsupported_type")
        self.assertEqual(self.admit(each, _request("s2s.broadcast.sweep")), "replay")
        self.assertEqual(self.admit(each, _request("s2s.broadcast.sweep", id="i2")), "not_ready")


class PendingRequestTests(SynchronousTestCase):
    """Requests that wait for our answer."""

    def test_bounds(self) -> None:
        """Reading stops at 1024 requests or 8 MiB, and not before."""
        by_number, by_bytes = _session("server"), _session("server")
        for _ in range(1023):
            by_number.track(_PUSH, "i", 10, 0.0)
        self.assertFalse(by_number.is_saturated)
        by_number.track(_PUSH, "i", 10, 0.0)
        self.assertTrue(by_number.is_saturated)
        pending = by_bytes.track(_PUSH, "i", (8 << 20) - 1, 0.0)
        self.assertFalse(by_bytes.is_saturated)
        by_bytes.track(_PUSH, "i", 1, 0.0)
        self.assertTrue(by_bytes.is_saturated)
        self.assertTrue(by_bytes.untrack(pending))
        self.assertFalse(by_bytes.is_saturated)

    def test_answered_once(self) -> None:
        """A request is untracked once, its second answer finds nothing, and an equal request is a separate one."""
        each = _session()
        pending = [each.track(_PUSH, "i", 10, 0.0) for _ in range(3)]
        self.assertEqual(each.pending, 3)
        self.assertEqual([each.untrack(one) for one in (*pending, *pending)], [True] * 3 + [False] * 3)
        self.assertEqual(each.pending, 0)

    def test_late_ones(self) -> None:
        """Requests that have waited for 10 s are returned, the first to arrive first."""
        each = _session()
        first, second = each.track(_PUSH, "a", 1, 0.0), each.track(_PUSH, "b", 1, 5.0)
        self.assertEqual(each.unanswered(9.9), [])
        self.assertEqual(each.unanswered(10.0), [first])
        self.assertEqual(each.unanswered(15.0), [first, second])
        self.assertEqual((first.message, first.id), (_PUSH, "a"))
        each.untrack(first)
        self.assertEqual(each.unanswered(15.0), [second])
        self.assertEqual(each.next_timer(), 5.0)
        each.prove(_NOW)
        self.assertLessEqual(each.next_timer(), 15.0)


class TimerTests(SynchronousTestCase):
    """The deadlines of a link."""

    def test_no_proof(self) -> None:
        """Without an answer to our challenge in 5 s the link is overdue; the reason tells if a valid frame came."""
        silent, heard = _session(), _session()
        heard.heard("k1", 1.0)
        self.assertEqual(silent.next_timer(), 5.0)
        self.assertIsNone(silent.overdue(4.999))
        self.assertEqual(silent.overdue(5.0), ("proof", "no valid frame came"))
        self.assertEqual(heard.overdue(5.0), ("proof", "our health check was not answered"))

    def test_half_a_frame(self) -> None:
        """A frame must be complete within 10 s of its first byte, however many bytes come in between."""
        each = _proven()
        each.partial(1.0, is_partial=True, is_new=False)
        each.partial(9.0, is_partial=True, is_new=False)
        self.assertIsNone(each.overdue(10.999))
        self.assertEqual(each.overdue(11.0), ("frame", "a frame took too long to come whole"))
        each.partial(11.0, is_partial=False, is_new=True)
        self.assertIsNone(each.overdue(99.0))

    def test_the_next_half_frame_has_its_own_time(self) -> None:
        """A chunk that ends one frame and begins another starts the frame timer of the other."""
        each = _proven()
        each.partial(1.0, is_partial=True, is_new=False)
        each.partial(9.0, is_partial=True, is_new=True)
        self.assertIsNone(each.overdue(18.9))
        self.assertIsNotNone(each.overdue(19.0))

    def test_silence(self) -> None:
        """After 10 s without a frame one check is wanted, and no second one until a valid frame comes."""
        each = _proven()
        each.heard("k1", 2.0)
        self.assertEqual(each.next_timer(), 12.0)
        self.assertFalse(each.wants_check(11.999))
        self.assertTrue(each.wants_check(12.0))
        self.assertFalse(each.wants_check(22.0))
        self.assertEqual(each.next_timer(), math.inf)
        each.heard("k1", 23.0)
        self.assertFalse(each.wants_check(32.9))
        self.assertTrue(each.wants_check(33.0))

    def test_no_checks_before_the_proof(self) -> None:
        """Before the proof the challenge serves as the check, and a closing link sends no check."""
        each = _session()
        self.assertFalse(each.wants_check(99.0))
        each.prove(_NOW)
        each.move(Event.CLOSE)
        self.assertFalse(each.wants_check(99.0))

    def test_three_misses(self) -> None:
        """The third unanswered check in a row closes the link; any valid frame resets the count."""
        each = _proven()
        self.assertTrue(each.wants_check(10.0))
        self.assertEqual([each.missed(), each.missed()], [False, False])
        each.heard("k1", 17.0)
        self.assertTrue(each.wants_check(27.0))
        self.assertEqual([each.missed(), each.missed(), each.missed()], [False, False, True])

    def test_paused_time_is_not_counted(self) -> None:
        """While reading is paused, neither silence nor a partial frame nor an unanswered check counts."""
        each = _proven()
        each.partial(0.0, is_partial=True, is_new=True)
        each.paused(1.0, True)
        self.assertFalse(each.wants_check(50.0))
        self.assertIsNone(each.overdue(50.0))
        self.assertEqual([each.missed() for _ in range(5)], [False] * 5)
        self.assertEqual(each.next_timer(), math.inf)
        each.paused(60.0, False)
        self.assertFalse(each.wants_check(69.9))
        self.assertIsNone(each.overdue(69.9))
        self.assertTrue(each.wants_check(70.0))
        self.assertIsNotNone(each.overdue(70.0))

    def test_max_frame(self) -> None:
        """The smaller limit of both sides applies, and a peer that announces none accepts 65536 bytes."""
        large = _session(bounds=Bounds(frame_size=262144))
        self.assertEqual(large.max_frame, 65536)
        large.announce(100_000)
        self.assertEqual(large.max_frame, 100_000)
        self.assertEqual(_session(bounds=Bounds(frame_size=4096)).max_frame, 4096)

    def test_deadlines_run_while_paused(self) -> None:
        """While reading is paused, the deadlines of our calls and of the pending requests still run."""
        each = _proven()
        each.track(_PUSH, "a", 1, 0.0)
        each.paused(0.0, True)
        self.assertEqual(each.next_timer(), 10.0)
        call = _call(deadline=3.0)
        each.calls.offer(call)
        each.calls.sent(call, "m")
        self.assertEqual(each.next_timer(), 3.0)

    def test_unsigned_errors(self) -> None:
        """The second unsigned error reaches the bound."""
        each = _session()
        self.assertEqual([each.unsigned_error(), each.unsigned_error()], [False, True])

    def test_whom_we_heard(self) -> None:
        """The session records the key that the peer last signed with, and whether a valid frame has come."""
        each = _session()
        self.assertEqual((each.has_been_heard, each.peer_key_id), (False, None))
        each.heard("k1", 0.0)
        each.heard("k2", 1.0)
        self.assertEqual((each.has_been_heard, each.peer_key_id), (True, "k2"))


class DefaultTests(SynchronousTestCase):
    """The protocol's default numbers."""

    def test_timing(self) -> None:
        """Every timeout equals that of the protocol's table."""
        self.assertEqual(Timing(), Timing(5.0, 10.0, 10.0, 3.0, 3, 3.0, 10.0, 2.0))

    def test_bounds(self) -> None:
        """Every bound equals that of the protocol's table."""
        bounds = Bounds()
        self.assertEqual((bounds.frame_size, bounds.window_frames, bounds.window_bytes), (65536, 1024, 4 << 20))
        self.assertEqual((bounds.held_frames, bounds.held_bytes, bounds.write_bytes), (1024, 8 << 20, 16 << 20))
        self.assertEqual((bounds.skews_in_a_row, bounds.unsigned_errors), (3, 2))

    def test_what_is_a_reply(self) -> None:
        """A frame with ack_of or of a reply-only type is a reply; any other is a request."""
        for members, expected in (
            ({"type": "s2s.command.push"}, False),
            ({"type": "s2s.command.push", "ack_of": None}, True),
            ({"type": "s2s.ack"}, True),
            ({"type": "s2s.health.ack"}, True),
            ({"type": "s2s.error"}, True),
            ({"type": ["s2s.ack"]}, False),
            ({}, False),
        ):
            self.assertIs(session.is_reply(members.get("type"), "ack_of" in members), expected)

    def test_what_is_an_unsigned_error(self) -> None:
        """Only an s2s.error that has no auth member is an unsigned error."""
        for members, expected in (
            ({"type": "s2s.error"}, True),
            ({"type": "s2s.error", "ack_of": "a", "payload": 1}, True),
            ({"type": "s2s.error", "auth": None}, False),
            ({"type": "s2s.ack"}, False),
        ):
            self.assertIs(session.is_unsigned_error(members), expected)
