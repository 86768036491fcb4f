"""A step of a list reads a bounded number of rows for any filter, and all pages together are the complete list."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.operations import commands, config, lists, notices, orders, outbox, pages
from s2s.admin.operations.operation import Operation, OperationReply, OperationRequest, advance, perform
from s2s.errors import DeadlineExceeded
from s2s.store.lock_wait import Locked
from s2s.store.pool import blocking, step
from s2s.store.tables import lists as module
from tests.support.installed import OPERATIONS
from tests.support.postgres import DatabaseTestCase, Session, rows_read

#: Rows of a stretch, and rows of a page, in these tests.
_STRETCH, _PAGE = 200, 20


class _List(NamedTuple):
    """A list operation and its filters, with values that most rows, few rows or no rows have."""

    operation: Operation[Any]
    table: str
    key: str
    fill: str
    filters: Mapping[str, tuple[str, ...]]


_LISTS = (
    _List(
        commands.LIST,
        "commands",
        "cmd_id",
        "insert into s2s.commands (cmd_type, idem_key, payload, status)"
        " select case when n % 1000 = 7 then 'rare' else 'usual' end, 'k' || n, '{}',"
        " case when n % 1500 = 3 then 'dead' when n > 2500 then 'done' else 'ready' end"
        " from generate_series(1, 5000) n",
        {"cmd_type": ("usual", "rare", "none"), "status": ("ready", "done", "dead", "cancelled")},
    ),
    _List(
        outbox.LIST,
        "outbox",
        "outbox_id",
        "insert into s2s.outbox (cmd_type, idem_key, payload, state)"
        " select case when n % 1000 = 7 then 'rare' else 'usual' end, 'k' || n, '{}',"
        " case when n % 1500 = 3 then 'dead' else 'waiting' end from generate_series(1, 5000) n",
        {"cmd_type": ("usual", "rare", "none"), "state": ("waiting", "dead")},
    ),
    _List(
        lists.AUDIT,
        "audit",
        "audit_id",
        "insert into s2s.audit (actor, action, subject) select case when n % 1000 = 7 then 'rare' else 'usual' end,"
        " case when n <= 2500 then 'old' else 'new' end, case when n % 700 = 9 then 'one' else '' end"
        " from generate_series(1, 5000) n",
        {"actor": ("usual", "rare", "none"), "action": ("old", "new", "none"), "subject": ("one", "none")},
    ),
    _List(
        orders.LIST,
        "orders",
        "order_id",
        "insert into s2s.orders (order_id, rpc, params, status, created_at) select 'o' || n,"
        " case when n > 2500 then 'admin.config.set.v1' else 'admin.engine.force_tick.v1' end, '{}',"
        " case when n % 1500 = 3 then 'refused' when n > 2500 then 'done' else 'queued' end,"
        " now() - n * interval '1 s' from generate_series(1, 5000) n",
        {
            "rpc": ("admin.config.set.v1", "admin.engine.force_tick.v1", "world.set_sector_status.v1"),
            "status": ("queued", "done", "refused", "failed"),
        },
    ),
    _List(
        config.HISTORY,
        "config_history",
        "version",
        "insert into s2s.config_history (version, key, old_value, new_value, actor) select n + 9000,"
        " case when n % 1000 = 7 then 'rare' else 'usual' end, '1', '2', 'x' from generate_series(1, 5000) n",
        {"key": ("usual", "rare", "none")},
    ),
    _List(
        notices.LIST,
        "notices",
        "notice_id",
        "insert into s2s.notices (cmd_id, scope, message, severity) select n, 'global', 'm', 'info'"
        " from generate_series(1, 5000) n",
        {},
    ),
)


def _asked(which: _List) -> Iterator[dict[str, str]]:
    """Yield every combination of the filters of a list."""
    for values in itertools.product(*[(None, *values) for values in which.filters.values()]):
        yield {name: value for name, value in zip(which.filters, values, strict=True) if value is not None}


class ListTests(DatabaseTestCase):
    """Every list that may be long, filled so that some filters match few rows."""

    def setUp(self) -> None:
        """Shorten a stretch to _STRETCH rows."""
        super().setUp()
        self.patch(module, "STRETCH_ROWS", _STRETCH)
        self.most_read = 0

    def fill(self, which: _List) -> None:
        """Fill the table of a list, with triggers disabled."""
        with Session(self.url) as session:
            session.run("set session_replication_role = replica")
            session.run(which.fill)
            session.run(f"analyze {which.table}")

    def page(self, txn: Any, which: _List, **query: Any) -> Any:
        """Return a page, and record the most rows that a step reads."""

        def counted(take: Callable[[Any], Any], txn: Any) -> Any:
            before = rows_read(txn, which.table)
            came = take(txn)
            self.most_read = max(self.most_read, rows_read(txn, which.table) - before)
            return came

        steps = perform(which.operation, OperationRequest("me", "observer", query={"limit": _PAGE, **query}))
        came: Any = None
        while not isinstance(take := advance(steps, came, None), OperationReply):
            came = step(txn, lambda txn, take=take: counted(take, txn))
        return take.value

    def test_what_a_step_reads(self) -> None:
        """With any filters, a step reads a bounded number of rows, and the pages together are the complete list."""
        for which in _LISTS:
            self.fill(which)
            for filters in _asked(which):
                with self.subTest(table=which.table, **filters), blocking(self.url) as txn:
                    self.most_read = 0
                    found: list[Any] = []
                    cursor: dict[str, str] = {}
                    while True:
                        page = self.page(txn, which, **filters, **cursor)
                        self.assertLessEqual(len(page.items), _PAGE)
                        found += [getattr(row, which.key) for row in page.items]
                        if page.next_cursor is None:
                            break
                        cursor = {"cursor": page.next_cursor}
                    self.assertLess(self.most_read, 3 * _STRETCH, (which.table, filters))
                    where = " and ".join([f"{name} = %s" for name in filters] or ["true"])
                    order = "created_at desc, order_id" if which.table == "orders" else which.key
                    wanted = self.execute(
                        f"select {which.key} from {which.table} where {where} order by {order} desc", *filters.values()
                    )
                    self.assertEqual(found, [key for (key,) in wanted])

    def test_a_request_has_an_end(self) -> None:
        """A request that matches no row stops after MOST_STRETCHES stretches, and returns a cursor to continue from."""
        [which] = [each for each in _LISTS if each.table == "commands"]
        self.fill(which)
        self.patch(pages, "MOST_STRETCHES", 3)
        with blocking(self.url) as txn:
            page = self.page(txn, which, cmd_type="none")
        [(first,)] = self.execute("select max(cmd_id) from s2s.commands")
        self.assertEqual((page.items, page.next_cursor), ([], str(first - 3 * _STRETCH + 1)))

    def test_a_list_that_takes_too_long(self) -> None:
        """A slow statement of a list is stopped, the error asks to narrow the list, and the connection stays usable."""
        self.patch(module, "LIMIT_S", 0.05)
        for which in _LISTS:
            with self.subTest(table=which.table), blocking(self.url) as txn, Session(self.url) as other:
                other.run(f"begin; lock table {which.table} in access exclusive mode")
                error = self.assertRaises(DeadlineExceeded, self.unread, txn, which)
                self.assertIn("narrow it", error.message)
                self.assertFalse(error.payload()["details"]["retryable"])
                other.run("rollback")
                self.page(txn, which)

    def test_a_list_behind_a_lock(self) -> None:
        """A list that waits for a lock is stopped, and the error says that another session has locked the table."""
        for which in _LISTS:
            with self.subTest(table=which.table), blocking(self.url) as txn, Session(self.url) as other:
                other.run(f"begin; lock table {which.table} in access exclusive mode")
                error = self.assertRaises(Locked, self.unread, txn, which)
                self.assertIn("another session has locked the table", error.message)
                self.assertTrue(error.payload()["details"]["retryable"])
                other.run("rollback")
                self.page(txn, which)

    def unread(self, txn: Any, which: _List) -> None:
        """Request a page without counting the rows that are read."""
        steps = perform(which.operation, OperationRequest("me", "observer"))
        take: Any = advance(steps, None, None)
        step(txn, take)


class PlaceTests(SynchronousTestCase):
    """Which operations are lists."""

    def test_all_lists_are_known(self) -> None:
        """Exactly the operations named ``list_*`` or ``report_*`` are marked as lists."""
        for operation in OPERATIONS:
            reads_much = operation.name.startswith(("list_", "report_"))
            self.assertEqual(operation.is_list, reads_much, operation.name)
