"""Table ``idempotency_keys``: it alone decides which pushes are duplicates (docs/protocol.rst, "Commands")."""

from __future__ import annotations

import msgspec

from s2s.store.driver import Query, Steps


class First(msgspec.Struct, frozen=True):
    """The first command with an ``idem_key``.

    :param fingerprint: the SHA-256 of its canonical ``{cmd_type, payload}``.
    :param status: its current status, or its last status if its row was removed.
    """

    fingerprint: bytes
    cmd_id: int
    status: str


def firsts(idem_keys: list[str]) -> Steps[dict[str, First]]:
    """Return the first command of each key that has one."""
    rows = yield Query(
        # If a command's row was removed by hand, its status is unknown; it counts as done.
        "select k.idem_key, k.fingerprint, k.cmd_id, coalesce(c.status, k.status, 'done')"
        " from s2s.idempotency_keys k left join s2s.commands c using (cmd_id) where k.idem_key = any(%s)",
        (idem_keys,),
    )
    return {key: First(bytes(fingerprint), cmd_id, status) for key, fingerprint, cmd_id, status in rows}
