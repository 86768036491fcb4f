"""Who a process is (docs/protocol.rst, "Identity")."""

from __future__ import annotations

from dataclasses import dataclass

from s2s.protocol.signing import Role


@dataclass(frozen=True)
class Identity:
    """Who we are.

    :param name: what operators call this process.
    :param boot_id: a ULID, new at every start of a process.
    """

    role: Role
    name: str
    boot_id: str
