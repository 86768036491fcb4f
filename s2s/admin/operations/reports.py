"""The reports of plug-ins (docs/plugins.rst, "Rules")."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, Final

from s2s.admin.operations.operation import Operation, OperationRequest, once
from s2s.errors import InternalError, NotFound, one_line
from s2s.handlers.report import Report
from s2s.store import sqlstate
from s2s.store.driver import Cursor

#: The SQLSTATEs of a missing schema and a missing table.
_MISSING: Final = ("3F000", "42P01")
#: The classes of SQLSTATEs that only the query itself can cause.
_WRONG: Final = ("22", "42")


def _read(report: Report, txn: Cursor, _: OperationRequest) -> Any:
    try:
        txn.execute(report.query)
    except Exception as error:
        code = sqlstate.code(error)
        if code in _MISSING:
            raise NotFound(f"this database lacks a table of the report {report.name!r}: run: s2s db migrate") from None
        if code.startswith(_WRONG):
            raise _fault(report, f"its query fails with SQLSTATE {code}: {one_line(error)}") from None
        raise
    rows, wanted = txn.fetchall(), [field.name for field in fields(report.row)]
    if len(rows) != 1 or len(rows[0]) != len(wanted):
        found = f"{len(rows)} rows of {len(txn.description or ())} columns"
        raise _fault(report, f"its query returns {found} in place of one row with {', '.join(wanted)}")
    return report.row(*rows[0])


def _fault(report: Report, text: str) -> InternalError:
    return InternalError(f"the report {report.name!r} of a plug-in has a fault: {text}")


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
        refusals=(NotFound, InternalError),
    )
