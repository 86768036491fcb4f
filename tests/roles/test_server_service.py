"""What a server process says of itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from tests.support.http import ApiTestCase
from tests.support.waiting import pause


class LineTests(ApiTestCase):
    """Lines of the log that strangers cause."""

    @inlineCallbacks
    def test_refused_requests(self) -> Iterator[Deferred[Any]]:
        """Requests that are refused all the time have fewer and fewer lines, not one a second."""
        began = time.monotonic()
        while time.monotonic() - began < 6:
            self.ask("GET", "/v1/no-such")
            yield pause(0.05)
        lines = self.role.lines("HTTP API: ")
        self.assertTrue(lines)
        # After 1 and 3 s, and one more where this process was held up so long that nothing was to be told.
        self.assertLessEqual(len(lines), 3, lines)
