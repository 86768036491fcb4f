"""The condition that a server process reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from tests.support.http import ApiTestCase
from tests.support.waiting import pause


class AsyncConnectionTests(ApiTestCase):
    """Log lines that strangers cause."""

    @inlineCallbacks
    def test_refused_requests(self) -> Iterator[Deferred[Any]]:
        """Requests that are refused all the time cause log lines at growing intervals, not one a second."""
        began = time.monotonic()
        while time.monotonic() - began < 6:
            self.ask("GET", "/v1/no-such")
            yield pause(0.05)
        lines = self.role.lines("HTTP API: ")
        self.assertTrue(lines)
        # One line after 1 s and one after 3 s, and one more if this process was delayed for long.
        self.assertLessEqual(len(lines), 3, lines)
