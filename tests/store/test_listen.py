"""The LISTEN connection: its notifications, its reconnects, and the presence lock of this process."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from s2s.roles.server import reaper
from s2s.store import listen
from s2s.store.listen import Listener
from s2s.store.tables.claims import presence_key
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_NAME = "s2s listen"


class ListenerTests(DatabaseTestCase):
    """:class:`Listener` on a real database server."""

    def setUp(self) -> None:
        """Start with no recorded callbacks."""
        super().setUp()
        self.heard: list[str] = []

    def start(self, *channels: str, **options: Any) -> Listener:
        """Start a listener that stops with the test."""
        callbacks = {channel: lambda channel=channel: self.heard.append(channel) for channel in channels}
        listener = Listener(self.url, callbacks, **options)
        listener.start()
        self.addCleanup(listener.stop)
        return listener

    def end_connection(self) -> None:
        """Make the database end the listener's connection."""
        self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s", _NAME)

    async def test_hears(self) -> None:
        """Each callback runs once after the connect, and again only when its own channel is notified."""
        self.start("a", "b")
        await poll(lambda: sorted(self.heard) == ["a", "b"], "the calls after the connect")
        self.execute("notify b")
        await poll(lambda: len(self.heard) == 3, "the notification")
        self.assertEqual(self.heard[2], "b")

    async def test_the_triggers_speak(self) -> None:
        """SQL changes of keys, broadcasts and outbox rows notify their channels."""
        self.start("s2s_keys", "s2s_broadcasts", "s2s_outbox")
        await poll(lambda: len(self.heard) == 3, "the calls after the connect")
        for statement, channel in (
            ("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', 'x', 'any')", "s2s_keys"),
            ("update s2s.s2s_keys set active_to = now()", "s2s_keys"),
            ("delete from s2s.s2s_keys", "s2s_keys"),
            ("truncate s2s.s2s_keys", "s2s_keys"),
            ("insert into s2s.broadcasts (message) values ('x')", "s2s_broadcasts"),
            ("insert into s2s.outbox (cmd_type, idem_key, payload) values ('a', 'k', '{}')", "s2s_outbox"),
        ):
            self.heard.clear()
            self.execute(statement)
            await poll(lambda: self.heard, statement)
            self.assertEqual(self.heard, [channel], statement)

    async def test_no_descriptor(self) -> None:
        """If no file descriptor is free, the listener closes the new connection and keeps trying."""
        left = [OSError("too many open files")] * 2

        def dup(fileno: int, true: Any = os.dup) -> Any:
            if left:
                raise left.pop()
            return true(fileno)

        with mock.patch.object(os, "dup", dup):
            listener = self.start("a", presence="boot-1")
            await poll(lambda: listener.is_present, "the presence lock")
        self.assertEqual(self.heard, ["a"])
        await poll(lambda: len(self.sessions()) == 1, "the end of the others")

    def sessions(self) -> list[Any]:
        """Return the listener's sessions."""
        return self.execute("select pid from pg_stat_activity where application_name = %s", _NAME)

    async def test_heals(self) -> None:
        """After its connection was ended, the listener reconnects, runs each callback, and takes its lock again."""
        listener = self.start("a", presence="boot-1")
        await poll(lambda: listener.is_present, "the presence lock")
        self.heard.clear()
        self.end_connection()
        await poll(lambda: self.heard == ["a"], "the call after the reconnect")
        await poll(lambda: listener.is_present, "the presence lock")
        self.execute("notify a")
        await poll(lambda: self.heard == ["a", "a"], "the notification")

    async def test_goes_on_trying(self) -> None:
        """A failed connect is retried until it succeeds."""
        real = listen._open
        tries: list[int] = []

        def fails_twice(*args: Any) -> Any:
            tries.append(1)
            if len(tries) < 3:
                raise listen.psycopg2.OperationalError("not there")
            return real(*args)

        self.patch(listen, "_open", fails_twice)
        self.start("a")
        await poll(lambda: self.heard == ["a"], "the connect")
        self.assertEqual(len(tries), 3)

    async def test_presence(self) -> None:
        """The presence lock is held until the listener stops, and is free afterwards."""
        listener = self.start("a", presence="boot-1")
        await poll(lambda: listener.is_present, "the presence lock")
        ask = "select pg_try_advisory_lock(%s)"
        self.assertEqual(self.execute(ask, presence_key("boot-1")), [(False,)])
        self.assertEqual(self.execute(ask, presence_key("boot-2")), [(True,)])
        await listener.stop()
        await poll(lambda: self.execute(ask, presence_key("boot-1")) == [(True,)], "the lock to be free")

    async def test_presence_held_by_our_own_dead_connection(self) -> None:
        """A presence lock that another session still holds is requested again until it is free."""
        self.patch(listen, "AGAIN_S", 0.05)
        self.execute("select pg_advisory_lock(%s)", presence_key("boot-1"))
        listener = self.start("a", presence="boot-1")
        await poll(lambda: self.heard == ["a"], "the connect")
        self.assertFalse(listener.is_present)
        self.execute("select pg_advisory_unlock(%s)", presence_key("boot-1"))
        await poll(lambda: listener.is_present, "the presence lock")

    def test_it_is_back_in_time(self) -> None:
        """A lost connection is detected and replaced before a process without its lock counts as dead."""
        self.assertLess(listen.HEARTBEAT_S + listen.ANSWER_S + listen._FIRST_PAUSE_S, reaper.SURE_S)
        self.assertLess(listen._LONGEST_PAUSE_S + listen.AGAIN_S, reaper.SURE_S)

    async def test_silence_is_noticed(self) -> None:
        """A connection that does not answer the heartbeat is closed and replaced."""
        self.patch(listen, "HEARTBEAT_S", 0.05)
        self.patch(listen, "ANSWER_S", 0.1)
        listener = self.start("a")
        await poll(lambda: self.heard == ["a"], "the connect")
        first = listener._conn
        # The database answers, but the listener receives nothing, as with a cut cable.
        reactor.removeReader(listener._socket)
        await poll(lambda: listener._conn is not first, "the drop")
        await poll(lambda: self.heard == ["a", "a"], "the reconnect")

    async def test_a_failing_callback_hurts_nobody(self) -> None:
        """A callback that raises an error is logged, and the other callbacks run."""

        def fails() -> None:
            raise KeyError("mine")

        listener = Listener(self.url, {"a": fails, "b": lambda: self.heard.append("b")})
        listener.start()
        self.addCleanup(listener.stop)
        await poll(lambda: self.heard == ["b"], "the other callback")
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    async def test_stop_while_connecting(self) -> None:
        """A stop during a connect waits for the connect, and leaves no connection open."""
        listener = Listener(self.url, {"a": lambda: self.heard.append("a")})
        listener.start()
        stopped = listener.stop()
        self.assertIsInstance(stopped, Deferred)
        await stopped
        self.assertFalse(listener.is_connected)
        self.assertEqual(self.heard, [])
