"""A database that a partial restore left without some triggers, indexes or rows: :mod:`s2s.store.shape`."""

from __future__ import annotations

from s2s.errors import OperatorError, SchemaError
from s2s.roles.preflight import check
from s2s.store import migrations, shape
from s2s.store.kept_rows import Guard
from s2s.store.pool import blocking
from s2s.store.tables import config
from tests.cli.test_cli import CliTestCase
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase, migrate


class ShapeTests(DatabaseTestCase):
    """The missing parts, and the lines that report them."""

    def wrong(self) -> list[str]:
        """Return the lines that report missing parts."""
        with blocking(self.url) as txn:
            return list(shape.wrong(txn))

    def foreign(self) -> list[Guard]:
        """Return the constraints and unique indexes that s2s has not made."""
        with blocking(self.url) as txn:
            return shape.foreign(txn)

    def test_all_is_there(self) -> None:
        """A migrated database lacks nothing, and every object that the migrations make is checked."""
        self.assertEqual((self.wrong(), self.foreign()), ([], []))
        made = shape._made(migrations.available())
        found = self.execute(
            "select tgname::text, 's2s.' || tgrelid::regclass::text from pg_trigger where not tgisinternal"
            " order by 1, 2"
        )
        self.assertEqual(sorted(made.triggers), found)
        found = self.execute(
            "select x.relname::text, n.nspname || '.' || c.relname from pg_index join pg_class x on x.oid = indexrelid"
            " join pg_class c on c.oid = indrelid join pg_namespace n on n.oid = c.relnamespace"
            " where indisunique and n.nspname = 's2s' and c.relname <> 'migrations' order by 1, 2"
        )
        self.assertEqual(sorted(made.indexes), found)
        found = self.execute(
            "select c.oid::regclass::text, attname::text from pg_attribute a join pg_class c on c.oid = attrelid"
            " where attnum > 0 and relkind = 'r' and relname <> 'migrations'"
            " and relnamespace = 's2s'::regnamespace"
        )
        self.assertEqual({(table.rpartition(".")[2], name) for table, name in made.columns}, set(found))
        self.assertEqual({table for table, _ in made.columns}, set(made.tables))
        self.assertEqual(set(made.tables), migrations.tables())
        self.execute("set search_path = pg_catalog")
        found = self.execute("select oid::regprocedure::text from pg_proc where pronamespace = 's2s'::regnamespace")
        self.assertEqual({(name,) for name in made.functions}, set(found))

    def test_what_an_owner_changes(self) -> None:
        """A changed or missing table, column or function is named, and the line's statement repairs it."""
        self.execute("create table public.child () inherits (s2s.commands)")
        self.execute(
            "alter table s2s.commands set unlogged; alter table s2s.outbox drop column attempts;"
            "alter table s2s.database drop column database_id; alter table s2s.steering alter column answer type text;"
            "alter function s2s.notify() reset search_path;"
            "alter function s2s.changed(jsonb, jsonb, text[]) set search_path = s2s"
        )
        lines = self.wrong()
        for line, start in zip(
            lines,
            (
                "the table s2s.commands is unlogged, and a crash",
                "the rows of the table public.child, which inherits from s2s.commands, count as rows of s2s.commands",
                "the table s2s.database lacks the column database_id: restore",
                "the table s2s.outbox lacks the column attempts: restore",
                "the column answer of the table s2s.steering has the type text: run",
                "the function s2s.changed(jsonb,jsonb,text[]) resolves names by",
                "the function s2s.notify() resolves names by",
            ),
            strict=True,
        ):
            self.assertTrue(line.startswith(start), line)
            self.execute(line.rpartition(": ")[2])
        self.assertEqual(self.wrong(), [])

    def test_values_that_are_not_written(self) -> None:
        """A column for which s2s writes no value refuses a start, and the line's statement repairs it."""
        self.execute(
            "create domain public.needed as text not null;"
            "alter table s2s.commands add \"Owner's\" text not null, add fine text not null default '',"
            " add number bigint generated always as identity, add twice integer not null generated always as"
            " (attempts * 2) stored, add empty text, alter column error set not null,"
            " alter column attempts drop default, alter column cmd_id drop identity;"
            "alter table s2s.database alter column database_id drop default"
        )
        lines = self.wrong()
        for line, start in zip(
            lines,
            (
                "the column cmd_id of the table s2s.commands has lost its numbers: run",
                "the column attempts of the table s2s.commands has lost its default: run",
                "the column error of the table s2s.commands takes no null, and s2s writes nulls: run",
                "the column Owner's of the table s2s.commands, which s2s has not made, needs a value",
                "the column database_id of the table s2s.database has lost its default: run",
            ),
            strict=True,
        ):
            self.assertTrue(line.startswith(start), line)
            self.execute(line.partition("run as the owner of the table: ")[2])
        self.assertEqual(self.wrong(), [])

    def test_publications(self) -> None:
        """A published table without a replica identity is named, and the line's statement repairs it."""
        self.execute(
            "create table public.other (id bigint primary key); alter table public.other replica identity nothing;"
            "alter table s2s.commands replica identity nothing; alter table s2s.outbox replica identity full;"
            "create publication only_new for all tables with (publish = 'insert')"
        )
        self.assertEqual(self.wrong(), [])
        self.execute('create publication "All" for all tables')
        [line] = self.wrong()
        self.assertIn('of the table s2s.commands can be changed, because the publication "All" finds no replica', line)
        self.execute(line.rpartition(": ")[2])
        self.assertEqual(self.wrong(), [])

    def test_constraints_of_others(self) -> None:
        """Each constraint and unique index that s2s has not made is named, and the line's statement removes it."""
        self.execute(
            "create table public.mine (id bigint primary key);"
            'alter table s2s.commands add constraint "Small" check (priority < 50), add unique (payload),'
            " add foreign key (cmd_id) references public.mine, add exclude (priority with =);"
            "create unique index once on s2s.outbox (due_at); create index slow on s2s.outbox (due_at)"
        )
        found = self.foreign()
        self.assertEqual(
            [(each.table, each.kind, each.name) for each in found],
            [
                ("s2s.commands", "constraint", '"Small"'),
                ("s2s.commands", "constraint", "commands_cmd_id_fkey"),
                ("s2s.commands", "constraint", "commands_payload_key"),
                ("s2s.commands", "constraint", "commands_priority_excl"),
                ("s2s.outbox", "index", "s2s.once"),
            ],
        )
        for each in found:
            self.execute(each.cure)
        self.assertEqual((self.foreign(), self.wrong()), ([], []))

    def test_what_an_owner_removes(self) -> None:
        """A missing table or function is named, and a view in place of a table is named too."""
        self.execute(
            "drop table s2s.notices; drop function s2s.action(text) cascade;"
            "alter table s2s.broadcasts rename to elsewhere; create view s2s.broadcasts as select * from s2s.elsewhere"
        )
        lines = "\n".join(self.wrong())
        self.assertIn("the table s2s.notices is missing, as after a restore in part", lines)
        self.assertIn("the function s2s.action(text) is missing: run as the owner of the tables the statement", lines)
        self.assertIn("in the file s2s/store/sql/0001_initial.sql", lines)
        self.assertIn("s2s.broadcasts is no ordinary table", lines)

    def test_before_a_migration(self) -> None:
        """Objects of a migration that is not applied yet are not reported as missing."""
        self.execute("drop schema s2s_world cascade; delete from s2s.migrations where schema = 's2s_world'")
        self.assertEqual(self.wrong(), [])
        self.execute("drop schema s2s cascade")
        self.assertEqual(self.wrong(), [])

    def test_disabled_triggers(self) -> None:
        """Disabled triggers are named with the statement that enables them, and settings cannot change meanwhile."""
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
        """A missing trigger or unique index is named, and a role does not start."""
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
            check(self.url, "server", FOUND)

    def test_the_version(self) -> None:
        """Without the row of ``config_version`` the version is that of the history, and a migration adds the row."""
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
            migrate(txn.connection)
            self.assertEqual(config.change(txn, "executor.batch_size", 9, "a test"), version + 1)
        self.assertEqual(self.wrong(), [])


class StatusTests(CliTestCase):
    """``s2s db status``."""

    def test_it_names_them(self) -> None:
        """The command lists each problem, and exits with 1."""
        self.execute("alter table s2s.orders disable trigger orders_given")
        self.execute("alter table s2s.commands add constraint small check (priority < 50), add mine text not null")
        result = self.s2s("db", "status", expected=1)
        self.assertIn("alter table s2s.commands drop constraint small", result.output + result.stderr)
        self.assertIn("alter table s2s.commands alter column mine drop not null", result.output + result.stderr)
        self.assertIn("triggers of the table s2s.orders are disabled (orders_given)", result.output + result.stderr)
