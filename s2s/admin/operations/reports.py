"""The reports of plug-ins (docs/plugins.rst, "Rules")."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from s2s.admin.operations.operation import Operation, OperationRequest, once
from s2s.errors import NotFound
from s2s.handlers.report import Report
from s2s.store import sqlstate
from s2s.store.driver import Cursor

#: The SQLSTATEs of a missing schema and a missing table.
_MISSING: Final = ("3F000", "42P01")


def _read(report: Report, txn: Cursor, _: OperationRequest) -> Any:
    try:
        txn.execute(report.query)
    except Exception as error:
        if sqlstate.code(error) not in _MISSING:
            raise
        raise NotFound(f"this database lacks a table of the report {report.name!r}: run: s2s db migrate") from None
    return report.row(*(txn.fetchone() or ()))


def operation(report: Report) -> Operation[Any]:
    """Return the operation that reads a report."""
    return Operation(
        f"report_{report.name.replace('.', '_')}",
        "GET",
        report.path,
        "observer",
        report.summary,
        report.row,
        once(partial(_read, report)),
        is_list=True,
        refusals=(NotFound,),
    )
