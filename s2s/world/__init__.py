"""The bundled example game: sectors, ports, ships; its jobs and orders, written against the public plug-in API only.

It is loaded as a plug-in of another distribution is, after all of them: a job, an order, a setting or a report that one
of them declares replaces the one of the same name here. ``--no-world`` leaves it out (docs/protocol.rst, "The world and
its jobs").
"""

from __future__ import annotations

from s2s import Migrations, Setting
from s2s.world.decay import Decay
from s2s.world.port_refresh import PortRefresh
from s2s.world.set_sector_status import SetSectorStatus
from s2s.world.tables import COUNTS, SCHEMA
from s2s.world.update_all_ships import UpdateAllShips

migrations = Migrations(SCHEMA, __name__)

port_refresh_rate = Setting(PortRefresh.rate, 100, "share of the way to its base that a port goes in a run", 0, 1000)
decay_rate = Setting(Decay.rate, 10, "share of its shields that a ship loses in a run", 0, 1000)

port_refresh = PortRefresh()
decay = Decay()
set_sector_status = SetSectorStatus()
update_all_ships = UpdateAllShips()
counts = COUNTS
