"""The operations of operators, each declared once (docs/api.rst).

To add an operation, declare it in the module of its topic, and add it to the ``OPERATIONS`` of that module. A new
module needs one line in :func:`all_operations` here. The HTTP API and its OpenAPI document are derived from the
declarations; add the operation to the table of ``docs/api.rst``, and a method to the client (:mod:`s2s.admin.client`).
"""

from __future__ import annotations

from typing import Any

from s2s.admin.operations import catalogue, commands, config, engines, lists, notices, orders, outbox, reports
from s2s.admin.operations.operation import Operation
from s2s.errors import OperatorError
from s2s.handlers.discovery import Found


def all_operations(found: Found) -> tuple[Operation[Any], ...]:
    """Return the operations of a server.

    :param found: the plug-ins that the server has installed.
    :raises OperatorError: a report of a plug-in has the path of another operation.
    """
    ours: tuple[Operation[Any], ...] = (
        *engines.OPERATIONS,
        *map(orders.operation, found.orders.values()),
        *orders.OPERATIONS,
        *commands.OPERATIONS,
        *outbox.OPERATIONS,
        *notices.OPERATIONS,
        *config.OPERATIONS,
        *lists.OPERATIONS,
        catalogue.operation(found),
    )
    paths = {each.path for each in ours}
    for report in found.reports.values():
        if report.path in paths:
            raise OperatorError(f"the report {report.name!r} of a plug-in has the path {report.path} of another one")
        paths.add(report.path)
    return (*ours, *map(reports.operation, found.reports.values()))
