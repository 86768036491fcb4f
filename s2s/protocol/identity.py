"""The identity of a process (docs/protocol.rst, "Identity")."""

from __future__ import annotations

from dataclasses import dataclass

from s2s.protocol.signing import Role


@dataclass(frozen=True)
class Identity:
    """The identity that this process announces to a peer.

    :param name: the name that operators gave this process.
    :param boot_id: a ULID, new at every start of the process.
    """

    role: Role
    name: str
    boot_id: str
