"""A trial write that shows whether the database works: every write of a push and a worker, rolled back afterwards.

A rolled-back transaction sends no NOTIFY, so the NOTIFY queue is checked separately.
"""

from __future__ import annotations

from typing import Final

from s2s.store.driver import Cursor
from s2s.store.kept_rows import Verb, check_written, refusal
from s2s.store.lock_wait import trial
from s2s.store.monitors import notify_queue

#: The verb, the table and the statement of each write. An UPDATE returns whether the row has the new value, because the
#: statement counts the row as written even if a trigger returns the old row.
_WRITES: Final[tuple[tuple[Verb, str, str], ...]] = (
    (
        "insert",
        "s2s.idempotency_keys",
        "insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id) values (gen_random_uuid()::text,"
        " sha256('probe'), nextval('s2s.commands_cmd_id_seq'))",
    ),
    (
        "insert",
        "s2s.commands",
        "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload, status) values"
        " (currval('s2s.commands_cmd_id_seq'), 'probe', 'probe', '{}', 'cancelled')",
    ),
    (
        "update",
        "s2s.commands",
        "update s2s.commands set status = 'done' where cmd_id = (select cmd_id from s2s.commands"
        " where cmd_id = currval('s2s.commands_cmd_id_seq') for update) returning status = 'done'",
    ),
    (
        "insert",
        "s2s.batch_notes",
        "insert into s2s.batch_notes (boot_id, worker, cmd_ids) values ('s2s.probe ' || pg_backend_pid(), 0, '{}')",
    ),
    (
        "update",
        "s2s.batch_notes",
        "update s2s.batch_notes set cmd_ids = '{1}' where boot_id = 's2s.probe ' || pg_backend_pid()"
        " returning cmd_ids = '{1}'",
    ),
    ("delete", "s2s.batch_notes", "delete from s2s.batch_notes where boot_id = 's2s.probe ' || pg_backend_pid()"),
)


def check(txn: Cursor) -> None:
    """Run the writes, and roll back to the previous state of the transaction.

    :raises DatabaseError: the database refuses a write (raised by the pool), or would refuse every NOTIFY.
    """
    notify_queue.check(txn)
    with trial(txn):
        for verb, table, statement in _WRITES:
            txn.execute(statement)
            check_written(txn, verb, table)
            if verb == "update" and txn.fetchone() != (True,):
                raise refusal(txn, verb, table)
