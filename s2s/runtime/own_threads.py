"""Threads of our own for blocking calls: a plug-in may fill the reactor's threads with calls that do not return.

The operating system may refuse a thread. The work of that thread then fails, and no handler is charged for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from twisted.internet import threads
from twisted.internet._resolver import GAIResolver
from twisted.internet.defer import Deferred, fail
from twisted.python.threadpool import ThreadPool

from s2s.errors import THREAD_CURE, NoThread, OperatorError
from s2s.runtime import hooks

T = TypeVar("T")

#: The threads that are started at once, and the most threads. A process opens two connections in threads, checks
#: connections without an answer, and has up to one cancellation for each call of foreign code.
LEAST: Final = 4
MOST: Final = 20

_pools: Final[WeakKeyDictionary[Any, ThreadPool]] = WeakKeyDictionary()


def run(reactor: Any, work: Callable[..., T], *args: Any) -> Deferred[T]:
    """Call ``work(*args)`` in a thread.

    :returns: fires with its result.
    """
    return run_in(reactor, _pool(reactor), work, *args)


def run_in(reactor: Any, pool: ThreadPool, work: Callable[..., T], *args: Any) -> Deferred[T]:
    """Call ``work(*args)`` in a thread of a pool.

    :param pool: a pool whose threads are each a :class:`Thread`.
    :returns: fires with its result, or fails with :class:`NoThread`.
    """
    try:
        outcome: Deferred[T] = threads.deferToThreadPool(reactor, pool, work, *args)
    except RuntimeError:
        return fail(NoThread())
    return outcome


class Thread(threading.Thread):
    """A thread of a pool, which the pool can also join if the operating system has refused to start it."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, if it was started."""
        if self.ident is not None:
            super().join(timeout)


def try_start(thread: threading.Thread) -> bool:
    """Start a thread; return whether it started: the operating system may refuse it, and Python does while it exits."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def check(count: int) -> None:
    """Check that this process may start more threads.

    :param count: threads in addition to those of :func:`run`.
    :raises OperatorError: the operating system refuses them, or a hook of all threads ends them.
    """
    release, made, ran = threading.Event(), list[threading.Thread](), list[int]()

    def wait() -> None:
        ran.append(1)
        release.wait()

    needed = count + LEAST
    try:
        while len(made) < needed and try_start(thread := threading.Thread(target=wait, daemon=True)):
            made.append(thread)
    except RuntimeError as error:  # threading.excepthook is None
        raise OperatorError(f"no thread can be made ({error}): {hooks.CURE}") from None
    release.set()
    for thread in made:
        thread.join()
    if len(made) < needed:
        raise OperatorError(
            f"this process needs {needed} threads, and the operating system starts {len(made)}: {THREAD_CURE}"
        )
    if len(ran) < needed:
        raise OperatorError(f"a thread has ended before its work: {hooks.CURE}")


def resolve_names(reactor: Any) -> None:
    """Make the reactor look up host names in these threads, too."""
    reactor.installNameResolver(GAIResolver(reactor, lambda: _pool(reactor)))


def _pool(reactor: Any) -> ThreadPool:
    pool = _pools.get(reactor)
    if pool is None:
        pool = _pools[reactor] = ThreadPool(LEAST, MOST, "s2s")
        pool.threadFactory = Thread
        pool.start()
        reactor.addSystemEventTrigger("during", "shutdown", pool.stop)
    return pool
