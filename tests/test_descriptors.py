"""How many sockets a server may have: :mod:`s2s.descriptors`."""

from __future__ import annotations

import resource

from twisted.trial.unittest import SynchronousTestCase

from s2s import descriptors
from s2s.links import MAX_LINKS
from s2s.web.site import MOST_CONNECTIONS


class LimitTests(SynchronousTestCase):
    """With the limits of this process."""

    def setUp(self) -> None:
        """Put them back in the end."""
        before, put_back = resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit
        self.hard = before[1]
        self.addCleanup(lambda: put_back(resource.RLIMIT_NOFILE, before))

    def allowed(self, soft: int) -> int:
        """Begin with a soft limit, and give the one that it becomes."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, self.hard))
        descriptors.allow()
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def test_raised(self) -> None:
        """A low limit is raised to what every bound of ours may need at once; one that is enough stays."""
        self.assertGreater(self.allowed(1024), MAX_LINKS + MOST_CONNECTIONS)
        self.assertEqual(self.allowed(10_000), 10_000)

    def test_as_far_as_it_goes(self) -> None:
        """It is raised no further than the hard limit lets it."""
        asked = []
        self.patch(resource, "getrlimit", lambda _: (1024, 2048))
        self.patch(resource, "setrlimit", lambda _, limits: asked.append(limits))
        descriptors.allow()
        self.assertEqual(asked, [(2048, 2048)])
        self.patch(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
        descriptors.allow()
        self.assertGreater(asked[1][0], 2048)
