"""The plug-ins that are installed beside the tests: those of s2s and of the bundled world."""

from __future__ import annotations

from typing import Final

from s2s.admin.operations import all_operations
from s2s.handlers.discovery import installed

FOUND: Final = installed()
ORDERS: Final = tuple(FOUND.orders)
MIGRATIONS: Final = list(FOUND.migrations.values())
CATALOGUE: Final = FOUND.catalogue
OPERATIONS: Final = all_operations(FOUND)
