"""Group commit: every push is answered after its COMMIT, as the protocol requires."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import psycopg2
from twisted.internet import task
from twisted.internet.defer import Deferred, DeferredList, fail, gatherResults
from twisted.logger import capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import (
    BadPayload,
    DatabaseUnavailable,
    DbUnavailable,
    IdemConflict,
    InternalError,
    Overloaded,
    ShuttingDown,
    UnknownCommand,
)
from s2s.handlers.commands import BUILTIN, Command, CommandHandler, registry
from s2s.protocol import canonical
from s2s.protocol.catalogue import BY_NAME, COMMAND_PUSH
from s2s.protocol.limits import Counters
from s2s.roles.server import inbox
from s2s.roles.server.inbox import Inbox
from s2s.runtime.line_quota import PERIOD_S, TOLD
from s2s.store.driver import Cursor, Query
from s2s.store.pool import Database, blocking
from s2s.store.tables.commands import Outcome
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class _Test(CommandHandler):
    """Accepts any payload."""

    cmd_type = "test.run"
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}

    def run(self, txn: Cursor, command: Command) -> None:
        """Do nothing."""


_REGISTRY = registry([_Test(), *BUILTIN])


def _push(key: str, n: int = 0, **more: Any) -> dict[str, Any]:
    return {"cmd_type": "test.run", "idem_key": key, "payload": {"n": n}, "priority": 100, **more}


def _brief(result: Any) -> Any:
    """Return the ack's (duplicate, cmd_id), or the error's class and cmd_id."""
    if isinstance(result, Failure):
        return type(result.value), result.value.details.get("cmd_id")
    return result["duplicate"], result["cmd_id"]


class InboxTests(DatabaseTestCase):
    """:class:`Inbox` on a real database."""

    def setUp(self) -> None:
        """Create an inbox."""
        super().setUp()
        self.wakes = 0
        self.inbox = self.make_inbox()

    def make_inbox(self) -> Inbox:
        """Create an inbox on a pool of its own."""
        database = Database(self.url, threads=1)
        database.start()
        self.addCleanup(database.stop)
        return Inbox(database, _REGISTRY, self.wake)

    def wake(self) -> None:
        """Count the calls after a COMMIT."""
        self.wakes += 1

    def push_all(self, pushes: list[dict[str, Any]], to: Inbox | None = None) -> Deferred[list[Any]]:
        """Push all at once, and return the outcome of each."""
        answers = DeferredList([(to or self.inbox).push(push) for push in pushes], consumeErrors=True)
        return answers.addCallback(lambda results: [_brief(result) for _, result in results])

    async def test_a_lone_push(self) -> None:
        """A push is answered after its COMMIT by an ack that is valid by the catalogue."""
        ack = await self.inbox.push(_push("k"))
        ((cmd_id, status),) = self.execute("select cmd_id, status from s2s.commands")
        self.assertEqual(ack, {"accepted": True, "duplicate": False, "cmd_id": cmd_id, "status": status})
        BY_NAME[COMMAND_PUSH].reply_schema.check(ack)
        # The executor may begin at once, and is notified after the push is answered.
        self.assertEqual((self.wakes, self.inbox.accepted, self.inbox.batches), (0, 1, 1))
        await poll(lambda: self.wakes == 1, "the call after the COMMIT")

    async def test_two_thousand_at_once(self) -> None:
        """Of 2,000 pushes written at once the first of each key wins: equal ones are duplicates, others conflicts."""
        pushes = [_push(f"k{i % 500}", n=int(i >= 1000 and i % 2)) for i in range(2000)]
        results = await self.push_all(pushes)
        ids = [result[1] for result in results[:500]]
        self.assertEqual(ids, sorted(ids))
        self.assertEqual(results[:500], [(False, cmd_id) for cmd_id in ids])
        self.assertEqual(results[500:1000], [(True, cmd_id) for cmd_id in ids])
        for i, result in enumerate(results[1000:], 1000):
            self.assertEqual(result, (IdemConflict, ids[i % 500]) if i % 2 else (True, ids[i % 500]))
        self.assertEqual(
            self.execute("select idem_key from s2s.commands order by cmd_id"), [(f"k{i}",) for i in range(500)]
        )
        self.assertEqual((self.inbox.accepted, self.inbox.duplicates, self.inbox.conflicts), (500, 1000, 500))
        # One transaction for the first push, which does not wait, and two for the rest.
        self.assertEqual(self.inbox.batches, 3)

    async def test_the_fingerprint(self) -> None:
        """The fingerprint covers the command type and the payload's meaning, not priority, due_at or member order."""
        payload = {"b": 1, "a": {"y": "é", "x": None}}
        other_order = {"a": {"x": None, "y": "é"}, "b": 1}
        first = await self.inbox.push(_push("k") | {"payload": payload})
        again = await self.inbox.push(_push("k", priority=1, due_at=5) | {"payload": other_order})
        self.assertEqual((again["duplicate"], again["cmd_id"]), (True, first["cmd_id"]))
        ((stored,),) = self.execute("select fingerprint from s2s.idempotency_keys")
        written = canonical.dumps({"cmd_type": "test.run", "payload": payload})
        self.assertEqual(bytes(stored), inbox.hashlib.sha256(written).digest())
        notice = {"cmd_type": "notice.publish", "payload": {"scope": "global", "message": "m", "severity": "info"}}
        await self.assertFailure(self.inbox.push(_push("k") | notice), IdemConflict)

    async def test_a_duplicate_of_what_is_over(self) -> None:
        """The ack of a duplicate has the status of the finished first command."""
        first = await self.inbox.push(_push("k"))
        for status in ("done", "dead", "cancelled"):
            self.execute("update s2s.commands set status = %s", status)
            ack = await self.inbox.push(_push("k"))
            self.assertEqual(ack, {**first, "duplicate": True, "status": status})
        await poll(lambda: self.wakes, "the wake-up")
        self.assertEqual(self.wakes, 1)

    async def test_a_duplicate_of_a_row_removed_by_hand(self) -> None:
        """A command whose row was deleted is over, and its duplicate is answered as the catalogue requires."""
        await self.inbox.push(_push("a"))
        self.execute("delete from s2s.commands")
        again = await self.inbox.push(_push("a"))
        self.assertEqual((again["duplicate"], again["cmd_id"], again["status"]), (True, 1, "done"))
        self.assertIsNone(BY_NAME["s2s.command.push"].reply_schema.explain(again))

    async def test_two_servers_with_the_same_keys(self) -> None:
        """Batches of two servers that overlap in opposite orders do not deadlock, and each key is accepted once."""
        other = self.make_inbox()
        keys = [f"k{i}" for i in range(1000)]
        for turn in range(3):
            mine, theirs = await gatherResults(
                [
                    self.push_all([_push(f"{turn}{key}") for key in keys]),
                    self.push_all([_push(f"{turn}{key}") for key in reversed(keys)], other),
                ]
            )
            theirs.reverse()
            for (duplicate, cmd_id), (duplicate_there, cmd_id_there) in zip(mine, theirs, strict=True):
                self.assertEqual(cmd_id, cmd_id_there)
                self.assertNotEqual(duplicate, duplicate_there)
        self.assertEqual(self.execute("select count(*) from s2s.commands"), [(3000,)])

    async def test_a_row_at_fault(self) -> None:
        """If the database refuses one row of a group, only that one fails, without the reason in its reply."""
        self.execute(
            "create function refuse() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.idem_key = 'k7' then raise exception 'not this one' using errcode = '23514'; end if;"
            " return new; end $$;"
            "create trigger refuse before insert on s2s.commands for each row execute function refuse()"
        )
        results = await self.push_all([_push(f"k{i}") for i in range(20)] + [_push("k3"), _push("k3", n=1)])
        self.assertEqual(results[7][0], InternalError)
        self.assertEqual([result[0] for i, result in enumerate(results[:20]) if i != 7], [False] * 19)
        self.assertEqual(results[20:], [(True, results[3][1]), (IdemConflict, results[3][1])])
        ids = [result[1] for i, result in enumerate(results[:20]) if i != 7]
        self.assertEqual(ids, sorted(ids))
        error = await self.assertFailure(self.inbox.push(_push("k7")), InternalError)
        self.assertIn("incident", error.details)
        self.assertNotIn("not this one", str(error.payload()))
        self.assertIn("the database refuses them", self.inbox.condition)
        await self.inbox.push(_push("k100"))
        self.assertEqual(self.inbox.condition, "ok")

    async def test_a_table_that_its_owner_changes(self) -> None:
        """If a unique index or a value is missing, the line names ``s2s db status``, and the repair helps."""
        for change, repair, error in (
            (
                "alter table s2s.idempotency_keys drop constraint idempotency_keys_pkey",
                "alter table s2s.idempotency_keys add primary key (idem_key)",
                DbUnavailable,
            ),
            (
                "alter table s2s.commands add mine text not null",
                "alter table s2s.commands drop column mine",
                InternalError,
            ),
        ):
            self.execute(change)
            with self.subTest(change=change), capturedLogs() as told:
                await self.assertFailure(self.inbox.push(_push("k1")), error)
                [line] = [line for each in told if "incident" in (line := str(formatEvent(each)))]
                self.assertIn("run: s2s db status", line)
            self.execute(repair)
        await self.inbox.push(_push("k1"))

    async def test_a_deferred_trigger(self) -> None:
        """A trigger that refuses one row at the COMMIT refuses only that row, without a traceback."""
        self.execute(
            "create function refuse() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.idem_key = 'k7' then raise exception 'not this one' using errcode = '23514'; end if;"
            " return new; end $$;"
            "create constraint trigger refuse after insert on s2s.commands deferrable initially deferred"
            " for each row execute function refuse()"
        )
        results = await self.push_all([_push(f"k{i}") for i in range(20)])
        self.assertEqual([result[0] for result in results], [False] * 7 + [InternalError] + [False] * 12)
        await self.assertFailure(self.inbox.push(_push("k7")), InternalError)
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_a_key_that_another_session_holds(self) -> None:
        """A push whose key another session locks gets a retryable error, and delays no other push, then or later."""
        database = Database(self.url, threads=1, statement_timeout_s=2.0)
        database.start()
        self.addCleanup(database.stop)
        held = Inbox(database, _REGISTRY, self.wake)
        other = psycopg2.connect(self.url)
        self.addCleanup(other.close)
        other.cursor().execute("insert into s2s.idempotency_keys values ('k1', sha256('x'), 1)")
        with capturedLogs() as logs:
            results = await self.push_all([_push(f"k{n}") for n in range(4)], held)
        self.assertEqual([result[0] for result in results], [False, DbUnavailable, False, False])
        self.assertIn("lock timeout", held.condition)
        self.assertIn("the view pg_locks shows", "".join(str(formatEvent(event)) for event in logs))
        # A push that was queued while the others waited stays out of the next batch, too.
        with mock.patch.object(inbox.commands, "push_batch", wraps=inbox.commands.push_batch) as batches:
            self.patch(inbox, "BATCH_PUSHES", 2)
            held._held.clear()
            first = self.push_all([_push("k5"), _push("k1")], held)
            second = self.push_all([_push("k1"), _push("k1"), _push("k6"), _push("k7")], held)
            results = await first + await second
        self.assertEqual([result[0] for result in results], [False, *[DbUnavailable] * 3, False, False])
        together = [[push.idem_key for push in call.args[0]] for call in batches.call_args_list]
        self.assertEqual(len([keys for keys in together if "k1" in keys and len(keys) > 1]), 1, together)
        # The statements for batches are not used with this key again, so that no push waits for the whole timeout.
        with mock.patch.object(inbox.commands, "push_batch", wraps=inbox.commands.push_batch) as batches:
            results = await self.push_all([_push(key) for key in ("a", "k1", "k1", "b", "c")], held)
        self.assertEqual([result[0] for result in results], [False, DbUnavailable, DbUnavailable, False, False])
        together = [[push.idem_key for push in call.args[0]] for call in batches.call_args_list]
        self.assertEqual([keys for keys in together if "k1" in keys and len(keys) > 1], [])
        other.rollback()
        self.assertFalse((await held.push(_push("k1")))["duplicate"])
        self.assertTrue((await held.push(_push("k1")))["duplicate"])
        await held.drain()
        self.assertEqual(self.execute("select count(*) from s2s.commands"), [(10,)])

    async def test_a_slow_trigger(self) -> None:
        """A push for which a trigger takes too long gets a retryable error, and the others are accepted."""
        database = Database(self.url, threads=1, statement_timeout_s=2.0)
        database.start()
        self.addCleanup(database.stop)
        self.execute(
            "create function slow() returns trigger language plpgsql as $$ begin"
            " if new.idem_key = 'k1' then perform pg_sleep(60); end if; return new; end $$;"
            "create trigger slow before insert on s2s.commands for each row execute function slow()"
        )
        results = await self.push_all([_push(f"k{n}") for n in range(3)], Inbox(database, _REGISTRY, self.wake))
        self.assertEqual([result[0] for result in results], [False, DbUnavailable, False])

    async def test_an_exhausted_sequence(self) -> None:
        """If the sequence of command ids is exhausted pushes get a retryable error, and the log names the cure once."""
        self.execute("alter sequence commands_cmd_id_seq maxvalue 100; select setval('s2s.commands_cmd_id_seq', 100)")
        with capturedLogs() as told:
            results = await self.push_all([_push(f"k{i}") for i in range(20)])
            await self.assertFailure(self.inbox.push(_push("k20")), DbUnavailable)
        self.assertEqual({result[0] for result in results}, {DbUnavailable})
        lines = [formatEvent(event) for event in told]
        self.assertEqual([line for line in lines if "alter sequence" in str(line)], lines)
        self.assertEqual(len(lines), 1)
        self.assertIn("maximum value", self.inbox.condition)

    async def test_rows_that_are_taken_away(self) -> None:
        """A push whose key a trigger discards is refused, and the others are accepted."""
        self.execute(
            "create function eat() returns trigger language plpgsql set search_path from current as"
            " $$ begin if new.idem_key = 'k1' then return null; end if; return new; end $$;"
            "create trigger eat before insert on s2s.idempotency_keys for each row execute function eat()"
        )
        results = await self.push_all([_push(f"k{i}") for i in range(3)])
        self.assertEqual([type(results[0]), results[1][0], type(results[2])], [tuple, InternalError, tuple])
        self.assertIn("triggers", self.inbox.condition)
        self.assertEqual(sorted(key for (key,) in self.execute("select idem_key from s2s.commands")), ["k0", "k2"])
        await self.assertFailure(self.inbox.push(_push("k1")), InternalError)

    async def test_commands_that_are_taken_away(self) -> None:
        """A push whose command a trigger discards is refused each time, alone and in a batch; no key is used up."""
        self.execute(
            "create function eat() returns trigger language plpgsql set search_path from current as"
            " $$ begin if new.idem_key = 'k1' then return null; end if; return new; end $$;"
            "create trigger eat before insert on s2s.commands for each row execute function eat()"
        )
        for _ in range(2):
            await self.assertFailure(self.inbox.push(_push("k1")), InternalError)
        self.assertIn("a trigger keeps the command from being inserted", self.inbox.condition)
        results = await self.push_all([_push(f"k{i}") for i in range(3)])
        self.assertEqual([type(results[0]), results[1][0], type(results[2])], [tuple, InternalError, tuple])
        self.execute("drop trigger eat on s2s.commands")
        self.assertFalse((await self.inbox.push(_push("k1")))["duplicate"])

    async def test_refusals_at_the_push(self) -> None:
        """An unknown command type and a payload that its schema refuses never reach the database."""
        error = self.failureResultOf(self.inbox.push(_push("k") | {"cmd_type": "no.such"}), UnknownCommand).value
        self.assertEqual(error.details["supported"], ["notice.publish", "test.run"])
        error = self.failureResultOf(self.inbox.push(_push("k") | {"payload": {"n": "1"}}), BadPayload).value
        self.assertEqual(error.details["path"], "/payload/payload/n")
        self.assertEqual(self.inbox.refused, 2)
        self.assertEqual(self.execute("select count(*) from s2s.idempotency_keys"), [(0,)])

    async def test_whatever_the_schema_lets_pass(self) -> None:
        """The widest values of every member of a push are stored."""
        pushes = [
            _push("~" * 200, priority=1000, due_at=4102444800),
            _push(" ", priority=0, due_at=0),
            _push("wide")
            | {"payload": {"n": 2**53 - 1, "": ["\\u0000 '\"\\ \x01\x7f\U0010ffff", -(2**53 - 1), {}, None]}},
        ]
        for push in pushes:
            BY_NAME[COMMAND_PUSH].request_schema.check(push)
        self.assertEqual([duplicate for duplicate, _ in await self.push_all(pushes)], [False] * 3)
        self.assertEqual(
            self.execute("select payload from s2s.commands where idem_key = 'wide'"), [(pushes[2]["payload"],)]
        )

    async def test_the_database_dies_under_a_batch(self) -> None:
        """If the connection breaks during a batch its pushes get a retryable error; the next batch is committed."""
        with blocking(self.url, "the lock's holder") as txn:
            txn.execute("lock table s2s.idempotency_keys")
            answers = [self.inbox.push(_push(f"k{i}")) for i in range(3)]
            waiting = "from pg_stat_activity where wait_event_type = 'Lock' and application_name = 's2s'"
            await poll(lambda: self.execute(f"select pid {waiting}"), "the batch to wait for the lock")
            self.execute(f"select pg_terminate_backend(pid) {waiting}")
            error = await self.assertFailure(answers[0], DbUnavailable)
        self.assertEqual(error.details["retry_after_ms"], 1000)
        # The other two pushes were in the next batch.
        for answer in answers[1:]:
            self.assertFalse((await answer)["duplicate"])
        self.assertFalse((await self.inbox.push(_push("k0")))["duplicate"])

    async def test_draining(self) -> None:
        """Draining answers the waiting pushes and refuses new ones."""
        answers = [self.inbox.push(_push(f"k{i}")) for i in range(5)]
        drained = self.inbox.drain()
        self.failureResultOf(self.inbox.push(_push("late")), ShuttingDown)
        self.assertNoResult(drained)
        await drained
        self.assertEqual([self.successResultOf(answer)["duplicate"] for answer in answers], [False] * 5)
        await self.make_inbox().drain()


class _SlowDatabase:
    """Holds every batch until the test ends it."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[Any], Deferred[Any]]] = []

    def run_steps(self, work: Any, pushes: list[Any]) -> Deferred[Any]:
        self.batches.append((pushes, Deferred()))
        return self.batches[-1][1]

    def query(self, query: Query, done: Callable[[Any], object]) -> None:
        outcomes: Deferred[Any] = Deferred()
        self.batches.append(([query], outcomes))
        outcomes.addCallback(lambda made: [(each.cmd_id,) for each in made if each.is_new]).addBoth(done)

    def commit(self) -> None:
        """Commit the last batch."""
        pushes, done = self.batches[-1]
        done.callback([Outcome(n, "ready", is_new=True) for n, _ in enumerate(pushes, 1)])


class BatchTests(SynchronousTestCase):
    """How pushes are combined."""

    def setUp(self) -> None:
        """Create an inbox on a slow database."""
        self.database = _SlowDatabase()
        self.counters, self.time = Counters(), task.Clock()
        self.inbox = Inbox(
            self.database,  # type: ignore[arg-type]
            _REGISTRY,
            counters=self.counters,
            reactor=self.time,
        )

    def push_all(self, name: str, count: int) -> list[Deferred[Any]]:
        """Push this many commands."""
        return [self.inbox.push(_push(f"{name}{i}")) for i in range(count)]

    @property
    def sizes(self) -> list[int]:
        """Return the number of pushes in each transaction."""
        return [len(pushes) for pushes, _ in self.database.batches]

    def test_what_arrives_meanwhile_is_the_next_batch(self) -> None:
        """A lone push is sent at once; pushes that arrive meanwhile form the next batch, and none is answered early.

        The next batch is sent to the database before the previous pushes are answered.
        """
        answers = self.push_all("k", 10)
        begun: list[int] = []
        answers[0].addCallback(lambda _: begun.append(len(self.database.batches)))
        self.assertEqual((self.sizes, self.inbox.waiting), ([1], 9))
        self.database.commit()
        self.assertEqual(self.sizes, [1, 9])
        self.successResultOf(answers[0])
        self.assertEqual(begun, [2])
        self.assertNoResult(answers[1])
        self.database.commit()
        for answer in answers[1:]:
            self.successResultOf(answer)

    def test_few_that_come_together(self) -> None:
        """After a batch, a small batch waits until the end of the reactor iteration, and no longer."""
        for few in (1, inbox.ENOUGH_PUSHES - 1):
            self.setUp()
            self.push_all("k", 3)
            self.database.commit()
            self.push_all("more", few - 1)
            self.database.commit()
            self.assertEqual(self.sizes, [1, 2])
            answers = self.push_all("last", 1)
            self.assertEqual(self.sizes, [1, 2])
            self.time.advance(0)
            self.assertEqual((self.sizes, self.time.getDelayedCalls()), ([1, 2, few], []))
            self.database.commit()
            self.successResultOf(answers[0])

    def test_enough_that_come_together(self) -> None:
        """Enough pushes start a transaction at once, and pushes that arrive meanwhile are counted separately."""
        self.push_all("k", 3)
        self.database.commit()
        self.database.commit()
        self.push_all("enough", inbox.ENOUGH_PUSHES + 1)
        self.assertEqual(self.sizes, [1, 2, inbox.ENOUGH_PUSHES])
        self.time.advance(0)
        self.push_all("more", inbox.ENOUGH_PUSHES - 1)
        self.assertEqual(self.sizes, [1, 2, inbox.ENOUGH_PUSHES])
        self.database.commit()
        self.assertEqual(self.sizes, [1, 2, inbox.ENOUGH_PUSHES, inbox.ENOUGH_PUSHES])

    def test_few_that_came_while_many_were_committed(self) -> None:
        """A small batch is sent to the database before the replies to a large one, because the replies take time."""
        _, *many = self.push_all("k", 1 + inbox.ENOUGH_PUSHES)
        self.database.commit()
        self.push_all("few", 1)
        begun: list[int] = []
        many[0].addCallback(lambda _: begun.extend(self.sizes))
        self.database.commit()
        self.assertEqual(begun, [1, inbox.ENOUGH_PUSHES, 1])

    def test_one_by_one(self) -> None:
        """When pushes arrive one by one again, they do not wait."""
        self.push_all("k", 3)
        self.database.commit()
        self.database.commit()
        self.push_all("one", 1)
        self.time.advance(0)
        self.database.commit()
        self.push_all("another", 1)
        self.assertEqual((self.sizes, self.time.getDelayedCalls()), ([1, 2, 1, 1], []))

    def test_batches_are_bounded(self) -> None:
        """A batch has a largest count and a largest size; one push always fits."""
        self.inbox.push(_push("first"))
        self.push_all("k", inbox.BATCH_PUSHES + 1)
        self.database.commit()
        self.database.commit()
        self.time.advance(0)
        self.assertEqual(self.sizes, [1, inbox.BATCH_PUSHES, 1])
        with mock.patch.object(inbox, "BATCH_BYTES", 250):
            for i in range(4):
                self.inbox.push(_push(f"big{i}") | {"payload": {"text": "x" * (300 if i == 0 else 100)}})
            for _ in range(3):
                self.database.commit()
                self.time.advance(0)
        self.assertEqual(self.sizes[3:], [1, 2, 1])

    def test_waiting_is_bounded(self) -> None:
        """Over the limit of waiting pushes or bytes, further ones are refused as overloaded with a time to retry."""
        for name, bound in (("WAITING_PUSHES", 2), ("WAITING_BYTES", 20)):
            self.setUp()
            with mock.patch.object(inbox, name, bound):
                for i in range(3):
                    self.assertNoResult(self.inbox.push(_push(f"k{i}")))
                error = self.failureResultOf(self.inbox.push(_push("over")), Overloaded).value
                self.assertEqual(error.details["retry_after_ms"], 1000)
                self.assertEqual(self.counters.met, {"inbox": 1})
                self.database.commit()
                self.assertNoResult(self.inbox.push(_push("later")))

    def test_an_unexpected_error(self) -> None:
        """An unexpected error is reported to all waiting pushes as an incident, logged once, and stops nothing."""
        answer = self.inbox.push(_push("k"))
        self.database.batches[0][1].errback(ZeroDivisionError("secret"))
        error = self.failureResultOf(answer, InternalError).value
        self.assertNotIn("secret", str(error.payload()))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        answer = self.inbox.push(_push("k"))
        self.database.commit()
        self.successResultOf(answer)

    def test_incidents_are_bounded(self) -> None:
        """Pushes that fail repeatedly with unexpected errors cause a few tracebacks, and then a count."""
        with capturedLogs() as logs:
            for number in range(100):
                answer = self.inbox.push(_push(f"k{number}"))
                self.database.batches[-1][1].errback(ZeroDivisionError("x"))
                self.failureResultOf(answer, InternalError)
            self.time.advance(PERIOD_S)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), TOLD)
        count = f"{100 - TOLD} more batches of pushes failed: ZeroDivisionError: x"
        self.assertEqual(formatEvent(logs[-1]), count)

    def test_who_is_told_stumbles(self) -> None:
        """If the callback after a COMMIT fails, the pushes are answered nevertheless, and the next ones too."""
        self.inbox = Inbox(self.database, _REGISTRY, lambda: 1 // 0, reactor=self.time)  # type: ignore[arg-type]
        for _ in range(2):
            answer = self.inbox.push(_push("k"))
            self.database.commit()
            self.successResultOf(answer)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)

    def test_drained_when_all_are_answered(self) -> None:
        """Draining also ends if the next batch fails before the last one's pushes are answered."""
        answers = [self.inbox.push(_push(f"k{i}")) for i in range(2)]
        drained = self.inbox.drain()
        drained.addCallback(lambda _: [answer.called for answer in answers])
        with mock.patch.object(self.database, "query", lambda _, done: done(Failure(DatabaseUnavailable("gone")))):
            self.database.commit()
        self.assertEqual(self.successResultOf(drained), [True, True])
        self.successResultOf(answers[0])
        self.failureResultOf(answers[1], DbUnavailable)

    def test_a_database_that_is_away(self) -> None:
        """While the database is away every push is answered at once with an error."""
        gone = DatabaseUnavailable("gone")
        with mock.patch.object(self.database, "query", lambda _, done: done(Failure(gone))):
            for i in range(3):
                self.failureResultOf(self.inbox.push(_push(f"k{i}")), DbUnavailable)
        alone, *together = (self.inbox.push(_push(f"k{i}")) for i in range(3))
        with mock.patch.object(self.database, "run_steps", lambda *_: fail(gone)):
            self.database.commit()
        self.successResultOf(alone)
        for answer in together:
            self.failureResultOf(answer, DbUnavailable)
        alone = self.inbox.push(_push("k"))
        self.time.advance(0)
        self.database.commit()
        self.successResultOf(alone)
