"""PostgreSQL, and the only importer of psycopg2.

- :mod:`~s2s.store.driver` is psycopg2 itself: how a connection is opened, and which of our errors its own become;
- :mod:`~s2s.store.pool` runs functions in transactions off the reactor's thread;
- :mod:`~s2s.store.listen` hears NOTIFY and holds the lock that says that we live;
- :mod:`~s2s.store.migrations` makes the tables from ``sql/NNNN_name.sql``;
- every table has one module of plain functions ``(txn, …)``, run by :meth:`s2s.store.pool.Database.run`.
"""
