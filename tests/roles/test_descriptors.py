"""The number of sockets of a server: :mod:`s2s.roles.descriptors`."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.http.site import MOST_CONNECTIONS
from s2s.errors import DatabaseUnavailable
from s2s.link.factory import MAX_LINKS
from s2s.roles import descriptors
from s2s.store.pool import blocking
from tests.support.postgres import cluster_url
from tests.support.roles import RoleTestCase
from tests.support.waiting import poll


class LimitTests(SynchronousTestCase):
    """The limits of this process."""

    def setUp(self) -> None:
        """Restore the limits at the end."""
        before, put_back = resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit
        self.hard = before[1]
        self.addCleanup(lambda: put_back(resource.RLIMIT_NOFILE, before))

    def allowed(self, soft: int) -> int:
        """Set a soft limit, raise it, and return the new limit."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, self.hard))
        descriptors.allow()
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def test_raised(self) -> None:
        """A low limit is raised to the sum of all limits of s2s; a sufficient one does not change."""
        self.assertGreater(self.allowed(1024), MAX_LINKS + MOST_CONNECTIONS)
        self.assertEqual(self.allowed(10_000), 10_000)

    def test_as_far_as_it_goes(self) -> None:
        """The limit is raised no further than the hard limit, and the log says so with the cure."""
        lines: list[str | None] = []

        def hear(event: LogEvent) -> None:
            lines.append(formatEvent(event))

        globalLogPublisher.addObserver(hear)
        self.addCleanup(globalLogPublisher.removeObserver, hear)
        asked = []
        self.patch(resource, "getrlimit", lambda _: (1024, 2048))
        self.patch(resource, "setrlimit", lambda _, limits: asked.append(limits))
        descriptors.allow()
        self.assertEqual(asked, [(2048, 2048)])
        [line] = lines
        self.assertRegex(str(line), "is 2048, .* need [0-9]{4}: raise the limit, LimitNOFILE=")
        self.patch(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
        descriptors.allow()
        self.assertGreater(asked[1][0], 2048)
        self.assertEqual(len(lines), 1)


class ExhaustedTests(SynchronousTestCase):
    """A process without a free descriptor."""

    def test_a_connect(self) -> None:
        """A connect of libpq that fails for lack of a descriptor names that reason, which libpq itself does not."""
        url = cluster_url()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        held = []
        try:
            while True:  # of lower numbers, which may be free
                held.append(os.dup(0))
        except OSError:
            why = str(self.assertRaises(DatabaseUnavailable, blocking(url).__enter__))
        finally:
            for each in held:
                os.close(each)
        self.assertIn(f"no file descriptor is left (limit {lowest}): raise the limit, LimitNOFILE=", why)

    def test_another_reason(self) -> None:
        """A connect that fails for another reason has libpq's text."""
        why = str(self.assertRaises(DatabaseUnavailable, blocking("postgresql://u@/d?host=/nowhere").__enter__))
        self.assertIn("No such file", why)


def _is_ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(4096)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


class ServerTests(RoleTestCase):
    """A server without a free descriptor."""

    @inlineCallbacks
    def test_connections(self) -> Iterator[Deferred[Any]]:
        """All connections that cannot be accepted cause one line with the cure, and none of Twisted's lines."""
        server = self.server()
        yield server.start()
        peer = yield deferToThread(server.connect)
        self.addCleanup(peer.close)
        yield deferToThread(peer.greet)
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        most = 1 + max(map(int, os.listdir(f"/proc/{server.pid}/fd")))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, limits[1]))
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        # The accepted ones depend on the database connections that come and go meanwhile.
        for each in connections:
            each.setblocking(False)
        yield poll(lambda: any(_is_ended(each) for each in connections), "a connection is refused")
        for each in connections:
            each.close()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        yield server.says("could not be accepted")
        [line] = server.lines("could not be accepted")
        self.assertIn(f"no file descriptor is left (limit {most}): raise the limit, LimitNOFILE=", line)
        self.assertNotIn("EMFILE", server.log)
