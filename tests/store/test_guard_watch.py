"""Foreign triggers and rules on our tables: :mod:`s2s.store.monitors.guard_watch`."""

from __future__ import annotations

import psycopg2
from twisted.internet import reactor
from twisted.logger import capturedLogs, formatEvent

from s2s.errors import StatementRefused
from s2s.runtime.clock import Clock
from s2s.store.monitors import guard_watch, probe
from s2s.store.monitors.guard_watch import GuardWatch
from s2s.store.pool import blocking
from tests.cli.test_cli import CliTestCase
from tests.support.postgres import DatabaseTestCase

_KEEP = (
    "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
    " return null; end $$;"
)


class GuardWatchTests(DatabaseTestCase):
    """Each foreign trigger or rule is logged once, and those that keep rows are recorded."""

    def look(self) -> list[str]:
        """Return the triggers and rules that keep rows."""
        with blocking(self.url) as txn:
            return guard_watch.look(txn)[1]

    async def test_one_line(self) -> None:
        """A trigger, a rule and a constraint are each logged when they appear, and when they disappear."""
        self.execute(_KEEP)
        database, _ = self.pools("s2s-guards")
        watch = GuardWatch(database, Clock(reactor))
        with capturedLogs() as told:
            await watch.look()
            self.assertEqual((told, watch.kept), ([], ""))
            self.execute(
                "create trigger stop before delete on s2s.outbox for each row execute function keep();"
                "create rule quiet as on update to s2s.orders do instead nothing;"
                "alter table s2s.commands add constraint small check (priority < 50)"
            )
            for _ in range(2):
                await watch.look()
            kept = watch.kept
            self.execute(
                "drop trigger stop on s2s.outbox; drop rule quiet on s2s.orders;"
                "alter table s2s.commands drop constraint small"
            )
            await watch.look()
        self.assertEqual(watch.kept, "")
        self.assertIn("(delete on s2s.outbox)", kept)
        self.assertIn("drop rule quiet on s2s.orders", kept)
        lines = [str(formatEvent(event)) for event in told]
        self.assertEqual(len(lines), 6, lines)
        self.assertIn("the constraint small on s2s.commands (insert or update): if it refuses a row", lines[2])
        self.assertIn("alter table s2s.commands drop constraint small", lines[2])
        self.assertIn("the rule quiet on s2s.orders (update): where it keeps a row", lines[0])
        self.assertIn("the trigger stop on s2s.outbox (delete, function public.keep()): where", lines[1])
        self.assertIn("drop trigger stop on s2s.outbox", lines[1])

    def test_each_trial(self) -> None:
        """A trial write finds a trigger that keeps all rows of a table, and leaves no rows behind."""
        self.execute(_KEEP)
        for table, (_, column, _) in guard_watch._TRIALS.items():
            for when in ("insert", "update", "delete") if column else ("insert",):
                with self.subTest(table=table, when=when):
                    self.execute(f"create trigger stop before {when} on {table} for each row execute function keep()")
                    [line] = self.look()
                    self.assertIn(f"({when} on {table})", line)
                    self.execute(f"drop trigger stop on {table}")
                    self.assertEqual(self.execute(f"select count(*) from {table}"), [(0,)])

    def test_the_old_row(self) -> None:
        """A trial update and the probe find a trigger that prevents an update by returning the old row."""
        self.execute(
            "create function old_row() returns trigger language plpgsql set search_path from current as $$ begin"
            " return old; end $$"
        )
        changed = {table for table, (_, column, _) in guard_watch._TRIALS.items() if column}
        for table in sorted(changed | {"s2s.batch_notes"}):
            with self.subTest(table=table):
                self.execute(f"create trigger stop before update on {table} for each row execute function old_row()")
                if table in changed:
                    self.assertIn(f"(update on {table})", "".join(self.look()))
                if table in ("s2s.commands", "s2s.batch_notes"):
                    with (
                        self.assertRaisesRegex(StatementRefused, "update on .*drop trigger"),
                        blocking(self.url) as txn,
                    ):
                        probe.check(txn)
                self.execute(f"drop trigger stop on {table}")

    def test_a_locked_table(self) -> None:
        """A table that another session has locked is skipped, and the other tables are tried."""
        self.execute(_KEEP)
        for table in ("broadcasts", "outbox"):
            self.execute(f"create trigger stop before delete on s2s.{table} for each row execute function keep()")
        holder = psycopg2.connect(self.url)
        self.addCleanup(holder.close)
        holder.cursor().execute("lock table s2s.broadcasts in share mode")
        [line] = self.look()
        self.assertIn("(delete on s2s.outbox)", line)

    def test_what_does_no_harm(self) -> None:
        """A trigger that returns its row, or that is disabled, is not reported as keeping rows."""
        self.execute(
            "create function pass() returns trigger language plpgsql set search_path from current as $$ begin"
            " return coalesce(new, old); end $$;"
            + _KEEP
            + "create trigger pass before insert or update or delete on s2s.outbox for each row execute"
            " function pass();"
            "create trigger stop before insert on s2s.notices for each row execute function keep();"
            "create trigger stop before insert on s2s.outbox for each row execute function keep();"
            "alter table s2s.outbox disable trigger stop; alter table s2s.notices disable trigger stop"
        )
        self.assertEqual(self.look(), [])


class StatusTests(CliTestCase):
    """``s2s db status``."""

    def test_it_names_them(self) -> None:
        """The command lists triggers and rules with the statements to remove them; it exits with 1 if rows are kept."""
        self.execute(
            _KEEP + "create trigger later before insert on s2s.notices for each row when (new.message = 'x')"
            " execute function keep()"
        )
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', repeat('A', 43) || '=', 'any')")
        result = self.s2s("db", "status")
        self.assertIn(
            "trigger later on s2s.notices (insert, function public.keep()); to remove it: drop", result.stderr
        )
        self.execute("create rule quiet as on update to s2s.orders do instead nothing")
        result = self.s2s("db", "status", expected=1)
        self.assertIn("drop rule quiet on s2s.orders", result.stderr)

    def test_it_names_those_that_only_fail(self) -> None:
        """The command also lists triggers that keep no row but can fail: AFTER triggers and statement triggers."""
        self.execute(
            _KEEP + "create trigger row_after after insert or update on s2s.commands for each row execute function"
            " keep();"
            "create trigger all_before before truncate on s2s.orders for each statement execute function keep()"
        )
        said = self.s2s("db", "status").stderr
        self.assertIn("trigger row_after on s2s.commands (insert or update, function public.keep()); to remove", said)
        self.assertIn("drop trigger all_before on s2s.orders", said)
