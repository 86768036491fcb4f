"""Table ``idempotency_keys``: the one arbiter of what is a duplicate (docs/protocol.rst, "Commands")."""

from __future__ import annotations

import msgspec

from s2s.store.driver import Query, Steps


class First(msgspec.Struct, frozen=True):
    """The first command of a key.

    :param fingerprint: SHA-256 of its canonical ``{cmd_type, payload}``.
    :param status: what it is now, or was when its row was swept away.
    """

    fingerprint: bytes
    cmd_id: int
    status: str


def firsts(idem_keys: list[str]) -> Steps[dict[str, First]]:
    """Look up the first command of each key that has one."""
    rows = yield Query(
        # Of a command whose row was removed by hand it is known only that it is over.
        "select k.idem_key, k.fingerprint, k.cmd_id, coalesce(c.status, k.status, 'done')"
        " from s2s.idempotency_keys k left join s2s.commands c using (cmd_id) where k.idem_key = any(%s)",
        (idem_keys,),
    )
    return {key: First(bytes(fingerprint), cmd_id, status) for key, fingerprint, cmd_id, status in rows}
