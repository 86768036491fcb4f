"""The tables: one module of plain functions ``(txn, …)`` a table."""
