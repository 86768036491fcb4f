"""Read-only operations on keys, the audit and jobs."""

from __future__ import annotations

from typing import Any, Final

from s2s.admin.operations.operation import Operation
from s2s.admin.operations.pages import KEY, Page, in_stretches, keyed, listing
from s2s.store.tables import audit, jobs, keys
from s2s.store.tables.audit import Entry
from s2s.store.tables.jobs import JobRow
from s2s.store.tables.keys import PublicKeyRow

_TEXT: Final = {"type": "string", "maxLength": 300}

KEYS: Final[Operation[Page[PublicKeyRow]]] = listing(
    "list_keys",
    "/v1/keys",
    "List the keys with their current use, without their secrets",
    PublicKeyRow,
    keyed(keys.list_public, lambda row: row.key_id),
    cursor=KEY,
)
AUDIT: Final[Operation[Page[Entry]]] = listing(
    "list_audit",
    "/v1/audit",
    "List the audit entries (actor, action, result), the newest first",
    Entry,
    in_stretches(audit.LISTED),
    filters={
        "actor": {**_TEXT, "description": "Only entries of this actor, such as token:alice, cli:alice or key:k1."},
        "action": {**_TEXT, "description": "Only entries of this action, such as config.set or s2s.engine.pause."},
        "subject": {**_TEXT, "description": "Only entries about this order id, setting, key or engine name."},
    },
)
JOBS: Final[Operation[Page[JobRow]]] = listing(
    "list_jobs",
    "/v1/jobs",
    "List the jobs that any engine has had, with the time when each is due and the result of its last run",
    JobRow,
    keyed(jobs.list_jobs, lambda row: row.job_type),
    cursor=KEY,
)
OPERATIONS: Final[tuple[Operation[Any], ...]] = (KEYS, AUDIT, JOBS)
