"""A database that a restore has left without some of its triggers, indexes or rows: :mod:`s2s.store.shape`."""

from __future__ import annotations

from s2s.errors import OperatorError, SchemaError
from s2s.roles.preflight import check
from s2s.store import migrations, shape
from s2s.store.pool import blocking
from s2s.store.tables import config
from tests.cli.test_cli import CliTestCase
from tests.support.postgres import DatabaseTestCase


class ShapeTests(DatabaseTestCase):
    """What is missing, and what is said of it."""

    def wrong(self) -> list[str]:
        """Return the lines."""
        with blocking(self.url) as txn:
            return list(shape.wrong(txn))

    def test_all_is_there(self) -> None:
        """A database as the migrations make it lacks nothing, and each trigger, key and unique column is looked for."""
        self.assertEqual(self.wrong(), [])
        triggers, indexes = shape._made()
        found = self.execute(
            "select tgname::text, 's2s.' || tgrelid::regclass::text from pg_trigger where not tgisinternal"
            " order by 1, 2"
        )
        self.assertEqual(sorted(triggers), found)
        found = self.execute(
            "select x.relname::text, n.nspname || '.' || c.relname from pg_index join pg_class x on x.oid = indexrelid"
            " join pg_class c on c.oid = indrelid join pg_namespace n on n.oid = c.relnamespace"
            " where indisunique and n.nspname in ('s2s', 's2s_world') and c.relname <> 'migrations' order by 1, 2"
        )
        self.assertEqual(sorted(indexes), found)

    def test_disabled_triggers(self) -> None:
        """Disabled triggers are named with the statement that enables them, and no setting changes meanwhile."""
        self.execute(
            "alter table s2s.config disable trigger user; alter table s2s.audit enable always trigger audit_keep"
        )
        [line] = self.wrong()
        self.assertRegex(line, r"^triggers of the table s2s.config are disabled \(config_audit, .*config_version\)")
        with (
            blocking(self.url) as txn,
            self.assertRaisesRegex(SchemaError, "the triggers of the table s2s.config do not"),
        ):
            config.change(txn, "executor.batch_size", 7, "a test")
        self.execute(line.rpartition("run as the owner of the table: ")[2])
        self.assertEqual(self.wrong(), [])

    def test_a_part_is_missing(self) -> None:
        """A trigger or an index that is missing is named, and a role does not start."""
        self.execute(
            "alter table s2s.idempotency_keys drop constraint idempotency_keys_pkey; drop trigger"
            " orders_given on s2s.orders"
        )
        lines = self.wrong()
        self.assertRegex(lines[0], "^the table s2s.orders lacks the trigger orders_given, as after a restore in part")
        self.assertRegex(
            lines[1], "^the table s2s.idempotency_keys lacks the unique index idempotency_keys_pkey, as after"
        )
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', repeat('A', 43) || '=', 'any')")
        with self.assertRaisesRegex(OperatorError, "lacks the trigger orders_given"):
            check(self.url, "server")

    def test_the_version(self) -> None:
        """Without its row the version is that of the history, and a migration makes the row anew."""
        with blocking(self.url) as txn:
            config.change(txn, "executor.batch_size", 7, "a test")
            version = config.change(txn, "executor.batch_size", 8, "a test")
        self.execute("truncate s2s.config_version")
        self.assertEqual(
            self.wrong(),
            ["the table s2s.config_version lacks its row, as after a restore in part: run: s2s db migrate"],
        )
        with blocking(self.url) as txn:
            self.assertEqual(config.read(txn).version, version)
            migrations.migrate(txn.connection)
            self.assertEqual(config.change(txn, "executor.batch_size", 9, "a test"), version + 1)
        self.assertEqual(self.wrong(), [])


class StatusTests(CliTestCase):
    """``s2s db status``."""

    def test_it_names_them(self) -> None:
        """It lists each, and exits with 1."""
        self.execute("alter table s2s.orders disable trigger orders_given")
        result = self.s2s("db", "status", expected=1)
        self.assertIn("triggers of the table s2s.orders are disabled (orders_given)", result.output + result.stderr)
