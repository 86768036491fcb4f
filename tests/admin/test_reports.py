"""The reports of plug-ins: :mod:`s2s.admin.operations.reports`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2s.admin.operations import reports
from s2s.admin.operations.operation import OperationRequest, advance, perform
from s2s.errors import InternalError, NotFound
from s2s.handlers.report import Report
from s2s.store.pool import blocking
from tests.support.postgres import DatabaseTestCase


@dataclass(frozen=True)
class _Row:
    n: int
    text: str


class ReportTests(DatabaseTestCase):
    """:func:`reports.operation` on a real database."""

    def read(self, query: str) -> Any:
        """Return the row of a report."""
        steps = perform(reports.operation(Report("bells", "Count", _Row, query)), OperationRequest("me", "observer"))
        step: Any = advance(steps, None, None)
        with blocking(self.url) as txn:
            return step(txn)

    def test_a_row(self) -> None:
        """The row of the query is the answer."""
        self.assertEqual(self.read("select 3, 'x'"), _Row(3, "x"))

    def test_a_missing_table(self) -> None:
        """A report whose tables are missing is not found, with the command that makes them."""
        for table in ("bells.bells", "s2s.bells"):
            missing = self.assertRaises(NotFound, self.read, f"select 1, n from {table}")
            self.assertIn("run: s2s db migrate", str(missing))

    def test_a_fault_of_the_query(self) -> None:
        """A wrong query is a fault of the report, which the error names, and no outage of the database."""
        for query, text in (
            ("select 1, dayy from s2s.commands", 'SQLSTATE 42703: UndefinedColumn: column "dayy" does not exist'),
            ("select 1 / 0, 'x'", "SQLSTATE 22012"),
            ("select 1, 'x' where false", "returns 0 rows of 2 columns in place of one row with n, text"),
            ("select 1, 'x' from generate_series(1, 2)", "returns 2 rows of 2 columns"),
            ("select 1", "returns 1 rows of 1 columns"),
        ):
            with self.subTest(query=query):
                fault = self.assertRaises(InternalError, self.read, query)
                self.assertIn("the report 'bells' of a plug-in has a fault: its query", str(fault))
                self.assertIn(text, str(fault))
