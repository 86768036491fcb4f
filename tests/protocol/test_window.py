"""Our requests: the window, the queue, and deadlines."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import LineFull
from s2s.protocol.catalogue import BY_NAME
from s2s.protocol.limits import Bounds
from s2s.protocol.window import Call, Window

_PUSH, _CHECK = BY_NAME["s2s.command.push"], BY_NAME["s2s.health.check"]


def _call(message: Any = _PUSH, size: int = 100, deadline: float = 3.0) -> Call:
    return Call(message, b"{}", size, deadline, None)


class WindowTests(SynchronousTestCase):
    """:class:`Window`."""

    def send(self, each: Window, call: Call, message_id: str = "m") -> bool:
        """Offer a call, and send it if there is room."""
        if each.offer(call):
            each.sent(call, message_id)
            return True
        return False

    def test_frames(self) -> None:
        """1024 requests are in flight; the next one is queued until one is answered."""
        each = Window(Bounds())
        for at in range(1024):
            self.assertTrue(self.send(each, _call(), f"m{at}"))
        waiting = _call()
        self.assertFalse(self.send(each, waiting))
        self.assertEqual((each.in_flight, each.in_line), (1024, 1))
        self.assertIsNone(each.next_in_line())
        each.settle("m5")
        self.assertIs(each.next_in_line(), waiting)
        self.assertEqual((each.in_flight, each.in_line), (1023, 0))

    def test_bytes(self) -> None:
        """Exactly 4 MiB are in flight, and one byte more is queued."""
        each = Window(Bounds())
        self.assertTrue(self.send(each, _call(size=(4 << 20) - 10), "a"))
        self.assertTrue(self.send(each, _call(size=10), "b"))
        self.assertFalse(self.send(each, _call(size=1), "c"))
        each.settle("b")
        self.assertIsNotNone(each.next_in_line())

    def test_one_frame_always_fits(self) -> None:
        """A frame larger than the whole window is sent when no other request is in flight."""
        each = Window(Bounds(window_bytes=100))
        self.assertTrue(self.send(each, _call(size=101), "a"))
        self.assertFalse(self.send(each, _call(size=1), "b"))
        each.settle("a")
        self.assertIsNotNone(each.next_in_line())

    def test_line_order(self) -> None:
        """The queue is served in order, and no small call overtakes a large one at its head."""
        each = Window(Bounds(window_bytes=100))
        self.send(each, _call(size=60), "a")
        large, small = _call(size=80), _call(size=10)
        self.assertFalse(self.send(each, large))
        self.assertFalse(self.send(each, small))
        self.assertIsNone(each.next_in_line())
        each.settle("a")
        self.assertIs(each.next_in_line(), large)
        each.sent(large, "b")
        self.assertIs(each.next_in_line(), small)

    def test_health_checks_are_outside(self) -> None:
        """A health check is sent with a full window and past the queue, and takes no room."""
        each = Window(Bounds(window_frames=1))
        self.send(each, _call(), "a")
        self.send(each, _call(), "b")
        self.assertTrue(self.send(each, _call(_CHECK), "c"))
        self.assertEqual((each.in_flight, each.in_line), (1, 1))
        self.assertIsNotNone(each.settle("c"))
        self.assertEqual(each.in_flight, 1)

    def test_line_full(self) -> None:
        """The queue has a bound in calls and one in bytes; beyond it a call fails at once and leaves no trace."""
        for bounds in (Bounds(window_frames=1, line_calls=2), Bounds(window_frames=1, line_bytes=200)):
            each = Window(bounds)
            self.send(each, _call(), "a")
            for _ in range(2):
                self.assertFalse(self.send(each, _call()))
            self.assertRaises(LineFull, each.offer, _call())
            self.assertEqual(each.in_line, 2)
            each.settle("a")
            self.assertIsNotNone(each.next_in_line())
            self.assertFalse(each.offer(_call()))

    def test_settle(self) -> None:
        """A reply finds its call once; a reply with another id, or with none, finds no call."""
        each = Window(Bounds())
        call = _call()
        self.send(each, call, "a")
        self.assertEqual([each.settle("b"), each.settle(None)], [None, None])
        self.assertIs(each.settle("a"), call)
        self.assertIsNone(each.settle("a"))
        self.assertEqual(each.in_flight, 0)

    def test_deadline_in_flight(self) -> None:
        """A call in flight ends at its deadline and makes room, and its late reply finds no call."""
        each = Window(Bounds(window_frames=1))
        call, waiting = _call(deadline=3.0), _call(deadline=9.0)
        self.send(each, call, "a")
        self.send(each, waiting)
        self.assertEqual(each.expire(2.999), [])
        self.assertEqual(each.expire(3.0), [call])
        self.assertEqual(each.expire(3.0), [])
        self.assertIsNone(each.settle("a"))
        self.assertIs(each.next_in_line(), waiting)

    def test_deadline_in_line(self) -> None:
        """A queued call whose deadline passes ends there and is never sent."""
        each = Window(Bounds(window_frames=1))
        self.send(each, _call(deadline=9.0), "a")
        early, late = _call(deadline=1.0), _call(deadline=5.0)
        self.send(each, early)
        self.send(each, late)
        self.assertEqual(each.next_deadline, 1.0)
        self.assertEqual(each.expire(1.0), [early])
        each.settle("a")
        self.assertIs(each.next_in_line(), late)
        self.assertIsNone(each.next_in_line())

    def test_the_dead_do_not_fill_the_line(self) -> None:
        """Calls that ended in the queue no longer count against its bound."""
        each = Window(Bounds(window_frames=1, line_calls=2))
        self.send(each, _call(deadline=9.0), "a")
        self.send(each, _call(deadline=9.0))
        self.send(each, _call(deadline=1.0))
        self.assertEqual(len(each.expire(1.0)), 1)
        self.assertFalse(each.offer(_call(deadline=9.0)))

    def test_fail_all(self) -> None:
        """When the link ends, all calls in flight and queued are returned once, except those that have ended."""
        each = Window(Bounds(window_frames=1))
        flying, waiting, ended = _call(deadline=9.0), _call(deadline=9.0), _call(deadline=1.0)
        for call in (flying, waiting, ended):
            self.send(each, call, "a")
        each.expire(1.0)
        self.assertEqual(each.fail_all(), [flying, waiting])
        self.assertEqual(each.fail_all(), [])
        self.assertEqual((each.in_flight, each.in_line, each.expire(99.0)), (0, 0, []))

    def test_any_order_of_events(self) -> None:
        """For any order of offers, replies, expiries and failures the sums are right and every call ends once."""
        run_state_machine_as_test(_Calls, settings=settings(max_examples=60, stateful_step_count=40))


class _Calls(RuleBasedStateMachine):
    """A caller with an independent model of the expected state."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(Bounds(window_frames=3, window_bytes=100, line_calls=5, line_bytes=150))
        self.now = 0.0
        self.number = 0
        self.flying: dict[str, Call] = {}
        self.line: list[Call] = []
        self.ended: list[Call] = []

    @rule(size=st.integers(1, 130), patience=st.floats(0.1, 5), is_check=st.booleans())
    def offer(self, size: int, patience: float, is_check: bool) -> None:
        call = _call(_CHECK if is_check else _PUSH, size, self.now + patience)
        try:
            may_go = self.window.offer(call)
        except LineFull:
            return
        if may_go:
            self.send(call)
        else:
            self.line.append(call)

    def send(self, call: Call) -> None:
        self.number += 1
        self.window.sent(call, f"m{self.number}")
        self.flying[f"m{self.number}"] = call

    @rule(choice=st.integers(0, 10))
    def answer(self, choice: int) -> None:
        if self.flying:
            message_id = sorted(self.flying)[choice % len(self.flying)]
            call = self.flying.pop(message_id)
            assert self.window.settle(message_id) is call
            self.ended.append(call)
        assert self.window.settle("m0") is None

    @rule()
    def serve_line(self) -> None:
        while (call := self.window.next_in_line()) is not None:
            assert call is self.line.pop(0)
            self.send(call)

    @rule(pause=st.floats(0, 3))
    def wait(self, pause: float) -> None:
        self.now += pause
        late = self.window.expire(self.now)
        due = [call for call in (*self.flying.values(), *self.line) if call.deadline <= self.now]
        assert late == due
        self.flying = {name: call for name, call in self.flying.items() if call not in late}
        self.line = [call for call in self.line if call not in late]
        self.ended += late

    @rule()
    def lose(self) -> None:
        assert self.window.fail_all() == [*self.flying.values(), *self.line]
        self.flying.clear()
        self.line.clear()

    @invariant()
    def sums(self) -> None:
        windowed = [call for call in self.flying.values() if call.message.windowed]
        assert self.window.in_flight == len(windowed) <= 3
        assert sum(call.size for call in windowed) <= 100 or len(windowed) == 1
        assert self.window._window_bytes == sum(call.size for call in windowed)
        assert len(self.line) == self.window.in_line
        assert self.window.next_deadline <= min(
            (c.deadline for c in (*self.flying.values(), *self.line)), default=math.inf
        )
