"""Tables ``outbox`` and ``broadcasts``: from an operator's message to a leased command."""

from __future__ import annotations

from functools import partial
from typing import Any

from twisted.internet.defer import gatherResults
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import CanonicalError, StatementRefused, TooBigToSend
from s2s.handlers.commands.notice_publish import NoticePublish
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import BY_NAME, COMMAND_PUSH
from s2s.protocol.catalogue.schema import Schema
from s2s.protocol.signing import Key, Secret
from s2s.store.pool import Database, blocking
from s2s.store.tables import broadcasts, lookback, notices, outbox
from s2s.store.tables.outbox import OutboxRow
from tests.support.postgres import DatabaseTestCase, rows_read

_FAR = 2**53 - 1


class _StoreTestCase(DatabaseTestCase):
    def setUp(self) -> None:
        """Start two pools, as two processes would."""
        super().setUp()
        self.databases = [Database(self.url, threads=2) for _ in range(2)]
        for database in self.databases:
            database.start()
            self.addCleanup(database.stop)
        self.run_work = self.databases[0].run


class OutboxTests(_StoreTestCase):
    """:mod:`s2s.store.tables.outbox`."""

    async def put(self, *keys: str) -> None:
        """Insert commands."""
        for key in keys:
            await self.run_work(outbox.put, "test.run", key, {"n": 1})

    async def claim(self, *exclude_ids: int, limit: int = 10) -> list[outbox.OutboxRow]:
        """Lease rows for a minute."""
        return await self.run_work(outbox.Claims().claim, limit, 60.0, exclude_ids)

    async def test_a_row_becomes_a_push(self) -> None:
        """A row becomes a push that the schema of the catalogue accepts, with and without a due_at."""
        with blocking(self.url) as txn:
            outbox.put(txn, "test.run", "k-1", {"n": 1}, priority=3, due_at=4102444800)
            outbox.put(txn, "test.run", "k-2", {})
        first, second = [row.push() for row in await self.claim()]
        self.assertEqual(
            first,
            {"cmd_type": "test.run", "idem_key": "k-1", "payload": {"n": 1}, "priority": 3, "due_at": 4102444800},
        )
        self.assertNotIn("due_at", second)
        for push in (first, second):
            BY_NAME[COMMAND_PUSH].request_schema.check(push)

    async def test_only_what_can_be_pushed_is_kept(self) -> None:
        """A command that the schema of a push or canonical JSON refuses is refused at the insert."""
        await self.assertFailure(self.run_work(outbox.put, "test.run", "k", {"n": 1.5}), CanonicalError)
        for cmd_type, key in (
            ("Bad", "k"),
            ("a" * 65, "k"),
            ("ok\n", "k"),
            ("ok", ""),
            ("ok", "\n"),
            ("ok", "k" * 201),
        ):
            await self.assertFailure(self.run_work(outbox.put, cmd_type, key, {}), StatementRefused)
        await self.run_work(outbox.put, "a" + "_.9" * 21, "~ " * 100, {})

    async def test_too_big_to_send(self) -> None:
        """A command whose frame is a byte too long is refused with size and limit; a batch is refused as a whole."""
        put = partial(outbox.put, frame_size=4096)
        overhead = outbox.frame_size_of(outbox.OutboxRow(0, "a.b", 'k"', {"text": ""}, 7, 4102444800, 0).push())
        room = 4096 - overhead
        how = {"priority": 7, "due_at": 4102444800}
        await self.run_work(partial(put, **how), "a.b", 'k"', {"text": "x" * room})
        big = partial(put, **how)
        error = await self.assertFailure(self.run_work(big, "a.b", 'k"', {"text": "x" * (room + 1)}), TooBigToSend)
        self.assertEqual((error.size, error.limit), (4097, 4096))
        for frame_size in (4096, 65536):
            batch = [("small", {}), ("big", {"text": "x" * frame_size})]
            put_batch = partial(outbox.put_batch, frame_size=frame_size)
            await self.assertFailure(self.run_work(put_batch, "a.b", batch), TooBigToSend)
        # The default limit is 65536 bytes.
        await self.assertFailure(self.run_work(outbox.put, "a.b", "k", {"text": "x" * 65_536}), TooBigToSend)
        await self.run_work(outbox.put_batch, "a.b", [("k", {"text": "x" * 64_000})])
        self.assertEqual(self.execute("select idem_key from s2s.outbox order by 1"), [("k",), ('k"',)])

    async def test_leases(self) -> None:
        """A leased row is not leased again until its lease ends, and not to its holder while it is in flight."""
        await self.put("a", "b")
        rows = await self.claim()
        self.assertEqual([row.idem_key for row in rows], ["a", "b"])
        self.assertEqual(await self.claim(), [])
        self.execute("update s2s.outbox set send_at = now()")
        self.assertEqual([row.idem_key for row in await self.claim(rows[0].outbox_id)], ["b"])

    def test_a_burst(self) -> None:
        """A claim reads little more than the rows that it leases, also if the statistics lack the waiting rows."""
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload) select 'test.run', 'b' || i, '{}'"
            " from generate_series(1, 20000) i"
        )
        with blocking(self.url) as txn:
            self.assertEqual(len(outbox.Claims().claim(txn, 256, 5.0)), 256)
            self.assertLess(rows_read(txn, "outbox"), 1500)

    def test_dead_front(self) -> None:
        """While a snapshot is held, a claim reads the waiting rows and not the rows that were sent before."""
        self.patch(lookback, "CHEAP_S", -1.0)
        claims = outbox.Claims(lambda: 0.0)
        with blocking(self.url) as holder:
            holder.execute("set transaction isolation level repeatable read; select 1")
            self.execute(
                "insert into s2s.outbox (cmd_type, idem_key, payload, send_at)"
                " select 'test.run', 'b' || i, '{}', now() - interval '1 minute' from generate_series(1, 5000) i"
            )
            with blocking(self.url) as txn:
                sent = [row.outbox_id for _ in range(25) for row in claims.claim(txn, 200, 5.0)]
                self.assertEqual(len(sent), 5000)
                outbox.delete(txn, sent)
            self.execute("insert into s2s.outbox (cmd_type, idem_key, payload) values ('test.run', 'next', '{}')")
            whole = self.pages(outbox.Claims())
            self.assertLess(self.pages(claims), whole - 50)
            with blocking(self.url) as txn:
                self.assertEqual(claims.depth(txn), 1)

    def pages(self, claims: outbox.Claims) -> int:
        """Count the pages that a claim reads, and roll the claim back."""
        with blocking(self.url) as txn:
            claims.claim(txn, 200, 5.0)
            statement = txn.query.rpartition(b" = off; ")[2]
            txn.connection.rollback()
            txn.execute(b"explain (analyze, buffers, format json) " + statement)
            plan = txn.fetchall()[0][0][0]["Plan"]
            txn.connection.rollback()
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    def test_below_the_start(self) -> None:
        """A row that appears below the start point of claims, by a late commit or a past send_at, is leased."""
        self.patch(lookback, "CHEAP_S", -1.0)
        now = [0.0]
        claims = outbox.Claims(lambda: now[0])
        insert = (
            "insert into s2s.outbox (cmd_type, idem_key, payload, send_at)"
            " values ('test.run', %s, '{}', clock_timestamp() - %s * interval '1 s')"
        )

        def claim() -> list[str]:
            with blocking(self.url) as txn:
                return [row.idem_key for row in claims.claim(txn, 2, 60.0)]

        late = blocking(self.url)
        txn = late.__enter__()
        txn.execute(insert, ("late", 60))
        self.execute(insert, "early", 0)
        self.assertEqual(claim(), ["early"])
        late.__exit__(None, None, None)
        self.assertEqual(claim(), [])
        now[0] += lookback.LEAST_S
        self.assertEqual(claim(), ["late"])
        for number in range(5):
            self.execute(insert, str(number), 3600)
        self.execute(insert, "now", 0)
        now[0] += lookback.LEAST_S
        self.assertEqual(sorted([*claim(), *claim(), *claim()]), ["0", "1", "2", "3", "4", "now"])

    def test_idle(self) -> None:
        """If scans are cheap, a claim that returns no row has scanned all rows, so an engine that stops misses none."""
        self.patch(lookback, "CHEAP_S", float("inf"))
        claims = outbox.Claims(lambda: 0.0)
        for key, age in (("a", 0), ("b", 3600)):
            self.execute(
                "insert into s2s.outbox (cmd_type, idem_key, payload, send_at)"
                " values ('test.run', %s, '{}', now() - %s * interval '1 s')",
                key,
                age,
            )
            with blocking(self.url) as txn:
                self.assertEqual([row.idem_key for row in claims.claim(txn, 10, 60.0)], [key])

    async def test_renewed_and_given_back(self) -> None:
        """Renewing or releasing a lease counts no attempt, and leaves a dead row dead."""
        await self.put("kept", "returned", "cancelled")
        kept, returned, cancelled = [row.outbox_id for row in await self.claim()]
        self.execute("update s2s.outbox set state = 'dead' where outbox_id = %s", cancelled)
        settlement = outbox.Settlement(renewed=[kept, cancelled], given_back=[returned])
        self.execute("update s2s.outbox set send_at = now()")
        await self.run_work(settlement.settle, 60.0)
        self.assertEqual([(row.idem_key, row.attempts) for row in await self.claim()], [("returned", 0)])
        ((lease_s,),) = self.execute(
            "select extract(epoch from send_at - now())::int from s2s.outbox where state = 'dead'"
        )
        self.assertLessEqual(lease_s, 0)

    async def test_settling(self) -> None:
        """Rows are deleted, retried later, or set dead with the reason; the depth counts the waiting rows."""
        await self.put("done", "again", "dead")
        done, again, dead = await self.claim()
        await self.run_work(outbox.delete, [done.outbox_id])
        await self.run_work(outbox.retry, [(again.outbox_id, 0, "paused", "for now")])
        await self.run_work(outbox.kill, [(dead.outbox_id, "bad_payload", "at /payload/n")])
        self.assertEqual(await self.run_work(outbox.Claims().depth), 1)
        (row,) = await self.claim()
        self.assertEqual((row.idem_key, row.attempts), ("again", 1))
        self.assertEqual(
            self.execute("select idem_key, error_code, error_message from s2s.outbox order by outbox_id"),
            [("again", "paused", "for now"), ("dead", "bad_payload", "at /payload/n")],
        )

    async def test_nothing_to_settle(self) -> None:
        """Settling an empty list of rows is no error."""
        for settle in (outbox.delete, outbox.retry, outbox.kill):
            await self.run_work(settle, [])

    async def test_two_engines_share(self) -> None:
        """Engines that claim at once never lease the same row, and together lease every row."""
        with blocking(self.url) as txn:
            outbox.put_batch(txn, "test.run", [(f"k-{n}", {}) for n in range(400)])
        claims = await gatherResults(
            [database.run(outbox.Claims().claim, 50, 60.0) for _ in range(5) for database in self.databases]
        )
        claims.append(await self.claim(limit=400))
        got = [row.idem_key for claim in claims for row in claim]
        self.assertEqual(len(got), 400)
        self.assertEqual(len(set(got)), 400)


class FrameSizeTests(SynchronousTestCase):
    """:func:`outbox.frame_size_of` and :func:`outbox.check`."""

    def test_no_frame_is_longer(self) -> None:
        """No frame is longer than the computed size, and the longest frame is less than 120 bytes shorter."""
        for row in (
            OutboxRow(0, "x" * 64, '"\\' * 100, {"text": "é" * 500}, 1000, 4102444800, 0),
            OutboxRow(0, "x", "k", {}, 0, None, 0),
        ):
            body = canonical.dumps(row.push())
            frame = envelope.seal(
                id="i" * 64, ts=4102444800, src="engine", dst="server", type=COMMAND_PUSH, body=body,
                key=Key("k" * 64, Secret(bytes(32)), "any", 0.0),
            )  # fmt: skip
            said = outbox.frame_size_of(row.push())
            self.assertEqual(said, envelope.size(COMMAND_PUSH, body))  # the size that a link checks
            self.assertIn(said - len(frame), range(120))

    def test_depth(self) -> None:
        """A payload that is too deep for its frame is refused, since the peer would close the link each time."""

        def nested(depth: int) -> dict[str, Any]:
            return {"in": nested(depth - 1)} if depth > 1 else {}

        outbox.check("a.b", "k", nested(canonical.MAX_DEPTH - 2))
        with self.assertRaises(CanonicalError):
            outbox.check("a.b", "k", nested(canonical.MAX_DEPTH - 1))

    def test_what_cannot_be_said(self) -> None:
        """The error for a payload without a canonical form has the place in the payload."""
        error = self.assertRaises(CanonicalError, outbox.check, "a.b", "k", {"n": 1.5})
        self.assertIn("at /n:", str(error))


class BroadcastTests(_StoreTestCase):
    """:mod:`s2s.store.tables.broadcasts`."""

    async def sweep(self, since_ts: int = 0, limit: int = 100, frame_size: int = 65536) -> int:
        """Sweep once."""
        return await self.run_work(broadcasts.sweep, since_ts, limit, frame_size)

    async def test_plain_sql_is_enough(self) -> None:
        """A message inserted with plain SQL is swept once, into a valid notice to all players."""
        self.execute("insert into s2s.broadcasts (message) values ('x')")
        self.assertEqual(await self.sweep(), 1)
        self.assertEqual(await self.sweep(), 0)
        self.assertEqual(
            self.execute("select cmd_type, idem_key, payload from s2s.outbox"),
            [
                (
                    "notice.publish",
                    *self.broadcast_keys(),
                    {"scope": "global", "message": "x", "severity": "info"},
                )
            ],
        )
        self.assertEqual(self.execute("select state, queued_at is not null from s2s.broadcasts"), [("queued", True)])

    async def test_any_time(self) -> None:
        """A sweep of all takes broadcasts of any time, such as ``-infinity``; one since a time leaves these out."""
        self.execute(
            "insert into s2s.broadcasts (message, created_at)"
            " values ('a', '-infinity'), ('b', '1900-01-01'), ('c', 'infinity'), ('d', now())"
        )
        self.assertEqual(await self.sweep(since_ts=1), 2)
        self.assertEqual(await self.sweep(), 2)

    async def test_nothing_invalid_is_stored(self) -> None:
        """The table refuses exactly the rows that the schema of notice.publish refuses."""
        schema = Schema(NoticePublish.schema)
        base: dict[str, Any] = {"scope": "global", "message": "x", "severity": "info"}
        changes: list[dict[str, Any]] = [
            {},
            {"scope": "sector", "sector_id": 1},
            {"scope": "corp", "corp_id": _FAR},
            {"scope": "player", "player_id": 5, "ttl_s": _FAR, "severity": "error"},
            {"message": "é" * 4000},
            {"message": ""},
            {"message": "é" * 4001},
            {"scope": "all"},
            {"severity": "loud"},
            {"scope": "sector"},
            {"sector_id": 1},
            {"scope": "corp", "corp_id": 1, "player_id": 1},
            {"scope": "player", "player_id": 0},
            {"scope": "player", "player_id": _FAR + 1},
            {"ttl_s": 0},
            {"ttl_s": _FAR + 1},
        ]
        for change in changes:
            row = base | change
            valid = schema.is_valid(row)
            try:
                with blocking(self.url) as txn:
                    broadcasts.add(txn, **row)
                stored = True
            except StatementRefused:
                stored = False
            self.assertEqual(stored, valid, row)
        await self.sweep()
        for (payload,) in self.execute("select payload from s2s.outbox"):
            schema.check(payload)

    async def test_since_is_inclusive(self) -> None:
        """A sweep takes broadcasts from second since_ts on and leaves older ones; since_ts may be any integer."""
        self.execute(
            "insert into s2s.broadcasts (message, created_at) values"
            " ('old', to_timestamp(999.999)), ('then', to_timestamp(1000)), ('new', to_timestamp(1001))"
        )
        self.assertEqual(await self.sweep(_FAR), 0)
        self.assertEqual(await self.sweep(1000), 2)
        self.assertEqual(self.execute("select message from s2s.broadcasts where state = 'pending'"), [("old",)])

    async def test_what_does_not_fit_is_refused(self) -> None:
        """A broadcast too big to send is refused with the reason, and does not count towards the limit."""
        for message in ("é" * 4000, "a", "é" * 4000, "b", "c"):
            self.execute("insert into s2s.broadcasts (message) values (%s)", message)
        self.assertEqual(await self.sweep(limit=2, frame_size=4096), 2)
        self.assertEqual(await self.sweep(limit=2, frame_size=4096), 1)
        self.assertEqual(
            self.execute(
                "select state, error like '%%the limit is 4096%%', count(*)::int from s2s.broadcasts group by 1, 2"
            ),
            [("queued", None, 3), ("refused", True, 2)],
        )

    async def test_sweeps_overlap(self) -> None:
        """Concurrent sweeps of two engines queue every broadcast exactly once."""
        self.execute("insert into s2s.broadcasts (message) select 'm' || n from generate_series(1, 1000) n")
        sweeps = [database.run(broadcasts.sweep, 0, 300, 65536) for _ in range(4) for database in self.databases]
        self.assertEqual(sum(await gatherResults(sweeps)) + await self.sweep(limit=1000), 1000)
        self.assertEqual(
            self.execute("select count(*)::int, count(distinct idem_key)::int from s2s.outbox"), [(1000, 1000)]
        )


class NoticeTests(_StoreTestCase):
    """:mod:`s2s.store.tables.notices`."""

    async def test_every_valid_notice_is_stored(self) -> None:
        """The largest values that the schema accepts are stored; a ttl_s too long for PostgreSQL is cut."""
        payloads = [
            {"scope": "sector", "sector_id": _FAR, "message": "m" * 4000, "severity": "warn", "ttl_s": _FAR},
            {"scope": "global", "message": "m", "severity": "info", "ttl_s": 60},
            {"scope": "global", "message": "m", "severity": "info"},
        ]
        await self.run_work(notices.insert_batch, list(enumerate(payloads, 1)))
        rows = self.execute(
            "select cmd_id, sector_id, extract(epoch from expires_at - created_at)::bigint from s2s.notices"
            " order by cmd_id"
        )
        self.assertEqual(rows, [(1, _FAR, 31_556_952_000), (2, None, 60), (3, None, None)])
        (newest, *_) = await self.run_work(notices.LISTED.read, 2, None)
        self.assertEqual((newest.cmd_id, newest.message, newest.expires_at), (3, "m", None))

    async def test_one_notice_for_a_command(self) -> None:
        """A second notice of the same command is refused with the name of the constraint."""
        payload = {"scope": "global", "message": "m", "severity": "info"}
        await self.run_work(notices.insert_batch, [(1, payload)])
        error = await self.assertFailure(self.run_work(notices.insert_batch, [(1, payload)]), StatementRefused)
        self.assertEqual(error.constraint, "notices_cmd_id_key")
