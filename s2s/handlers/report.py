"""The declaration of a report: numbers about a plug-in's own tables, for operators (docs/plugins.rst, "Rules")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from typing import Any, Final

from s2s.errors import OperatorError
from s2s.protocol.names import by_name

_PATH: Final = re.compile(r"/v1/[a-z0-9_.-]+(/[a-z0-9_.-]+)*")


@dataclass(frozen=True)
class Report:
    """One query that returns one row. The HTTP API serves its row to each token.

    :param name: a lower-case letter, then up to 63 of a-z, 0-9, _ and ``.``
    :param summary: a sentence about it without its full stop, for the OpenAPI document.
    :param row: the dataclass of the row; its fields are the columns in their order.
    :param query: the SQL of the query. It names each table with its schema.
    :param at: the path of the report; empty: ``/v1/reports/NAME``.
    """

    name: str
    summary: str
    row: type[Any]
    query: str
    at: str = ""

    @property
    def path(self) -> str:
        """The path of the report in the HTTP API."""
        return self.at or f"/v1/reports/{self.name}"


def registry(reports: Iterable[Report]) -> dict[str, Report]:
    """Return the reports by name.

    :raises OperatorError: a name or a path is ill-formed, a name occurs twice, or a row is no dataclass.
    """
    return by_name(reports, "report", "name", _check)


def _check(report: Report) -> None:
    if not _PATH.fullmatch(report.path):
        raise OperatorError(f"its path is {report.path!r}: write /v1/ and words of a-z, 0-9, _, - and .")
    if not is_dataclass(report.row):
        raise OperatorError("its row is no dataclass: name the class of the row")
