"""The steps of a key's rotation (docs/protocol.rst, "Keys"): each is one transaction, and they run one at a time.

A step changes the rows and then asks the :class:`~s2s.protocol.signing.Keyring`, which alone decides which key signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from s2s.errors import OperatorError
from s2s.protocol.signing import Role
from s2s.store.driver import Cursor, savepoint
from s2s.store.kept_rows import check_written
from s2s.store.tables.keys import KeyTable, lock, make_keyring, prefer, read, utc

#: Seconds for which a retired key still verifies, so that frames in flight are accepted.
RETIRE_S: Final = 60.0


@dataclass(frozen=True)
class Change:
    """The result of a step of a rotation.

    :param text: the result in one line.
    :param is_changed: ``False``: the key was in this state already.
    :param signers: the key that signs for each role now.
    :param warning: the next action that the operator must take, in one line.
    """

    key_id: str
    text: str
    is_changed: bool
    signers: dict[Role, str]
    warning: str | None = None


def activate(txn: Cursor, key_id: str) -> Change:
    """Make a key sign from now on for every role that it may sign for. The previous key still verifies.

    :raises OperatorError: there is no such key, it cannot be used, or it has an end.
    """
    lock(txn)
    table = read(txn)
    row, roles = table.row(key_id), " and ".join(table.row(key_id).roles)
    why = make_keyring([row])[1].get(key_id)
    if row.active_to is not None:
        why = f"it {'ended' if row.has_ended(table.now) else 'ends'} at {utc(row.active_to)}"
    if why is not None:
        raise OperatorError(
            f"the key {key_id} cannot be activated, {why}: {_another(row.roles)}, then activate that one"
        )
    signers = table.signers()
    if row.is_default_tx and all(signers.get(role) == key_id for role in row.roles):
        return Change(key_id, f"the key {key_id} signs for {roles} already", False, signers)
    if row.role == "any":
        # The default of a single role has precedence over the default of the role "any".
        txn.execute("update s2s.s2s_keys set is_default_tx = false where is_default_tx and role <> 'any'")
    prefer(txn, [key_id])
    txn.execute(
        "update s2s.s2s_keys set active_from = clock_timestamp() where key_id = %s and active_from > clock_timestamp()",
        (key_id,),
    )
    return Change(key_id, f"the key {key_id} signs for {roles} from now on", True, read(txn).signers())


def retire(txn: Cursor, key_id: str) -> Change:
    """Make a key stop signing now, and stop verifying after :data:`RETIRE_S` seconds.

    :raises OperatorError: there is no such key, or no other key would sign in its place.
    """
    lock(txn)
    table = read(txn)
    row, before = table.row(key_id), table.signers()
    if row.active_to is not None and not row.is_default_tx and key_id not in before.values():
        if row.has_ended(table.now):
            return Change(key_id, f"the key {key_id} has ended already", False, before)
        if row.active_to <= table.now + RETIRE_S:
            text = f"the key {key_id} is retired already: it verifies until {utc(row.active_to)}"
            return Change(key_id, text, False, before)
    with savepoint(txn):
        txn.execute(
            "update s2s.s2s_keys set is_default_tx = false, closed_at = clock_timestamp(),"
            " active_to = least(active_to, clock_timestamp() + make_interval(secs => %s)) where key_id = %s",
            (RETIRE_S, key_id),
        )
        check_written(txn, "update", "s2s.s2s_keys")
        after = read(txn)
        end = after.row(key_id).active_to
        assert end is not None
        for role in row.roles:
            # Check the successor now and at the end of this key, because the successor may end as well.
            signers = [after.signers(at).get(role) for at in (after.now, end)]
            if role in before and (None in signers or key_id in signers):
                raise OperatorError(f"no other key would sign for {role}: {_cure(after, role, key_id)}")
    text = f"the key {key_id} signs no more, and verifies until {utc(end)}"
    return Change(key_id, text, True, _settle(txn))


def _settle(txn: Cursor) -> dict[Role, str]:
    """Make the current signers the defaults, so that a key added later does not replace them as the newest."""
    signers = read(txn).signers()
    prefer(txn, set(signers.values()))
    return signers


def _another(roles: Sequence[Role]) -> str:
    return f"make one with: s2s keys add --role {'any' if len(roles) > 1 else roles[0]} --key-id ID"


def _cure(table: KeyTable, role: Role, key_id: str) -> str:
    _, complaints = make_keyring(table.rows)
    others = [
        row
        for row in table.rows
        if role in row.roles and row.active_to is None and row.key_id not in complaints and row.key_id != key_id
    ]
    if not others:
        return f"{_another([role])}, then: s2s keys activate ID"
    newest = max(others, key=lambda row: (row.active_from, row.key_id))
    return f"activate another key first: s2s keys activate {newest.key_id}"


def revoke(txn: Cursor, key_id: str) -> Change:
    """Make a key neither sign nor verify from now on, even if no other key can sign.

    :raises OperatorError: there is no such key.
    """
    lock(txn)
    table = read(txn)
    row = table.row(key_id)
    is_changed = row.is_default_tx or not row.has_ended(table.now)
    if is_changed:
        txn.execute(
            "update s2s.s2s_keys set is_default_tx = false, active_from = least(active_from, clock_timestamp()),"
            " active_to = least(active_to, clock_timestamp()), closed_at = clock_timestamp() where key_id = %s",
            (key_id,),
        )
        check_written(txn, "update", "s2s.s2s_keys")
    signers = _settle(txn) if is_changed else table.signers()
    unsigned = [role for role in row.roles if role not in signers]
    warning = f"no key can sign for {' and '.join(unsigned)} any more: {_another(unsigned)}" if unsigned else None
    text = "neither signs nor verifies any more" if is_changed else "has ended already"
    return Change(key_id, f"the key {key_id} {text}", is_changed, signers, warning)
