"""A short campaign of faults, in which no promise is broken; and campaigns against roles that break a promise.

See campaigns/faults. ``S2S_FAULTS_S`` sets the seconds in which faults begin, ``S2S_FAULTS_SEED`` the seed.
"""

from __future__ import annotations

import os

from twisted.internet.defer import Deferred, DeferredList, DeferredSemaphore
from twisted.trial.unittest import TestCase

from campaigns.faults import campaign
from campaigns.faults.instrumentation import BREAKS
from campaigns.faults.kinds import ATTACKS

SECONDS = float(os.environ.get("S2S_FAULTS_S", "20"))
SEED = int(os.environ.get("S2S_FAULTS_SEED", "7"))
#: For each broken promise: the faults that reveal it (none if the clients' work alone does), the seconds of the
#: campaign, and a part of the violation's text.
_SHOWN_BY = {
    "ack-before-commit": ((), 3, "was accepted as"),
    "no-idempotency": ((), 3, "is there 2 times"),
    "no-order-lock": ((), 15, "its orders say"),
    "no-replay-cache": (("replay on another link",), 10, "was answered"),
    "no-savepoint": ((), 3, "by halves"),
    "outbox-elsewhere": (("kill the engine",), 30, "and was published 0 times"),
}
#: Seconds to wait for the end of the work: a role that breaks a promise may never finish some of it.
_BROKEN_S = 15.0


class CampaignTests(TestCase):
    """Real processes, a real network in between, and a real database."""

    timeout = SECONDS * 2 + 240

    async def test_nothing_is_lost(self) -> None:
        """Under every kind of short fault no promise is broken, and everything recovers in time."""
        verdict = await campaign.run(SEED, SECONDS, attacks=[attack for attack in ATTACKS if not attack.fault.is_long])
        self.assertEqual(list(verdict.violations), [], campaign.told(verdict))
        self.assertGreater(verdict.faults, SECONDS / 20)
        self.assertTrue({"push", "emit", "broadcast", "order", "recovery"} <= {each.op for each in verdict.operations})


class BrokenTests(TestCase):
    """The checker finds broken promises."""

    timeout = 600

    async def test_each_break(self) -> None:
        """A campaign against roles that break a promise (``instrumentation.BREAKS``) fails and names the violation."""
        self.assertEqual(set(_SHOWN_BY), set(BREAKS))
        # Two at once: each campaign mostly waits for work that never ends.
        two = DeferredSemaphore(2)
        campaigns = {name: two.run(_break, name) for name in _SHOWN_BY}
        await DeferredList(campaigns.values())
        for name, (_, _, said) in _SHOWN_BY.items():
            with self.subTest(name=name):
                verdict = await campaigns[name]
                self.assertTrue(any(said in each for each in verdict.violations), campaign.told(verdict))


def _break(name: str) -> Deferred[campaign.Verdict]:
    """Run a campaign in which both roles break a promise."""
    faults, seconds, _ = _SHOWN_BY[name]
    chosen = [attack for attack in ATTACKS if attack.name in faults]
    return Deferred.fromCoroutine(campaign.run(SEED, seconds, attacks=chosen, breaks=name, settled_s=_BROKEN_S))
