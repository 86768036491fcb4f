"""The console script and the operating system: variables, streams, signals and lost terminals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg2
from twisted.internet.defer import inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import TestCase

from s2s.errors import DatabaseUnavailable, SchemaError
from s2s.roles import preflight
from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.store import migrations, sequences, sqlstate
from s2s.store.pool import blocking
from s2s.store.tables import lists
from tests.cli.test_cli import CliTestCase
from tests.support.cluster import Cluster
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import PATIENCE_S, environment, start_process
from tests.support.waiting import poll

_S2S = str(Path(sys.executable).with_name("s2s"))


class EmptyTests(CliTestCase):
    """Options and variables that are set to an empty text, as by a deployment without a value."""

    def refused(self, source: str, *argv: str, **variables: str) -> None:
        """Assert that a command is refused in one line that names the source of the empty value."""
        said = self.s2s(*argv, expected=1, env=dict(variables)).output
        self.assertEqual(said.count("\n"), 1)
        self.assertIn(f"{source} is empty", said)

    def test_options(self) -> None:
        """An empty option is refused, and not treated as absent."""
        for option in ("--database", "--url", "--token-file", "--state-dir"):
            self.refused(option, "keys", "list", option, "")

    def test_variables(self) -> None:
        """An empty variable is refused, because the command would otherwise use the embedded database."""
        for variable in ("S2S_DATABASE_URL", "S2S_URL", "S2S_TOKEN_FILE", "S2S_STATE_DIR"):
            self.refused(variable, "keys", "list", **{variable: ""})
        self.refused("S2S_DATABASE_URL", "db", "status", S2S_DATABASE_URL=" ")

    def test_what_is_typed_goes_first(self) -> None:
        """A variable that an option overrides may be empty."""
        self.s2s("keys", "list", "--database", self.url, env={"S2S_DATABASE_URL": ""})


class ProcessTestCase(TestCase):
    """Runs ``s2s`` in a process of its own.

    :ivar url: the database of the commands.
    """

    url = ""

    def start(self, *argv: str, stdout: Any = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
        """Start one command on the test's database."""
        return start_process(self, [_S2S, *argv], stdout=stdout, **{DATABASE_VARIABLE: self.url, **variables})

    def ended(self, process: subprocess.Popen[str], code: int) -> tuple[str, str]:
        """Assert the exit code of a process and the absence of a traceback, and return its stdout and stderr."""
        output, errors = process.communicate(timeout=PATIENCE_S)
        self.assertEqual(process.returncode, code, errors)
        self.assertNotIn("Traceback", errors)
        self.assertNotIn("Exception ignored", errors)
        return output or "", errors


class DatabaseProcessTestCase(ProcessTestCase, DatabaseTestCase):
    """Runs ``s2s`` on the test's database."""

    def lock(self, statement: str) -> int:
        """Leave a transaction open after a statement, and return the pid of its session."""
        conn = psycopg2.connect(self.url, application_name="a forgotten psql")
        self.addCleanup(conn.close)
        conn.cursor().execute(statement)
        # A test that waits for its own lock would never end.
        self.execute("set lock_timeout = '20s'")
        return int(conn.info.backend_pid)

    def backends(self, of: str = "s2s cli", state: str = "true") -> int:
        """Count the sessions of a program."""
        theirs = "datname = current_database() and application_name = %s"
        [(count,)] = self.execute(f"select count(*) from pg_stat_activity where {theirs} and {state}", of)
        return int(count)


def _is_caught(status: Path, number: int) -> bool:
    """Return whether a process handles a signal, by its file in ``/proc``."""
    [mask] = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


class LostTests(DatabaseProcessTestCase):
    """Commands that end while they wait for the database."""

    @inlineCallbacks
    def test_behind_a_lock(self) -> Any:
        """Ctrl-C ends a command that waits for a lock at once; after any signal its session ends."""
        self.lock("lock table s2s.migrations")
        for number, code in ((signal.SIGINT, 1), (signal.SIGTERM, -15), (signal.SIGKILL, -9)):
            process = self.start("keys", "list")
            yield poll(lambda: self.backends(state="wait_event_type = 'Lock'") == 1, "it waits for the lock")
            process.send_signal(number)
            self.ended(process, code)
            yield poll(lambda: self.backends() == 0, "its backend is gone")

    def test_as_process_1(self) -> None:
        """SIGTERM has a handler, because the kernel ignores it for process 1 of a container without one."""
        self.lock("lock table s2s.migrations")
        process = self.start("keys", "list")
        status = Path(f"/proc/{process.pid}/status")
        deadline = time.monotonic() + PATIENCE_S
        while not _is_caught(status, signal.SIGTERM):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        self.ended(process, -15)

    def test_a_host_that_does_not_answer(self) -> None:
        """Ctrl-C ends a command whose host accepts the connection and does not answer."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            silent.settimeout(PATIENCE_S)
            url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/d?connect_timeout=600"
            process = self.start("keys", "list", "--database", url)
            connected, _ = silent.accept()
            with connected:
                process.send_signal(signal.SIGINT)
                self.ended(process, 1)


class MigrateTests(DatabaseProcessTestCase):
    """``s2s db migrate`` during a transaction of another session."""

    @inlineCallbacks
    def test_others_get_through(self) -> Any:
        """While a migration waits for an open transaction, which it names, other sessions can insert rows."""
        holder = psycopg2.connect(self.url, application_name="a forgotten psql")
        self.addCleanup(holder.close)
        holder.cursor().execute("select from s2s.outbox")
        later = migrations.Migration("s2s", 2, "0002_later", "alter table s2s.outbox add column later integer")
        ours = migrations.available()
        self.patch(migrations, "available", lambda plugins=(): (*ours, later))
        said: list[str] = []

        def migrate() -> list[str]:
            with blocking(self.url, "s2s cli") as txn:
                return migrations.migrate(txn.connection, tell=said.append)

        migrated = deferToThread(migrate)
        yield poll(lambda: self.backends(state="wait_event_type = 'Lock'") == 1, "it waits for the lock")
        self.execute("set lock_timeout = '20s'")
        self.execute("insert into s2s.outbox (cmd_type, idem_key, payload) values ('a.b', 'k', '{}')")
        yield poll(lambda: bool(said), "it says so")
        pid = holder.info.backend_pid
        self.assertIn(f"pid {pid} holds them (a forgotten psql, idle in transaction, in a transaction for ", said[0])
        self.assertIn(f"select pg_terminate_backend({pid})", said[0])
        self.assertNotIn("from s2s.outbox", said[0])
        holder.rollback()
        done = yield migrated
        self.assertEqual(done, ["s2s/0002_later"])
        self.assertEqual([line for line in said if not line.startswith("waiting for locks: ")], [])

    def test_in_vain(self) -> None:
        """If the lock is not free in time the command ends, and its last line names the session that holds it."""
        pid = self.lock("lock table s2s.migrations")
        output, errors = self.ended(self.start("db", "migrate", "--wait", "4"), 1)
        self.assertEqual(output, "")
        self.assertIn(f"not free within 4 s: pid {pid} holds them", errors.splitlines()[-1])

    @inlineCallbacks
    def test_ctrl_c(self) -> Any:
        """Ctrl-C ends a migration that waits for another one at once, and SIGKILL leaves no session."""
        self.lock(f"select pg_advisory_xact_lock({migrations._LOCK})")
        for number, code in ((signal.SIGINT, 1), (signal.SIGKILL, -9)):
            process = self.start("db", "migrate")
            yield poll(lambda: self.backends(state="wait_event = 'advisory'") == 1, "it waits for the lock")
            process.send_signal(number)
            self.ended(process, code)
            yield poll(lambda: self.backends() == 0, "its backend is gone")


class LateTests(DatabaseProcessTestCase):
    """Messages of a command while the database does not answer."""

    @inlineCallbacks
    def test_behind_a_lock(self) -> Any:
        """A command that waits for a lock names the session that holds it, once, and continues afterwards."""
        holder = psycopg2.connect(self.url, application_name="a forgotten psql")
        self.addCleanup(holder.close)
        holder.cursor().execute("update s2s.s2s_keys set note = ''; lock table s2s.s2s_keys in share mode")
        process = self.start("keys", "add", "--key-id", "k9", "--role", "any")
        assert process.stderr is not None
        said = yield deferToThread(process.stderr.readline)
        self.assertIn(f"waiting for locks: pid {holder.info.backend_pid} holds them (a forgotten psql, ", said)
        holder.rollback()
        _, errors = self.ended(process, 0)
        self.assertNotIn("waiting", errors)

    @inlineCallbacks
    def test_a_list_behind_a_lock(self) -> Any:
        """A list that waits for a lock names the session that holds it, and is complete when the lock is free."""
        holder = psycopg2.connect(self.url, application_name="a forgotten psql")
        self.addCleanup(holder.close)
        for argv, table in (
            (("order", "list"), "orders"),
            (("notices", "list"), "notices"),
            (("commands", "list"), "commands"),
            (("audit",), "audit"),
            (("jobs", "list"), "jobs"),
        ):
            holder.cursor().execute(f"lock table s2s.{table} in access exclusive mode")
            process = self.start(*argv, "--json")
            assert process.stderr is not None
            said = yield deferToThread(process.stderr.readline)
            self.assertIn(f"waiting for locks: pid {holder.info.backend_pid} holds them (a forgotten psql, ", said)
            with self.assertRaises(subprocess.TimeoutExpired):
                process.wait(lists.LIMIT_S)
            holder.rollback()
            output, errors = self.ended(process, 0)
            self.assertEqual((json.loads(output), errors), ([], ""))

    @inlineCallbacks
    def test_at_work(self) -> Any:
        """A command whose statement takes long names its wait event, and Ctrl-C ends it at once."""
        self.execute(
            "create function slow() returns trigger language plpgsql set search_path from current as"
            " $$ begin perform pg_sleep(50); return new; end $$;"
            "create trigger slow before insert on s2s.broadcasts for each row execute function slow()"
        )
        process = self.start("broadcast", "hello")
        assert process.stderr is not None
        said = yield deferToThread(process.stderr.readline)
        self.assertRegex(
            said, "^waiting for the database: its session, pid [0-9]+, is in the wait event Timeout/PgSleep$"
        )
        process.send_signal(signal.SIGINT)
        self.ended(process, 1)


class StandbyTests(ProcessTestCase):
    """COMMITs that wait for a synchronous standby that does not exist."""

    def setUp(self) -> None:
        """Start a separate PostgreSQL, because the setting applies to a whole cluster."""
        self.cluster = Cluster()
        self.addCleanup(self.cluster.remove)
        self.cluster.migrate()
        self.url = self.cluster.url
        self.standby("nobody")

    def standby(self, name: str) -> None:
        """Set the name of the synchronous standby."""
        conn = psycopg2.connect(self.url)
        conn.autocommit = True
        try:
            conn.cursor().execute("alter system set synchronous_standby_names = %s", (name,))
            conn.cursor().execute("select pg_reload_conf()")
        finally:
            conn.close()

    @inlineCallbacks
    def late(self, key_id: str) -> Any:
        """Add a key, and return the process and the first line of its stderr."""
        process = self.start("keys", "add", "--key-id", key_id, "--role", "any")
        assert process.stderr is not None
        line = yield deferToThread(process.stderr.readline)
        return process, line

    @inlineCallbacks
    def test_no_standby(self) -> Any:
        """Commands report a COMMIT that waits for a standby, its lock, and the queue for the lock; all end well."""
        first, saying = yield self.late("k1")
        self.assertIn("waits until a synchronous standby confirms its COMMIT: see synchronous_standby_names", saying)
        second, saying = yield self.late("k2")
        self.assertRegex(
            saying, r"^waiting for locks: pid [0-9]+ holds them \(s2s cli, .*\), and waits until a synchron"
        )
        third, saying = yield self.late("k3")
        self.assertIn(", and waits for a lock itself", saying)
        self.assertNotIn("pg_terminate_backend", saying)
        self.standby("")
        for process in (first, second, third):
            self.ended(process, 0)

    @inlineCallbacks
    def test_a_frozen_database(self) -> Any:
        """A command reports that the database answers no session, and Ctrl-C ends the wait."""
        conn = psycopg2.connect(self.url)
        self.addCleanup(conn.close)
        conn.autocommit = True
        cursor = conn.cursor()

        def is_waiting() -> bool:
            cursor.execute("select count(*) from pg_stat_activity where wait_event = 'SyncRep'")
            return cursor.fetchall() == [(1,)]

        process = self.start("keys", "add", "--key-id", "k1", "--role", "any")
        yield poll(is_waiting)
        self.cluster.freeze()
        self.addCleanup(self.cluster.thaw)
        assert process.stderr is not None
        saying = yield deferToThread(process.stderr.readline)
        self.assertEqual(saying, "waiting for the database: it answers no other session either\n")
        process.send_signal(signal.SIGINT)
        self.ended(process, 1)


class SequenceTests(CliTestCase):
    """Rows that were restored without the sequences of their ids, and other faults of sequences."""

    def test_restored_rows(self) -> None:
        """``db status`` and the start of a role name each sequence that is behind; ``fix-sequences`` repairs it."""
        self.execute("insert into s2s.broadcasts (broadcast_id, message) values (7, 'old')")
        self.execute("select setval(pg_get_serial_sequence('s2s.outbox', 'outbox_id'), 5)")
        self.execute(
            "insert into s2s.outbox (outbox_id, cmd_type, idem_key, payload)"
            " select id, 'a.b', id, '{}' from generate_series(1, 9) id"
        )
        refused = str(self.assertRaises(SchemaError, preflight.check, self.url, "server", FOUND))
        self.assertIn("broadcasts.broadcast_id stands at 0 and the largest id is 7", refused)
        self.assertIn("run: s2s db fix-sequences", refused)
        self.assertNotIn("\n", refused)
        said = self.s2s("db", "status", expected=1).output
        self.assertIn("broadcasts.broadcast_id stands at 0", said)
        self.assertIn("outbox.outbox_id stands at 5 and the largest id is 9, as after a restore", said)
        fixed = self.s2s("db", "fix-sequences").output
        self.assertEqual(fixed.count("set to "), 2)
        self.s2s("db", "status")
        self.assertIn("no sequence is behind its table", self.s2s("db", "fix-sequences").output)
        [(key,)] = self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) values ('a.b', 'new', '{}') returning outbox_id"
        )
        self.assertEqual(key, 10)

    def test_restored_while_roles_run(self) -> None:
        """A collision of any sequence's id in a statement of s2s has an error with the cure ``fix-sequences``."""
        self.execute("insert into s2s.commands (cmd_type, idem_key, payload) values ('a.b', 'k', '{}')")
        with blocking(self.url) as txn:
            txn.execute(sequences._OWNED, (list(migrations.tables()),))
            owned = [(row[0], row[1]) for row in txn.fetchall()]
        values = {
            "audit": "insert into s2s.audit (actor, action, {id}) overriding system value values ('x', 'y', 1)",
            "batch_notes": "insert into s2s.batch_notes (boot_id, worker, cmd_ids, {id}) overriding system value"
            " values ('x', 1, '{{}}', 1)",
            "broadcasts": "insert into s2s.broadcasts (message, {id}) values ('x', 1)",
            "commands": "insert into s2s.commands (cmd_type, idem_key, payload, {id}) values ('a.b', 'l', '{{}}', 1)",
            "notices": "insert into s2s.notices (cmd_id, scope, severity, message, {id})"
            " values (nextval('s2s.outbox_outbox_id_seq'), 'global', 'info', 'x', 1)",
            "outbox": "insert into s2s.outbox (cmd_type, idem_key, payload, {id}) values ('a.b', 'k', '{{}}', 1)",
            "steering": "insert into s2s.steering (engine, type, payload, actor, expires_at, {id})"
            " values ('e', 's2s.engine.pause', '{{}}', 'x', now(), 1)",
        }
        self.assertEqual(set(values), {table for table, _ in owned})
        for table, column in owned:
            statement = values[table].format(id=column)
            with self.subTest(table=table):
                self.execute(f"delete from {table}" if table != "audit" else "select 1")
                self.execute(statement)
                error = self.assertRaises(psycopg2.Error, self.execute, statement)
                self.assertEqual(sqlstate.of(error).cure, "")  # the error of a statement that is not ours
                said = self.assertRaises(DatabaseUnavailable, self.by_ours, statement)
                self.assertEqual(sqlstate.meaning(said.state).cure, "run: s2s db fix-sequences", said)

    def by_ours(self, statement: str) -> None:
        """Run a statement as s2s does."""
        with blocking(self.url) as txn:
            txn.execute(statement)

    def test_exhausted(self) -> None:
        """``db status`` names each sequence near or at its bound; a role does not start with one at its bound."""
        self.execute("select setval('s2s.commands_cmd_id_seq', 995); alter sequence commands_cmd_id_seq maxvalue 1000")
        self.execute("select setval('s2s.outbox_outbox_id_seq', 9); alter sequence outbox_outbox_id_seq maxvalue 9")
        self.execute("select setval('s2s.notices_notice_id_seq', 9223372036854775807)")
        self.execute("select setval('s2s.broadcasts_broadcast_id_seq', 900);")
        self.execute("alter sequence broadcasts_broadcast_id_seq maxvalue 1000")
        refused = str(self.assertRaises(SchemaError, preflight.check, self.url, "server", FOUND))
        self.assertIn("is exhausted", refused)
        self.assertNotIn("\n", refused)
        said = self.s2s("db", "status", expected=1).output
        self.assertIn("commands.cmd_id stands at 995, its bound is 1000, and it has 5 values left", said)
        self.assertNotIn("broadcasts", said)
        cures = [line.rpartition(": ")[2] for line in said.splitlines() if "its bound is" in line]
        self.assertEqual(len(cures), 3)
        for cure in cures:
            self.execute(cure)
        self.s2s("db", "status")

    def test_an_id_that_no_answer_can_carry(self) -> None:
        """An id above 2^53 - 1 is reported with its cure, does not advance the sequence, and prevents no start."""
        self.execute(
            "insert into s2s.commands (cmd_id, cmd_type, idem_key, payload) values"
            " (9223372036854775807, 'a.b', 'k', '{}'), (3, 'a.b', 'l', '{}')"
        )
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', repeat('A', 43) || '=', 'any')")
        refused = str(self.assertRaises(SchemaError, preflight.check, self.url, "server", FOUND))
        self.assertIn("commands.cmd_id stands at 0 and the largest id is 3", refused)
        self.assertIn("set to 3: ", self.s2s("db", "fix-sequences").output)
        with capturedLogs() as told:
            preflight.check(self.url, "server", FOUND)
        [line] = [str(formatEvent(event)) for event in told]
        self.assertIn("the id of a row of s2s.commands is 9223372036854775807, and above 9007199254740991", line)
        self.execute("select setval('s2s.commands_cmd_id_seq', 9223372036854775807)")
        said = self.s2s("db", "status", expected=1).output
        self.assertIn("and it is exhausted", said)
        for cure in [each.rpartition(": ")[2] for each in said.splitlines() if "s2s.commands" in each]:
            self.execute(cure)
        self.s2s("db", "status")
        self.assertEqual(self.execute("select cmd_id from s2s.commands order by 1"), [(3,), (4,)])

    def test_a_locked_table(self) -> None:
        """A start and ``db status`` skip a table that another session has locked, and report this in a line."""
        self.execute("insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', repeat('A', 43) || '=', 'any')")
        self.execute("insert into s2s.broadcasts (broadcast_id, message) values (7, 'old')")
        holder = psycopg2.connect(self.url)
        self.addCleanup(holder.close)
        holder.cursor().execute("lock table s2s.audit, s2s.broadcasts, s2s.outbox")
        with capturedLogs() as told:
            preflight.check(self.url, "server", FOUND)
        lines = [str(formatEvent(event)) for event in told]
        self.assertEqual(len(lines), 3, lines)
        self.assertIn("the sequence of s2s.audit.audit_id is not checked, since another session has locked", lines[0])
        self.assertIn("s2s.broadcasts.broadcast_id is not checked", self.s2s("db", "status", expected=1).output)

    @inlineCallbacks
    def test_fixed_while_others_work(self) -> Any:
        """The repair of a sequence waits for its table in short attempts, between which other sessions can write."""
        self.execute("insert into s2s.broadcasts (broadcast_id, message) values (7, 'old')")
        self.execute(
            "insert into s2s.steering (request_id, engine, type, payload, expires_at)"
            " values (7, 'x', 's2s.engine.pause', '{}', now())"
        )
        holder = psycopg2.connect(self.url)
        self.addCleanup(holder.close)
        holder.cursor().execute("update s2s.steering set engine = 'y'")
        told: list[str] = []
        fixed: list[str] = []

        def fix() -> None:
            with blocking(self.url) as txn:
                for each in sequences.fix(txn.connection, told.append):
                    fixed.append(each.table)

        fixing = deferToThread(fix)
        yield poll(lambda: told)
        self.assertIn(f"pid {holder.info.backend_pid} holds them", told[0])
        self.assertEqual(fixed, ["s2s.broadcasts"])
        self.assertEqual(self.execute("select last_value from s2s.broadcasts_broadcast_id_seq"), [(7,)])
        self.execute("set lock_timeout = '10s'")
        self.execute("insert into s2s.broadcasts (message) values ('new')")
        self.execute(
            "insert into s2s.steering (engine, type, payload, expires_at) values ('x', 's2s.engine.pause', '{}', now())"
        )
        holder.rollback()
        yield fixing
        self.assertEqual(fixed, ["s2s.broadcasts", "s2s.steering"])

    def test_while_others_work(self) -> None:
        """Rows that are inserted during the check cause no false report."""
        session = self.execute

        class Busy:
            """A cursor that inserts a row on another session before and after each statement."""

            def __init__(self, txn: Any) -> None:
                self._txn = txn

            def __getattr__(self, name: str) -> Any:
                return getattr(self._txn, name)

            def execute(self, *statement: Any) -> None:
                session("insert into s2s.broadcasts (message) values ('beside')")
                self._txn.execute(*statement)
                session("insert into s2s.broadcasts (message) values ('beside')")

        with blocking(self.url) as txn:
            busy: Any = Busy(txn)
            self.assertEqual(list(sequences.wrong(busy)), [])

    def test_every_identity_is_watched(self) -> None:
        """Every identity column of the schema is checked, and tables of other schemas are not."""
        self.execute("create table public.theirs (id bigint generated by default as identity)")
        self.execute("insert into public.theirs values (7)")
        columns = self.execute(
            "select table_name, column_name from information_schema.columns where is_identity = 'YES'"
            " and table_name <> 'theirs'"
        )
        self.assertGreaterEqual(len(columns), 6)
        with blocking(self.url) as txn:
            self.assertEqual(list(sequences.wrong(txn)), [])
            txn.execute(sequences._OWNED, (list(migrations.tables()),))
            watched = {(row[0], row[1]) for row in txn.fetchall()}
        self.assertEqual(watched, set(columns))


class StreamTests(ProcessTestCase):
    """Output that cannot be written, and other faults of a process's environment."""

    #: Commands that print a help page, a table, JSON, and a subcommand's help page.
    commands = (("--help",), ("plugins", "list"), ("plugins", "list", "--json"), ("keys", "add", "--help"))

    def assert_told(self, process: subprocess.Popen[str], why: str) -> None:
        """Assert that a command ends with one line and exit code 1."""
        _, said = self.ended(process, 1)
        self.assertEqual(said.count("\n"), 1, said)
        self.assertIn(why, said)

    def test_a_full_disk(self) -> None:
        """A full disk is reported."""
        for argv in self.commands:
            with open("/dev/full", "w") as full:
                self.assert_told(
                    self.start(*argv, stdout=full), "the output cannot be written, No space left on device"
                )
        with open("/dev/full", "w") as full:
            completing = self.start(stdout=full, _S2S_COMPLETE="bash_source")
            self.assert_told(completing, "the output cannot be written, No space left on device")

    def test_a_closed_pipe(self) -> None:
        """A closed pipe is reported."""
        for argv in self.commands:
            read, write = os.pipe()
            os.close(read)
            with open(write, "w") as pipe:
                self.assert_told(self.start(*argv, stdout=pipe), "the output cannot be written, Broken pipe")

    def test_closed_streams(self) -> None:
        """A closed stdout is reported before the command starts; a closed stderr or stdin has no effect."""
        for redirection, code in ((">&-", 1), ("2>&-", 0), ("<&-", 0)):
            script = ["/bin/sh", "-c", f'exec "$0" plugins list {redirection}', _S2S]
            done = subprocess.run(script, env=environment(), capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertEqual("stdout is closed" in done.stderr, bool(code))
            self.assertEqual("notice.publish" in done.stdout, not code)

    def test_nobody_hears_the_error(self) -> None:
        """If the error cannot be written either, the exit code still shows a failure."""
        with open("/dev/full", "w") as full:
            done = subprocess.run([_S2S, "no-such-command"], env=environment(), stderr=full, check=False)
        self.assertIn(done.returncode, (1, 2))

    def test_a_directory_that_was_removed(self) -> None:
        """A removed working directory is reported with the cure."""
        directory = Path(self.mktemp())
        directory.mkdir()
        script = ["/bin/sh", "-c", 'rmdir "$PWD"; exec "$0" keys list', _S2S]
        done = subprocess.run(script, cwd=directory, env=environment(), capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn("working directory was removed: change to another one", done.stderr)

    def test_another_encoding(self) -> None:
        """An argument, variable or directory that is not UTF-8 is named in one line, without a secret."""
        directory = os.fsencode(self.mktemp()) + b"\xe9"
        os.mkdir(directory)
        for argv, variables, said in (
            ([b"engine", b"pause", b"e1", b"--reason", b"caf\xe9"], {}, "caf\\udce9"),
            ([b"db", b"status", b"--state-dir", directory], {}, "\\udce9"),
            ([b"db", b"status"], {}, "\\udce9/var"),
            ([b"db", b"status"], {b"S2S_DATABASE_URL": b"postgresql://x:secret\xe9@"}, "S2S_DATABASE_URL"),
        ):
            ours = {os.fsencode(name): os.fsencode(value) for name, value in environment().items()}
            done = subprocess.run(
                [_S2S.encode(), *argv], cwd=directory, env={**ours, **variables}, capture_output=True, check=False
            )
            self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
            self.assertIn("not UTF-8", done.stderr.decode())
            self.assertIn(said, done.stderr.decode())
            self.assertNotIn(b"secret", done.stderr)

    def test_what_a_plug_in_leaves_behind(self) -> None:
        """Threads, processes and exit handlers that a plug-in leaves do not prevent a command from ending."""
        plugins = Path(self.mktemp(), "s2s", "plugins")
        plugins.mkdir(parents=True)
        for text in (
            "import threading\nthreading.Thread(target=threading.Event().wait).start()\n",
            "import multiprocessing\nqueue = multiprocessing.Queue()\nqueue.put('x' * 10**6)\n",
            "import atexit, signal\natexit.register(signal.pause)\n",
        ):
            (plugins / "restless.py").write_text(text)
            process = self.start("plugins", "list", PYTHONPATH=str(plugins.parent.parent.absolute()))
            output, _ = self.ended(process, 0)
            self.assertIn("notice.publish", output)

    def test_a_plug_in_that_prints(self) -> None:
        """The output of a plug-in during its import goes to stderr, so that stdout stays valid JSON."""
        plugins = Path(self.mktemp(), "s2s", "plugins")
        plugins.mkdir(parents=True)
        (plugins / "chatty.py").write_text("print('hello')\n")
        process = self.start("plugins", "list", "--json", PYTHONPATH=str(plugins.parent.parent.absolute()))
        output, said = self.ended(process, 0)
        self.assertEqual(said, "hello\n")
        self.assertTrue(json.loads(output))


class TerminalTests(DatabaseProcessTestCase):
    """A terminal whose encoding is not UTF-8."""

    def test_characters_it_lacks(self) -> None:
        """Characters that the terminal cannot show are escaped, and all other text is shown."""
        add = ("keys", "add", "--role", "any", "--key-id")
        self.ended(self.start(*add, "k", "--note", "Jürgen →"), 0)
        for variables in (
            {"PYTHONIOENCODING": "ascii"},
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        ):
            output, _ = self.ended(self.start("keys", "list", **variables), 0)
            self.assertIn("J\\xfcrgen \\u2192", output)
            _, errors = self.ended(self.start(*add, "ü", **variables), 1)
            self.assertIn("the key id", errors)
