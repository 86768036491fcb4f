"""Server, engine and their database connections killed at random under load: nothing is lost, nothing is doubled.

``S2S_CHAOS_S`` says for how many seconds, ``S2S_CHAOS_SEED`` with which seed.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import LoopingCall, deferLater

from tests.support.flood import Flood
from tests.support.roles import Role, RoleTestCase
from tests.support.waiting import poll

SECONDS = float(os.environ.get("S2S_CHAOS_S", "10"))
SEED = int(os.environ.get("S2S_CHAOS_SEED", "7"))
#: New commands in a second: as many come from an outbox as from a peer of ours.
RATE = 2000
_FILL_S = 0.1


class ChaosTests(RoleTestCase):
    """A campaign of kills."""

    timeout = SECONDS * 3 + 120

    @inlineCallbacks
    def test_kills(self):
        """Afterwards every accepted command is there once and took effect once, and nothing is left over."""
        dice = random.Random(SEED)
        server, engine = self.server(), self.engine_of_chaos()
        yield server.start()
        yield engine.start()
        flood = Flood(lambda: server.connect(name="flood"), RATE / 2)
        flood.start()
        self.addCleanup(flood.join, 30)
        self.addCleanup(flood.finish)
        self.emitted = 0
        filling = LoopingCall(self.fill)
        filling.start(_FILL_S)
        began = time.monotonic()
        faults: list[str] = []
        while time.monotonic() - began < SECONDS:
            yield deferLater(reactor, dice.uniform(0.3, 1.5))
            fault = dice.choice([self.kill_server, self.kill_engine, self.kill_connections])
            faults.append(fault.__name__)
            yield fault(server, engine, dice)
        filling.stop()
        flood.finish()
        told = f"seed {SEED}, faults {faults}"
        yield poll(lambda: flood.is_done, f"all is accepted ({told})", timeout=60)
        yield poll(self.is_settled, f"all has run ({told})", timeout=60)
        self.assertEqual(flood.wrong, [], told)
        total = flood.made + self.emitted
        once = [(total, total, total)]
        counted = "count(*), count(distinct idem_key), count(*) filter (where status = 'done')"
        self.assertEqual(self.execute(f"select {counted} from commands"), once, told)
        counted = "count(*), count(distinct message), count(distinct cmd_id)"
        self.assertEqual(self.execute(f"select {counted} from notices"), once, told)
        found = dict(self.execute("select idem_key, cmd_id from commands where idem_key like 'flood-%%'"))
        self.assertEqual(found, flood.accepted, told)
        for table in ("outbox", "batch_notes"):
            self.assertEqual(self.count(table), 0, told)
        self.assertGreater(len(faults), SECONDS / 5)

    def engine_of_chaos(self) -> Any:
        """Make the engine, which connects to the server that was made last."""
        return self.engine(self.last_server.port)

    def server(self, *options: str, **how: Any) -> Any:
        """Make a server, and remember it."""
        self.last_server = super().server(*options, **how)
        return self.last_server

    def fill(self) -> None:
        """Emit what is due of the engine's commands."""
        count = int(RATE / 2 * _FILL_S)
        self.execute(
            "insert into outbox (cmd_type, idem_key, payload) select 'notice.publish', 'outbox-' || n,"
            " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', 'outbox-' || n)"
            " from generate_series(%s, %s) n",
            self.emitted,
            self.emitted + count - 1,
        )
        self.emitted += count

    def is_settled(self) -> bool:
        """Whether nothing is on its way."""
        waiting = self.execute("select count(*) from commands where status = 'ready'")[0][0]
        return not waiting and not self.count("outbox") and not self.count("batch_notes")

    # --- faults ---------------------------------------------------------------------------------------------------

    def kill_server(self, server: Role, engine: Role, dice: random.Random) -> Deferred[Any]:
        """SIGKILL, and a new start."""
        server.kill()
        return server.start()

    def kill_engine(self, server: Role, engine: Role, dice: random.Random) -> Deferred[Any]:
        """SIGKILL, and a new start."""
        engine.kill()
        return engine.start()

    @inlineCallbacks
    def kill_connections(self, server: Role, engine: Role, dice: random.Random) -> Iterator[Deferred[Any]]:
        """End some of the roles' connections to the database."""
        yield deferLater(reactor, 0)
        pids = self.execute(
            "select pid from pg_stat_activity where datname = current_database() and application_name like 's2s-%%'"
        )
        for (pid,) in pids:
            if dice.random() < 0.5:
                self.execute("select pg_terminate_backend(%s)", pid)
