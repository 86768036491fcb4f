"""``s2s commands`` and ``s2s outbox``: actions of operators on rows, concurrent with workers and relays."""

from __future__ import annotations

import json
from typing import Any

import psycopg2
from click import Group
from click.testing import CliRunner, Result

from s2s.cli.commands import group as commands_group
from s2s.cli.outbox import group as outbox_group
from s2s.store import driver
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.store.tables import actions, claims, commands, commands_admin, outbox, outbox_admin
from s2s.store.tables.ready import Ready
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class _CliTestCase(DatabaseTestCase):
    """Runs command lines on the test's database."""

    #: The group under test.
    group: Group

    def s2s(self, *argv: Any, expected: int = 0) -> Result:
        """Run one command line of the group and check its exit code."""
        env = {"S2S_DATABASE_URL": self.url, "COLUMNS": "200"}
        result = CliRunner(env=env).invoke(self.group, [str(arg) for arg in argv])
        self.assertEqual(result.exit_code, expected, result.output)
        self.assertNotIn("Traceback", result.output)
        return result

    def json(self, *argv: Any, expected: int = 0) -> Any:
        """Run one command line with ``--json`` and parse its output."""
        return json.loads(self.s2s(*argv, "--json", expected=expected).stdout)

    def begin(self) -> Cursor:
        """Open a transaction on a separate connection; it is rolled back with the test."""
        connection = psycopg2.connect(self.url)
        self.addCleanup(connection.close)
        return connection.cursor()


class CommandsTests(_CliTestCase):
    """``s2s commands``."""

    group = commands_group

    def insert(self, status: str = "dead", cmd_type: str = "test.run", count: int = 1) -> int:
        """Insert commands with their keys.

        :returns: the cmd_id of the first one.
        """
        rows = self.execute(
            "with made as (insert into s2s.commands (cmd_type, idem_key, payload, status, attempts, error, finished_at)"
            " select %s, 'key-' || gen_random_uuid(), '{\"n\": \"\\u001b[31m\"}', %s, 10, 'E: no',"
            " case when %s <> 'ready' then now() end from generate_series(1, %s) returning cmd_id, idem_key)"
            " insert into s2s.idempotency_keys (cmd_id, idem_key, fingerprint)"
            " select cmd_id, idem_key, decode(repeat('00', 32), 'hex') from made order by cmd_id returning cmd_id",
            cmd_type,
            status,
            status,
            count,
        )
        return int(rows[0][0])

    def statuses(self) -> list[str]:
        """Return every command's status, in the order of the ids."""
        return [status for (status,) in self.execute("select status from s2s.commands order by cmd_id")]

    def push_again(self, idem_key: str) -> commands.Outcome:
        """Push again the content of the key's first command."""
        with blocking(self.url) as txn:
            return driver.drive(txn, commands.push_batch([commands.Push("test.run", idem_key, bytes(32), "{}")]))[0]

    def test_list(self) -> None:
        """The list is filtered by status and type, and continues before an id."""
        dead, other, ready = self.insert(), self.insert(cmd_type="test.other"), self.insert("ready")

        def listed(*argv: Any) -> list[int]:
            return [row["cmd_id"] for row in self.json("list", *argv)]

        self.assertEqual(listed(), [ready, other, dead])
        self.assertEqual(listed("--limit", 2), [ready, other])
        self.assertEqual(listed("--before", other), [dead])
        self.assertEqual(listed("--status", "dead"), [other, dead])
        self.assertEqual(listed("--status", "dead", "--type", "test.run"), [dead])
        self.assertIn("there are no commands", self.s2s("list", "--type", "no.such").output)

    def test_show(self) -> None:
        """All of a command is shown, with payload and error, without control characters of terminals."""
        cmd_id = self.insert()
        told = self.json("show", cmd_id)
        self.assertEqual((told["cmd_id"], told["payload"], told["error"]), (cmd_id, {"n": "\x1b[31m"}, "E: no"))
        shown = self.s2s("show", cmd_id).output
        for word in ("idem_key", "key-", "test.run", "E: no", "finished_at", "[31m"):
            self.assertIn(word, shown)
        self.assertNotIn("\x1b[31m", shown)
        self.assertIn("no command 99: see s2s commands list", self.s2s("show", 99, expected=1).output)

    def test_retry(self) -> None:
        """A dead or cancelled command is ready again, due now, with all its attempts; the executor finds it."""
        dead, cancelled = self.insert(), self.insert("cancelled")
        self.execute("update s2s.commands set due_at = now() + interval '1 hour'")
        self.assertIn(f"command {dead}: ready again", self.s2s("retry", dead, cancelled).output)
        self.assertEqual(
            self.execute("select status, attempts, finished_at, due_at <= now() from s2s.commands"),
            [("ready", 0, None, True)] * 2,
        )
        with blocking(self.url) as txn:
            found = Ready().candidates(txn, 10)
            self.assertEqual([(each.cmd_id, each.attempts) for each in found], [(dead, 0), (cancelled, 0)])

    def test_each_id_has_its_answer(self) -> None:
        """An id that does not exist or is in another state has a line with the cure; the others are processed."""
        done, ready, dead = self.insert("done"), self.insert("ready"), self.insert()
        said = self.s2s("retry", done, 99, ready, dead, dead, expected=1)
        self.assertEqual(said.stdout.splitlines(), [f"command {dead}: ready again, with all its attempts"])
        self.assertEqual(
            said.stderr.splitlines(),
            [
                f"command {done}: is done: nothing is left to do, and it is removed in time by itself",
                "command 99: there is none: see s2s commands list",
                f"command {ready}: is ready and runs by itself; to keep it from that: s2s commands cancel {ready}",
            ],
        )
        self.assertEqual(self.statuses(), ["done", "ready", "ready"])
        self.assertEqual(
            self.json("cancel", done, ready, expected=1),
            [
                {"cmd_id": done, "is_done": False, "outcome": "done"},
                {"cmd_id": ready, "is_done": True, "outcome": "cancelled"},
            ],
        )

    def test_every_obstacle_has_its_sentence(self) -> None:
        """Every action in every state is answered with a line."""
        for status in ("ready", "done", "dead", "cancelled"):
            for action in ("retry", "cancel", "discard"):
                cmd_id = self.insert(status)
                with self.subTest(status=status, action=action):
                    takes = getattr(commands_admin, action.upper()).takes
                    said = self.s2s(action, cmd_id, expected=int(status not in takes)).output
                    self.assertEqual((said.count("\n"), said.startswith(f"command {cmd_id}: ")), (1, True))

    def test_cancel(self) -> None:
        """A waiting command is cancelled for good: no worker finds or takes it, not even with an earlier claim."""
        cmd_id = self.insert("ready")
        with blocking(self.url) as txn:
            self.execute("update s2s.commands set attempts = 0")
            self.assertEqual(claims.claim(txn, "boot", 0, 10), [cmd_id])
        self.s2s("cancel", cmd_id)
        self.assertEqual(self.execute("select status, finished_at is null from s2s.commands"), [("cancelled", False)])
        with blocking(self.url) as txn:
            self.assertEqual(commands.take(txn, [cmd_id]), [])
            self.assertEqual(commands.charge(txn, [commands.Charge(cmd_id, "ProcessDied")]), 0)
            self.assertEqual(claims.claim(txn, "boot", 0, 10), [])
        self.assertEqual(self.statuses(), ["cancelled"])

    def test_what_runs_is_not_cancelled(self) -> None:
        """A command that a worker is running is refused in one line at once, and ends as its worker reports."""
        cmd_id = self.insert("ready")
        worker = self.begin()
        commands.take(worker, [cmd_id])
        self.assertEqual(
            self.s2s("cancel", cmd_id, expected=1).output, f"command {cmd_id}: is running now: try again\n"
        )
        commands.finish(worker, [cmd_id])
        worker.connection.commit()
        self.assertEqual(self.statuses(), ["done"])

    def test_discard(self) -> None:
        """A discarded command's key stays: a push of it is a duplicate with the last status until the key expires."""
        ready, dead, cancelled = self.insert("ready"), self.insert(), self.insert("cancelled")
        keys = dict(self.execute("select cmd_id, idem_key from s2s.commands"))
        self.s2s("discard", dead, cancelled)
        self.assertEqual(self.execute("select cmd_id from s2s.commands"), [(ready,)])
        self.assertEqual(
            self.execute(
                "select cmd_id, status, round(extract(epoch from expires_at - now()) / 86400)::int"
                " from s2s.idempotency_keys order by cmd_id"
            ),
            [(ready, None, None), (dead, "dead", 30), (cancelled, "cancelled", 30)],
        )
        self.assertEqual(self.push_again(keys[dead]), commands.Outcome(dead, "dead"))
        self.assertEqual(self.push_again(keys[cancelled]), commands.Outcome(cancelled, "cancelled"))

    def test_discard_keeps_the_key_as_long_as_set(self) -> None:
        """The setting in the table defines how long the key of a discarded command is kept."""
        self.execute("delete from s2s.config where key = 'commands.keep_key_days'")
        self.execute("insert into s2s.config (key, value, type) values ('commands.keep_key_days', '3', 'integer')")
        self.s2s("discard", self.insert())
        self.assertEqual(
            self.execute(
                "select expires_at between now() + interval '71 hours' and now() + interval '3 days'"
                " from s2s.idempotency_keys"
            ),
            [(True,)],
        )

    def test_all_dead_in_bounded_steps(self) -> None:
        """All dead commands, or those of a type, are retried or discarded, a bounded number in a transaction."""
        self.patch(actions, "STEP_ROWS", 4)
        self.insert(count=10)
        self.insert(cmd_type="test.other", count=3)
        self.insert("cancelled")
        self.assertEqual(self.s2s("retry", "--all-dead", "--type", "test.run").output, "dead commands retried: 10\n")
        self.assertEqual(self.statuses(), ["ready"] * 10 + ["dead"] * 3 + ["cancelled"])
        # The rows of an UPDATE contain its transaction.
        steps = self.execute(
            "select count(*)::int from s2s.commands where status = 'ready' group by xmin::text order by 1"
        )
        self.assertEqual(steps, [(2,), (4,), (4,)])
        self.assertEqual(self.json("discard", "--all-dead"), {"discarded": 3})
        self.assertEqual(self.json("discard", "--all-dead"), {"discarded": 0})
        self.assertEqual(self.statuses(), ["ready"] * 10 + ["cancelled"])

    def test_many_ids(self) -> None:
        """Ids beyond one step are processed by the next, each with its line."""
        self.patch(actions, "STEP_ROWS", 4)
        first = self.insert(count=10)
        self.assertEqual(len(self.s2s("discard", *range(first, first + 10)).output.splitlines()), 10)
        self.assertEqual(self.statuses(), [])

    def test_what_another_has_locked_is_left(self) -> None:
        """A dead command locked by another operator is skipped without waiting, by its id and among all."""
        mine, theirs = self.insert(), self.insert()
        other = self.begin()
        self.assertEqual(actions.act(other, commands_admin.DISCARD, [theirs], key_days=1)[0].outcome, "discarded")
        self.assertIn("try again", self.s2s("retry", theirs, expected=1).output)
        self.assertEqual(self.json("retry", "--all-dead"), {"retried": 1})
        other.connection.commit()
        self.assertEqual(self.execute("select cmd_id from s2s.commands"), [(mine,)])

    def test_mistakes(self) -> None:
        """Neither ids nor all, both, or a type without all is refused in one line, and nothing is done."""
        cmd_id = self.insert()
        for argv, why in (
            (("retry",), "or else --all-dead"),
            (("cancel",), "name the ids of commands"),
            (("retry", cmd_id, "--all-dead"), "or else --all-dead"),
            (("discard", cmd_id, "--type", "test.run"), "goes with --all-dead"),
        ):
            said = self.s2s(*argv, expected=1).output
            self.assertIn(why, said)
            self.assertEqual(said.count("\n"), 1)
        self.s2s("cancel", "--all-dead", expected=2)
        self.s2s("retry", 2**63, expected=2)
        self.assertEqual(self.statuses(), ["dead"])


class OutboxTests(_CliTestCase):
    """``s2s outbox``."""

    group = outbox_group

    def put(self, key: str, cmd_type: str = "test.run", *, dead: bool = False) -> int:
        """Emit a command, and let the server refuse it."""
        with blocking(self.url) as txn:
            outbox_id = outbox.put(txn, cmd_type, key, {"n": 1})
            if dead:
                outbox.kill(txn, [(outbox_id, "bad_payload", "at /payload/n")])
        return outbox_id

    def claim(self) -> list[int]:
        """Lease the rows that may be sent."""
        with blocking(self.url) as txn:
            return [row.outbox_id for row in outbox.Claims().claim(txn, 10, 60.0)]

    def rows(self) -> list[tuple[Any, ...]]:
        """Return every row's id, state and error code."""
        return self.execute("select outbox_id, state, error_code from s2s.outbox order by 1")

    def test_list_and_show(self) -> None:
        """Rows are listed by state and type, the newest first, and shown in full."""
        waiting, dead = self.put("a"), self.put("b", "test.other", dead=True)
        self.assertEqual([row["outbox_id"] for row in self.json("list")], [dead, waiting])
        self.assertEqual([row["outbox_id"] for row in self.json("list", "--before", dead)], [waiting])
        self.assertEqual([row["outbox_id"] for row in self.json("list", "--state", "dead")], [dead])
        self.assertEqual([row["outbox_id"] for row in self.json("list", "--type", "test.run")], [waiting])
        self.assertIn("bad_payload", self.s2s("list").output)
        self.assertEqual(self.json("show", dead)["payload"], {"n": 1})
        self.assertIn("at /payload/n", self.s2s("show", dead).output)
        self.assertIn("no outbox row 99", self.s2s("show", 99, expected=1).output)
        self.execute("delete from s2s.outbox")
        self.assertIn("nothing in the outbox", self.s2s("list").output)

    async def test_retry(self) -> None:
        """A dead row waits again, to be sent at once with all its attempts, and the relays are notified."""
        dead, waiting = self.put("a", dead=True), self.put("b")
        listening = self.begin()
        listening.execute("listen s2s_outbox")
        listening.connection.commit()
        said = self.s2s("retry", dead, waiting, expected=1)
        self.assertEqual(said.stdout, f"outbox row {dead}: waits again, to be sent now\n")
        self.assertIn(f"s2s outbox cancel {waiting}", said.stderr)

        def heard() -> list[str]:
            listening.execute("select")
            listening.connection.commit()
            return [each.channel for each in listening.connection.notifies]

        self.assertEqual(await poll(heard, "the notification"), ["s2s_outbox"])
        self.assertEqual(self.execute("select attempts, error_code from s2s.outbox"), [(0, None)] * 2)
        self.assertEqual(sorted(self.claim()), [dead, waiting])

    def test_cancel(self) -> None:
        """A waiting row is set aside and not sent; for a leased row the command says that it may arrive."""
        leased = self.put("a")
        self.assertEqual(self.claim(), [leased])
        fresh = self.put("b")
        said = self.s2s("cancel", leased, fresh).output.splitlines()
        self.assertIn("the server may have it", said[0])
        self.assertEqual(said[1], f"outbox row {fresh}: cancelled: it will not be sent")
        self.assertEqual(self.rows(), [(leased, "dead", "cancelled"), (fresh, "dead", "cancelled")])
        self.execute("update s2s.outbox set send_at = now()")
        self.assertEqual(self.claim(), [])

    def test_a_relay_settles_what_was_cancelled(self) -> None:
        """A row cancelled during its lease is not sent again, whatever reply the relay receives."""
        accepted, refused, again = self.put("a"), self.put("b"), self.put("c")
        self.claim()
        self.s2s("cancel", accepted, refused, again)
        with blocking(self.url) as txn:
            outbox.delete(txn, [accepted])
            outbox.retry(txn, [(again, 0.0, "paused", "")])
            outbox.kill(txn, [(refused, "bad_payload", "no")])
        self.assertEqual([(row[0], row[1]) for row in self.rows()], [(refused, "dead"), (again, "dead")])
        self.assertEqual(self.claim(), [])

    def test_a_relay_settles_what_was_discarded(self) -> None:
        """A row that was cancelled and discarded during its lease does not come back."""
        rows = [self.put(key) for key in "abc"]
        self.claim()
        self.s2s("cancel", *rows)
        self.s2s("discard", *rows)
        with blocking(self.url) as txn:
            outbox.delete(txn, rows[:1])
            outbox.retry(txn, [(rows[1], 0.0, "paused", "")])
            outbox.kill(txn, [(rows[2], "bad_payload", "no")])
        self.assertEqual(self.rows(), [])

    def test_while_a_relay_settles(self) -> None:
        """A row that is being settled is refused in one line at once."""
        outbox_id = self.put("a")
        relay = self.begin()
        outbox.delete(relay, [outbox_id])
        self.assertEqual(
            self.s2s("cancel", outbox_id, expected=1).output,
            f"outbox row {outbox_id}: is being settled now: try again\n",
        )
        relay.connection.commit()
        self.assertIn("the server may have it", self.s2s("cancel", outbox_id, expected=1).output)

    def test_discard_and_all_dead(self) -> None:
        """Dead rows are removed by id or all; waiting rows are not removed."""
        self.patch(actions, "STEP_ROWS", 2)
        waiting, *dead = self.put("w"), *(self.put(f"d{n}", dead=True) for n in range(5))
        other = self.put("o", "test.other", dead=True)
        self.assertIn("s2s outbox cancel", self.s2s("discard", waiting, dead[0], expected=1).stderr)
        self.assertEqual(self.json("discard", "--all-dead", "--type", "test.run"), {"discarded": 4})
        self.assertEqual(self.s2s("retry", "--all-dead").output, "dead outbox rows retried: 1\n")
        self.assertEqual(self.rows(), [(waiting, "waiting", None), (other, "waiting", None)])

    def test_every_obstacle_has_its_sentence(self) -> None:
        """Every action in every state is answered with a line."""
        for is_dead in (False, True):
            for action in ("retry", "cancel", "discard"):
                outbox_id = self.put(f"{action}-{is_dead}", dead=is_dead)
                with self.subTest(dead=is_dead, action=action):
                    takes = getattr(outbox_admin, action.upper()).takes
                    fits = ("dead" if is_dead else "waiting") in takes
                    said = self.s2s(action, outbox_id, expected=int(not fits)).output
                    self.assertEqual((said.count("\n"), said.startswith(f"outbox row {outbox_id}: ")), (1, True))
