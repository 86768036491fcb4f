"""The reports of plug-ins (docs/plugins.rst, "Rules")."""

from __future__ import annotations

from functools import partial
from typing import Any

from s2s.admin.operations.operation import Operation, OperationRequest, once
from s2s.handlers.report import Report
from s2s.store.driver import Cursor


def _read(report: Report, txn: Cursor, _: OperationRequest) -> Any:
    txn.execute(report.query)
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
    )
