"""Threads of s2s, which a plug-in cannot use up."""

from __future__ import annotations

import threading

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import TestCase

from s2s.errors import NoThread, OperatorError
from s2s.runtime import own_threads
from s2s.runtime.hooks import SharedHooks
from s2s.store.driver import Query, Steps
from s2s.store.listen import Listener
from s2s.store.pool import Database
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


def _fill_the_reactors(test: TestCase) -> None:
    """Block every thread of the reactor's pool until the test ends."""
    end = threading.Event()
    test.addCleanup(end.set)
    for _ in range(reactor.getThreadPool().max):
        reactor.callInThread(end.wait, 60)


class OwnThreadsTests(DatabaseTestCase):
    """:mod:`s2s.runtime.own_threads`, while a plug-in occupies all threads of the reactor."""

    async def test_the_database(self) -> None:
        """Statements without a thread, the listener and the shutdown transaction still connect."""

        def one() -> Steps[list[tuple[int]]]:
            return (yield Query("select 1", ()))

        _fill_the_reactors(self)
        database = Database(self.url, threads=1)
        database.start()
        self.addCleanup(database.stop)
        self.assertEqual(await database.run_steps(one), [(1,)])
        self.assertEqual(await database.run_at_shutdown(lambda txn: txn.execute("select 1")), None)
        listener = Listener(self.url, {})
        listener.start()
        self.addCleanup(listener.stop)
        await poll(lambda: listener.is_connected, "the listener")

    async def test_host_names(self) -> None:
        """A link to a host name still connects."""
        self.addCleanup(reactor.installNameResolver, reactor.nameResolver)
        own_threads.resolve_names(reactor)
        connected: Deferred[None] = Deferred()
        port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(Factory.forProtocol(Protocol))
        self.addCleanup(port.stopListening)
        _fill_the_reactors(self)
        factory = Factory.forProtocol(Protocol)
        connecting = HostnameEndpoint(reactor, "localhost", port.getHost().port).connect(factory)
        connecting.addCallback(lambda protocol: protocol.transport.abortConnection())
        connecting.chainDeferred(connected)
        await connected.addTimeout(10, reactor)


class HookTests(TestCase):
    """A hook of all threads that ends each of them before its work."""

    def test_at_the_start(self) -> None:
        """The error has the cure, and no thread is left."""

        def fail(*_: object) -> None:
            raise RuntimeError("a hook")

        self.addCleanup(SharedHooks().restore)
        threading.excepthook = lambda _: None
        before = threading.active_count()
        threading.settrace(fail)
        self.assertRaisesRegex(OperatorError, "ended before its work: a plug-in has set a hook", own_threads.check, 5)
        self.patch(threading, "excepthook", None)
        self.assertRaisesRegex(OperatorError, "no thread can be made .*a plug-in has set a hook", own_threads.check, 5)
        self.assertEqual(threading.active_count(), before)


class RefusedTests(TestCase):
    """An operating system that refuses further threads."""

    def setUp(self) -> None:
        """Let only two threads start."""
        start, started = threading.Thread.start, []

        def limited(thread: threading.Thread) -> None:
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            start(thread)

        self.patch(threading.Thread, "start", limited)

    def test_at_the_start(self) -> None:
        """The error has the required number of threads and the cure, and no thread is left."""
        before = threading.active_count()
        with self.assertRaisesRegex(OperatorError, "needs 9 threads, and the operating system starts 2: .*TasksMax"):
            own_threads.check(5)
        self.assertEqual(threading.active_count(), before)

    async def test_later(self) -> None:
        """A call without a thread fails, running calls continue, and the pool can be stopped."""
        pool = ThreadPool(0, 3, "test")
        pool.threadFactory = own_threads.Thread
        pool.start()
        end = threading.Event()
        running = [own_threads.run_in(reactor, pool, end.wait, 60) for _ in range(2)]
        with self.assertRaises(NoThread):
            await own_threads.run_in(reactor, pool, len, "")
        end.set()
        for each in running:
            self.assertTrue(await each)
        self.assertEqual(await own_threads.run_in(reactor, pool, len, "ab"), 2)
        pool.stop()
