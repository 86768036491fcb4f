"""The checker of a campaign, and the order of its attacks (campaigns/faults)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from campaigns.faults.checker import Command, Facts, Order, check
from campaigns.faults.history import History, Operation, operations
from campaigns.faults.instrumentation import STEPS
from campaigns.faults.kinds import ATTACKS, program
from campaigns.faults.testbed import Level
from tests.support.peer import CHECK, PUSH

_CONTENT = {"n": 1}
_OTHER = {"n": 1, "other": True}
_FINGERPRINT = hashlib.sha256(b'{"cmd_type":"faults.mark","payload":{"n":1}}').hexdigest()


def did(op: str, ended: Any = "ok", came: Any = None, *, since: float = 1.0, until: float = 2.0, **asked: Any) -> Any:
    """Return an operation."""
    return Operation("me", op, asked, ended, came or {}, since, until)


def pushed(ended: Any = "ok", content: Any = None, **came: Any) -> Any:
    """Return a push of the key ``k``."""
    told = {"cmd_id": 1, "duplicate": False} if ended == "ok" and not came else came
    return did("push", ended, told, key="k", content=content or _CONTENT)


#: The correct facts after the operations of :data:`DID`, one or two of each kind.
RIGHT = Facts(
    commands=[
        Command(1, "k", _CONTENT, "done", _FINGERPRINT),
        Command(2, "later", _CONTENT, "cancelled", _FINGERPRINT),
    ],
    effects=[("k", 1, 9.0), ("k", 2, 9.0)],
    notices=["e", "b"],
    broadcasts=[("b", "queued")],
    orders=[Order("o1", "o", {}, "done", {"sector_id": 1, "was": "neutral", "status": "fedspace"})],
    changes={1: [("neutral", "fedspace")]},
    sectors={1: "fedspace"},
    versions=[1, 2],
    engines={"engine-1": (2, "running")},
    audited={
        "order": ["o1", "o1"],
        "config": ["1", "2"],
        "key": ["k2"],
        "cancel": [2],
        "steer": ["s2s.engine.pause"],
        "wanted": ["paused", "running"],
    },
    keys=["k1", "k2"],
)
DID = [
    pushed(),
    did("emit", keys=["e"]),
    did("broadcast", messages=["b"]),
    did("order", key="o"),
    did("config", came={"version": 2, "changed": True}),
    did("rotate", key="k2"),
    did("push", came={"cmd_id": 2, "duplicate": False}, until=20.0, key="later", content=_CONTENT, due_at=99),
    did("cancel", cmd_id=2),
    did("steer", type="s2s.engine.pause"),
    did("replay", came={"code": "replay"}, type=CHECK, where="x", was_accepted=False),
    did("recovery", fault="x"),
]


class ProgramTests(SynchronousTestCase):
    """The order of the attacks."""

    def test_the_seed_decides(self) -> None:
        """The same seed results in the same order, another seed in another order."""
        first, again, other = (list(itertools.islice(program(ATTACKS, seed), 200)) for seed in (7, 7, 8))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def test_everything_comes(self) -> None:
        """A round has every fault and every step; each step gets the kills first, and every fault in the end."""
        rounds = len({attack.fault.name for attack in ATTACKS})
        length = len([attack for attack in ATTACKS if attack.step is None]) + len(STEPS)
        coming = list(itertools.islice(program(ATTACKS, 7), rounds * length))
        self.assertEqual(set(coming), set(ATTACKS))
        met: dict[str, list[str]] = {}
        for attack in coming[: 3 * length]:
            if attack.step is not None:
                met.setdefault(attack.step, []).append(attack.fault.name)
        kills = ["kill both", "kill the engine", "kill the server"]
        for step in set(STEPS) - {"migrate.file", "migrate.settings"}:
            self.assertEqual(sorted(met[step]), kills)
        self.assertEqual(Counter(map(len, met.values())), {3: len(STEPS)})


class LevelTests(SynchronousTestCase):
    """The level of a process's resources."""

    def test_leaks(self) -> None:
        """A level of memory, threads, descriptors or sessions above its bound is a leak."""
        beginning = Level(rss=70 << 20, threads=10, descriptors=20, sessions=8)
        self.assertFalse(replace(beginning, rss=80 << 20, descriptors=22).is_above(beginning))
        # The descriptors of a pool's sessions are no leak, up to the bound of a role.
        self.assertFalse(replace(beginning, descriptors=26, sessions=13).is_above(beginning))
        for leak in ({"rss": 120 << 20}, {"threads": 13}, {"descriptors": 26}, {"descriptors": 35, "sessions": 23}):
            self.assertTrue(replace(beginning, **leak).is_above(beginning))


class CheckerTests(SynchronousTestCase):
    """The check of a history against the facts."""

    def wrong(self, did: list[Any], said: str, **facts: Any) -> None:
        """Assert that the check reports a violation that contains a text."""
        told = check(did, replace(RIGHT, **facts))
        self.assertTrue(any(said in each for each in told), (said, told))

    def test_right(self) -> None:
        """A correct history has no violation; an operation with an unknown outcome may have an effect or none."""
        self.assertEqual(check(DID, RIGHT), [])
        for ended, came in (("unknown", {}), ("fail", {"code": "db_unavailable", "retry_after_ms": 1})):
            for facts in (RIGHT, replace(RIGHT, commands=RIGHT.commands[1:], effects=[])):
                self.assertEqual(check([pushed(ended, **came), *DID[1:]], facts), [])
        conflict = pushed("fail", _OTHER, code="idem_conflict", retry_after_ms=None)
        self.assertEqual(check([*DID, conflict], RIGHT), [])

    def test_pushes(self) -> None:
        """A push that is lost, doubled, changed, early, half done, or stored though refused is a violation."""
        command = RIGHT.commands[0]
        self.wrong(DID, "is there 2 times", commands=[command, replace(command, cmd_id=3)])
        self.wrong(DID, "was accepted and is not there", commands=[], effects=[])
        self.wrong(DID, "and is [9]", commands=[replace(command, cmd_id=9)])
        for other in (None, "0" * 64):
            self.wrong(DID, "another fingerprint", commands=[replace(command, fingerprint=other)])
        self.wrong(DID, "is ready", commands=[replace(command, status="ready")])
        self.wrong(DID, "another content", commands=[replace(command, content=_OTHER)])
        self.wrong([*DID, pushed("ok", _OTHER)], "2 contents")
        for halves in ((1,), (1, 1, 2), ()):
            self.wrong(DID, "by halves", effects=[("k", half, 9.0) for half in halves])
        later = did("push", came={"cmd_id": 1, "duplicate": False}, key="k", content=_CONTENT, due_at=10)
        self.wrong([later, *DID[1:]], "and was due at 10")
        self.wrong([pushed("unknown"), *DID[1:]], "took effect", commands=[])
        self.wrong(DID, "never pushed", effects=[*RIGHT.effects, ("x", 1, 9.0)])
        self.wrong([pushed("fail", code="bad_payload"), *DID[1:]], "was refused and is there")
        self.wrong([*DID, pushed("fail", code="idem_conflict")], "conflict with itself")

    def test_notices(self) -> None:
        """Emitted commands and broadcasts must be published once, and none may be left in the outbox or a claim."""
        for notices in (["b"], ["e", "e", "b"]):
            self.wrong(DID, "emitted e", notices=notices)
        for notices in (["e"], ["e", "b", "b"]):
            self.wrong(DID, "was published", notices=notices)
        self.wrong(DID, "broadcast b is pending", broadcasts=[("b", "pending")])
        self.wrong(DID, "in the outbox still", outbox=[("e", "dead")])
        self.wrong(DID, "noted still", notes=1)

    def test_orders(self) -> None:
        """An order must run once, and its result must match the world's rows and the audit."""
        order = RIGHT.orders[0]
        self.wrong(DID, "order o was accepted and is not there", orders=[], changes={})
        self.wrong(DID, "order o is there 2 times", orders=[order, replace(order, order_id="o2")])
        self.wrong(DID, "is failed", orders=[replace(order, status="failed")])
        self.wrong(DID, "its orders say", changes={1: [("neutral", "fedspace")] * 2})
        self.wrong(DID, "its orders say", changes={})
        self.wrong(DID, "became fedspace last", sectors={1: "neutral"})
        self.wrong(DID, "and was fedspace then", changes={1: [("fedspace", "neutral"), ("fedspace", "neutral")]})
        self.wrong(DID, "in the audit", audited={**RIGHT.audited, "order": ["o1"]})

    def test_settings_and_keys(self) -> None:
        """Versions must have no gap, engines must have the last version, and the audit must have every change."""
        self.wrong(DID, "have gaps", versions=[1, 3])
        self.wrong(DID, "not in the history", versions=[1])
        self.wrong(DID, "has version 1 in force", engines={"engine-1": (1, "running")})
        self.wrong(DID, "the audit does not name", audited={**RIGHT.audited, "config": ["1"]})
        self.wrong(DID, "key k2 was accepted", keys=["k1"])
        self.wrong(DID, "key k2 is not in the audit", audited={**RIGHT.audited, "key": []})

    def test_by_hand(self) -> None:
        """A cancelled command must not run unless it is retried, and the audit must have every cancel and retry."""
        cancelled, later = RIGHT.commands[1], [("later", 1, 9.0), ("later", 2, 9.0)]
        again = {**RIGHT.audited, "retry": [2]}
        self.wrong(DID, "is cancelled and took effect", effects=[*RIGHT.effects, *later])
        self.wrong(DID, "the audit has", audited={**RIGHT.audited, "cancel": []})
        self.wrong(DID, "the cancel of command 2 is not in the audit", audited={**RIGHT.audited, "cancel": []})
        self.wrong(DID, "command 2 is cancelled, and the audit", audited=again)
        ran = {"commands": [RIGHT.commands[0], replace(cancelled, status="done")], "effects": [*RIGHT.effects, *later]}
        self.wrong(DID, "command 2 is done, and the audit", **ran)
        self.assertEqual(check([*DID, did("retry", cmd_id=2)], replace(RIGHT, **ran, audited=again)), [])

    def test_steered(self) -> None:
        """The audit must have each request that an engine obeyed, and the engine must end in the desired state."""
        self.wrong(DID, "s2s.engine.pause was obeyed", audited={**RIGHT.audited, "steer": []})
        self.wrong(DID, "was wanted paused, and then paused", audited={**RIGHT.audited, "wanted": ["paused", "paused"]})
        self.wrong(DID, "engine-1 is running, and wanted", audited={**RIGHT.audited, "wanted": ["paused"]})
        self.wrong(DID, "engine-1 is paused", engines={"engine-1": (2, "paused")})

    def test_the_link(self) -> None:
        """A replayed frame must be refused; while the database is away nothing may be acked, and links must stay."""
        for kind in (CHECK, PUSH):
            again = did("replay", came={"code": "ok", "duplicate": False}, type=kind, where="x", was_accepted=True)
            self.wrong([*DID, again], "was answered ok")
        for is_duplicate in (True, False):
            came = {"code": "ok", "duplicate": is_duplicate}
            again = did("replay", came=came, type=PUSH, where="x", was_accepted=is_duplicate)
            self.assertEqual(check([*DID, again], RIGHT), [])
        skewed = {"type": CHECK, "where": "x", "id": "i", "was_accepted": False, "was_skewed": True}
        first, second = (did("replay", came={"code": "ok", "duplicate": False}, **skewed) for _ in range(2))
        self.assertEqual(check([*DID, first], RIGHT), [])
        self.wrong([*DID, first, second], "was answered ok")
        outage = did("outage", since=0.0, until=9.0)
        self.wrong([*DID, outage], "acked while the database was away")
        refused = pushed("fail", code="db_unavailable", retry_after_ms=1000)
        self.assertEqual(check([refused, *DID[1:], outage], RIGHT), [])
        for came in ({"code": "overloaded", "retry_after_ms": 1}, {"code": "db_unavailable", "retry_after_ms": None}):
            self.wrong([pushed("fail", **came), *DID[1:], outage], "while the database was away")
        self.wrong([did("outage", came={"links_lost": 1})], "links were lost")
        order = did("order", "unknown", {"status": 500}, key="o")
        self.wrong([*DID, order, outage], "order o was answered")
        self.wrong([did("recovery", "fail", {"why": "no link"}, fault="cut")], "after cut: no link")

    def test_histories(self) -> None:
        """A history returns operations with their outcome; an operation without an end is unknown."""
        history = History()
        first, second = history.invoke("a", "push", key="k"), history.invoke("b", "emit", keys=[])
        history.end(first, "a", "push", "ok", cmd_id=1)
        done, open_ = operations(history.events)
        self.assertEqual((done.op, done.ended, done.came), ("push", "ok", {"cmd_id": 1}))
        self.assertEqual((open_.client, open_.ended, open_.until), ("b", "unknown", float("inf")))
        self.assertTrue(second)
