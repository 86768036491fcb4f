"""Table ``outbox``: commands to be sent to the server (docs/protocol.rst, "Outbox and sweep")."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import psycopg2

from s2s.errors import DatabaseError, DatabaseUnavailable, InvalidPayload, StatementRefused, TooBigToSend
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import COMMAND_PUSH
from s2s.protocol.limits import Bounds
from s2s.store import sqlstate
from s2s.store.cursor import check_readable, own
from s2s.store.driver import Cursor, array_literal, savepoint, translate_error
from s2s.store.kept_rows import STATE, check_written, note, still_there
from s2s.store.tables.lookback import SLACK_S, Lookback

CHANNEL: Final = "s2s_outbox"
#: The most rows that are counted: counting more would take longer than the number is worth.
MOST_COUNTED: Final = 100_000
#: Seconds until the next attempt on a row that the database refuses to change or remove. One log line a minute reports
#: it.
KEPT_S: Final = 30.0
#: The most rows that a claim excludes because they cannot be leased. With more, the rows after them may have to wait.
MOST_KEPT: Final = 1000
#: Multiple of the frame size up to which the stored text of a payload is read. A longer payload fits into no frame; the
#: stored text is longer than the canonical form because it has spaces between values.
LONGEST_TEXT: Final = 2

T = TypeVar("T")
R = TypeVar("R")

#: The start of a claim. A commit may come a moment after its rows are due; a look back finds rows that come later.
_START: Final = (
    f"(least(to_timestamp(%(send_at)s), now() - {SLACK_S} * interval '1 second'),"
    f" case when to_timestamp(%(send_at)s) <= now() - {SLACK_S} * interval '1 second' then %(outbox_id)s else 0 end)"
)
_FROM: Final = f"(send_at, outbox_id) >= {_START}"
_BY_ID: Final = "outbox_id = any(%(ids)s::bigint[])"
# Use the order of the index. With statistics of a smaller table, as in any burst, the planner would sort all waiting
# rows.
_SET: Final = "set local synchronous_commit = off; set local enable_sort = off; "
_DUE: Final = (
    "select outbox_id{} from s2s.outbox where state = 'waiting' and send_at <= now() and not outbox_id ="
    " any(%(exclude)s::bigint[]) and {} order by send_at, outbox_id limit %(limit)s for update skip locked"
)
# A stored payload may be compressed: the text is measured only for the few payloads that take more than a kilobyte.
_CLAIM: Final = (
    f"{_SET}with claimed as ({_DUE.format(', send_at', '{}')}), leased as ("  # noqa: S608
    " update s2s.outbox o set send_at = now() + %(lease_s)s * interval '1 second'"
    " from claimed c where o.outbox_id = c.outbox_id"
    " returning o.outbox_id, o.cmd_type, o.idem_key, case when pg_column_size(o.payload) < 1000"
    " or octet_length(o.payload::text) <= %(longest)s then o.payload end as payload,"
    " o.priority, o.due_at, o.attempts, o.send_at)"
    # A trigger keeps a row unchanged that is claimed and not leased. The trigger may return null or the old row.
    " select c.outbox_id, cmd_type, idem_key, payload, priority, due_at, attempts,"
    " extract(epoch from c.send_at)::float8 from claimed c"
    " left join leased l on l.outbox_id = c.outbox_id and l.send_at > now()"
)
_BEHIND: Final = (
    f"select outbox_id from s2s.outbox where state = 'waiting' and (send_at, outbox_id) < {_START}"  # noqa: S608
    " and not outbox_id = any(%(exclude)s::bigint[]) order by send_at, outbox_id limit %(limit)s"
)


@dataclass(frozen=True)
class OutboxRow:
    """A command to push.

    :param due_at: the command's own ``due_at``, in Unix seconds.
    :param payload: ``None``: it is longer than any frame and was not read.
    :param attempts: how many earlier sends of the row were not settled.
    """

    outbox_id: int
    cmd_type: str
    idem_key: str
    payload: dict[str, Any] | None
    priority: int
    due_at: int | None
    attempts: int

    def push(self) -> dict[str, Any]:
        """Return the payload of the row's ``s2s.command.push``.

        :raises InvalidPayload: the row's JSON was not read.
        :raises CanonicalError: the row's JSON cannot be read.
        """
        if self.payload is None:
            raise InvalidPayload("the payload is longer than a frame may be, and was not read: send less")
        check_readable(self.payload, "payload")
        return _push(self.cmd_type, self.idem_key, self.payload, self.priority, self.due_at)


def _push(
    cmd_type: str, idem_key: str, payload: Mapping[str, Any], priority: int = 100, due_at: int | None = None
) -> dict[str, Any]:
    push = {"cmd_type": cmd_type, "idem_key": idem_key, "payload": payload, "priority": priority}
    return push if due_at is None else {**push, "due_at": due_at}


def frame_size_of(push: Mapping[str, Any]) -> int:
    """Return the largest size, in bytes, of the frame that carries a push, whatever its key and its ids are.

    :raises CanonicalError: the push holds a value that canonical JSON cannot represent.
    """
    return envelope.size(COMMAND_PUSH, canonical.dumps(push, depth=2))


def check(
    cmd_type: str,
    idem_key: str,
    payload: Mapping[str, Any],
    frame_size: int = Bounds.frame_size,
    *,
    priority: int = 100,
    due_at: int | None = None,
) -> str:
    """Raise if a command could never be sent (docs/protocol.rst, "Transport and framing").

    :param frame_size: the longest frame, in bytes.
    :returns: the payload in its canonical form.
    :raises CanonicalError: the payload holds a value that canonical JSON cannot represent.
    :raises TooBigToSend: its frame would be longer.
    """
    written = canonical.dumps(payload).decode()
    size = frame_size_of(_push(cmd_type, idem_key, payload, priority, due_at))
    if size > frame_size:
        raise TooBigToSend(size, frame_size)
    return written


def put(
    txn: Cursor,
    cmd_type: str,
    idem_key: str,
    payload: Mapping[str, Any],
    *,
    priority: int = 100,
    due_at: int | None = None,
    frame_size: int = Bounds.frame_size,
) -> int:
    """Emit a command; it is sent once the transaction is committed.

    :param idem_key: the same for the same intention, however often it is emitted.
    :param due_at: Unix seconds before which the server does not run it.
    :param frame_size: the longest frame, in bytes.
    :returns: its ``outbox_id``.
    :raises CanonicalError: the payload holds a value that canonical JSON cannot represent.
    :raises TooBigToSend: its frame would be longer.
    """
    written = check(cmd_type, idem_key, payload, frame_size, priority=priority, due_at=due_at)
    txn = own(txn)
    txn.execute(
        "insert into s2s.outbox (cmd_type, idem_key, payload, priority, due_at)"
        " values (%s, %s, %s::jsonb, %s, %s) returning outbox_id",
        (cmd_type, idem_key, written, priority, due_at),
    )
    check_written(txn, "insert", "s2s.outbox")
    return int((txn.fetchone() or ())[0])


def put_batch(
    txn: Cursor,
    cmd_type: str,
    commands: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    frame_size: int = Bounds.frame_size,
) -> None:
    """Emit many commands of one type in one statement.

    :param commands: ``(idem_key, payload)``.
    :param frame_size: the longest frame, in bytes.
    :raises CanonicalError: a payload holds a value that canonical JSON cannot represent; none is emitted.
    :raises TooBigToSend: a frame would be longer; none is emitted.
    """
    written = [check(cmd_type, key, payload, frame_size) for key, payload in commands]
    txn = own(txn)
    txn.execute(
        "insert into s2s.outbox (cmd_type, idem_key, payload)"
        " select %s, idem_key, payload::jsonb from unnest(%s::text[], %s::text[])"
        " with ordinality c (idem_key, payload, place) order by place",
        (cmd_type, [key for key, _ in commands], written),
    )
    check_written(txn, "insert", "s2s.outbox", len(commands))


class Claims:
    """The claims of one relay. Each claim starts where the previous one started (:mod:`s2s.store.tables.lookback`).

    :param now: returns monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._lookback = Lookback(now)
        #: ``send_at``, in Unix seconds, and ``outbox_id`` of the first row of the last claim.
        self._start: tuple[float, int] | None = None
        self._now = now
        #: Rows that the database refuses to lease, and the time until which claims exclude them.
        self._kept: dict[int, float] = {}

    def claim(
        self,
        txn: Cursor,
        limit: int,
        lease_s: float,
        exclude_ids: Sequence[int] = (),
        frame_size: int = Bounds.frame_size,
        is_singly: bool = False,
    ) -> list[OutboxRow]:
        """Lease rows to send, the longest waiting first; two relays never lease the same row.

        Neither a lease nor its result need reach the disk at once: rows whose change a crash of the database loses are
        sent again, and the server recognises them or refuses them again.

        :param lease_s: seconds after which any relay may claim a row that was neither deleted nor retried.
        :param exclude_ids: rows that the caller still has in flight, in case a lease has run out.
        :param frame_size: the longest frame, in bytes; a payload that is far longer is not read.
        :param is_singly: the database refused the last claim: find the refused rows, and lease the others.
        """
        self._kept = {outbox_id: until for outbox_id, until in self._kept.items() if self._now() < until}
        params = {
            "exclude": array_literal([*exclude_ids, *self._kept]),
            "limit": limit,
            "lease_s": lease_s,
            "longest": LONGEST_TEXT * frame_size,
        }
        rows: list[OutboxRow] = []
        is_whole = self._start is None
        if is_whole:
            with self._lookback.measured():
                self._claim(txn, _FROM, params, rows, is_singly)
        else:
            if self._lookback.is_due:
                self._lookback.look(txn, _BEHIND, {**params, **self._from()})
                if len(self._lookback.behind) >= limit:
                    # Enough rows lie below the start: begin the next claim at the beginning of the index.
                    self._start = None
            if self._lookback.behind:
                self._claim(
                    txn,
                    _BY_ID,
                    {**params, "ids": array_literal(self._lookback.behind)},
                    rows,
                    is_singly,
                )
            if len(rows) < limit:
                self._claim(txn, _FROM, {**params, "limit": limit - len(rows)}, rows, is_singly)
        if not rows and self._lookback.is_cheap:
            self._start = None
            return [] if is_whole else self.claim(txn, limit, lease_s, exclude_ids, frame_size, is_singly)
        return sorted(rows, key=lambda row: row.outbox_id)

    def depth(self, txn: Cursor) -> int:
        """Count the waiting rows, in flight or not; :data:`MOST_COUNTED` means that many or more.

        Rows below the start of the last claim are not counted.
        """
        txn.execute(
            "select count(*) from (select from s2s.outbox where state = 'waiting'"
            " and (send_at, outbox_id) >= (to_timestamp(%(send_at)s), %(outbox_id)s) limit %(most)s) waiting",
            {**self._from(), "most": MOST_COUNTED},
        )
        return int((txn.fetchone() or (0,))[0])

    def _claim(
        self, txn: Cursor, where: str, params: Mapping[str, Any], rows: list[OutboxRow], is_singly: bool
    ) -> None:
        if not is_singly:
            rows += self._lease(txn, where, params)
            return
        txn.execute(f"{_SET}{_DUE.format('', where)}", {**params, **self._from()})
        ids = [outbox_id for (outbox_id,) in txn]
        leased, refused = _by_halves(
            txn, lambda some: self._lease(txn, _BY_ID, {**params, "ids": array_literal(some)}), ids
        )
        rows += leased
        self._keep(refused)

    def _lease(self, txn: Cursor, where: str, params: Mapping[str, Any]) -> list[OutboxRow]:
        txn.execute(_CLAIM.format(where), {**params, **self._from()})
        found = txn.fetchall()
        kept = [row[0] for row in found if row[1] is None]
        if kept:
            note(txn, "update", "s2s.outbox")
            self._keep(kept)
        if found and where == _FROM:
            self._start = min((send_at, outbox_id) for outbox_id, *_, send_at in found)
        return [OutboxRow(*row[:-1]) for row in found if row[1] is not None]

    def _keep(self, outbox_ids: Sequence[int]) -> None:
        """Exclude rows from the claims for a while."""
        room = MOST_KEPT - len(self._kept)
        self._kept.update(dict.fromkeys(outbox_ids[:room], self._now() + KEPT_S))

    def _from(self) -> dict[str, Any]:
        send_at, outbox_id = self._start or (float("-inf"), 0)
        return {"send_at": send_at, "outbox_id": outbox_id}


def _by_halves(txn: Cursor, change: Callable[[Sequence[T]], list[R]], rows: Sequence[T]) -> tuple[list[R], list[T]]:
    """Change rows of which the database refuses some, and report the refusals to the operator.

    :param change: changes the given rows.
    :returns: the results of the changes, and the rows that the database refuses and that are unchanged.
    """
    returned: list[R] = []
    refused_rows: list[T] = []
    left = [rows] if rows else []
    while left:
        some = left.pop()
        try:
            with savepoint(txn):
                changed = change(some)
                # Run deferred constraints and triggers now, so that their errors are caught here.
                txn.execute("set constraints all immediate")
            returned += changed
        except psycopg2.Error as error:
            refused = translate_error(error, txn.connection)
            if not is_refused(refused):
                raise
            if len(some) > 1:
                middle = len(some) // 2
                left += [some[middle:], some[:middle]]
                continue
            refused_rows += some
            kept = getattr(txn.connection, "kept", None)
            if kept is not None:
                kept.append(told_as_kept(refused))
    return returned, refused_rows


def is_refused(error: BaseException | None) -> bool:
    """Whether an error may concern one row, so that a statement with this row never succeeds."""
    if not isinstance(error, DatabaseUnavailable):
        return isinstance(error, StatementRefused)
    meaning = sqlstate.meaning(error.state)
    return bool(error.state) and not (meaning.drops or meaning.passes)


def told_as_kept(refused: DatabaseError) -> StatementRefused:
    """Return the error that reports a refusal in the log and in the health check, whatever its SQLSTATE."""
    state = getattr(refused, "state", "")
    if state == STATE:
        return StatementRefused(str(refused), state=STATE)
    return StatementRefused(
        f"rows of s2s.outbox are left out: {sqlstate.with_cure(refused)} (SQLSTATE {state})", state=STATE
    )


def lease(txn: Cursor, outbox_ids: Sequence[int], lease_s: float) -> list[int]:
    """Hold claimed rows for ``lease_s`` seconds from now; 0 releases them to the next claim.

    :returns: the rows that the database refuses to change.
    """
    txn.execute(
        "update s2s.outbox set send_at = now() + %(lease_s)s * interval '1 second'"
        " where outbox_id = any(%(ids)s::bigint[]) and state = 'waiting'"
        " returning case when send_at = now() + %(lease_s)s * interval '1 second' then outbox_id end",
        {"lease_s": lease_s, "ids": array_literal(outbox_ids)},
    )
    return _note_kept(txn, outbox_ids)


def _note_kept(txn: Cursor, outbox_ids: Iterable[int]) -> list[int]:
    """Return the given rows that the last statement did not return as changed, although they still wait."""
    written = {outbox_id for (outbox_id,) in txn.fetchall()}
    missing = [outbox_id for outbox_id in outbox_ids if outbox_id not in written]
    return still_there(txn, "update", "s2s.outbox", "outbox_id", missing, "state = 'waiting'")


def delete(txn: Cursor, outbox_ids: Sequence[int]) -> list[int]:
    """Remove rows that the server has accepted.

    :returns: the rows that the database refuses to remove.
    """
    txn.execute("delete from s2s.outbox where outbox_id = any(%s::bigint[])", (array_literal(outbox_ids),))
    if txn.rowcount >= len(outbox_ids):
        return []
    return still_there(txn, "delete", "s2s.outbox", "outbox_id", outbox_ids)


def retry(txn: Cursor, retries: Sequence[tuple[int, float, str, str]]) -> list[int]:
    """Send rows again later.

    :param retries: ``(outbox_id, seconds from now, code, message)``: the last two state why the attempt failed.
    :returns: the rows that the database refuses to change.
    """
    ids, delays, codes, messages = (list(column) for column in zip(*retries, strict=True)) if retries else ([],) * 4
    txn.execute(
        "update s2s.outbox o set attempts = attempts + 1, send_at = now() + r.delay_s * interval '1 second',"
        " error_code = r.code, error_message = r.message"
        " from unnest(%s::bigint[], %s::float8[], %s::text[], %s::text[]) r (outbox_id, delay_s, code, message)"
        " where o.outbox_id = r.outbox_id and o.state = 'waiting'"
        " returning case when o.send_at = now() + r.delay_s * interval '1 second' then o.outbox_id end",
        (ids, [float(delay_s) for delay_s in delays], codes, messages),
    )
    return _note_kept(txn, ids)


def kill(txn: Cursor, refusals: Sequence[tuple[int, str, str]]) -> list[int]:
    """Mark rows as dead that the server will never accept.

    :param refusals: ``(outbox_id, code, message)``.
    :returns: the waiting rows that the database refuses to change.
    """
    txn.execute(
        "update s2s.outbox o set state = 'dead', attempts = attempts + 1, error_code = r.code, error_message"
        " = r.message"
        " from unnest(%s::bigint[], %s::text[], %s::text[]) r (outbox_id, code, message)"
        " where o.outbox_id = r.outbox_id and o.state = 'waiting'"
        " returning case when o.state = 'dead' then o.outbox_id end",
        tuple(list(column) for column in zip(*refusals, strict=True)) or ([], [], []),
    )
    return _note_kept(txn, [outbox_id for outbox_id, *_ in refusals])


@dataclass
class Settlement:
    """The results that a relay writes for its rows in one transaction.

    :ivar retries: ``(outbox_id, seconds from now, code, message)``.
    :ivar dead: ``(outbox_id, code, message)``.
    :ivar given_back: rows that were claimed and not sent.
    :ivar renewed: rows that are still in flight.
    """

    accepted: list[int] = field(default_factory=list)
    retries: list[tuple[int, float, str, str]] = field(default_factory=list)
    dead: list[tuple[int, str, str]] = field(default_factory=list)
    given_back: list[int] = field(default_factory=list)
    renewed: list[int] = field(default_factory=list)

    @property
    def let_go(self) -> list[int]:
        """The rows that the relay no longer holds."""
        return [*self.accepted, *self.given_back, *(each[0] for each in self.retries), *(each[0] for each in self.dead)]

    def settle(self, txn: Cursor, lease_s: float, kept_s: float = KEPT_S, is_singly: bool = False) -> list[int]:
        """Write the results; leases first, since a row may have been answered after its lease was found old.

        :param kept_s: seconds until the next attempt on a row that can neither be removed nor changed.
        :param is_singly: the database refused the results: find the refused rows, and write the others.
        :returns: the accepted rows that cannot be removed.
        """
        txn.execute("set local synchronous_commit = off")  # see Claims.claim

        def write(change: Callable[..., list[int]], rows: Sequence[Any], *more: float) -> list[int]:
            if not rows:
                return []
            if not is_singly:
                return change(txn, rows, *more)
            kept, refused = _by_halves(txn, lambda some: change(txn, some, *more), rows)
            return [*kept, *(row if isinstance(row, int) else row[0] for row in refused)]

        write(lease, self.renewed, lease_s)
        write(lease, self.given_back, 0.0)
        undeleted = write(delete, self.accepted)
        write(lease, [*undeleted, *write(retry, self.retries), *write(kill, self.dead)], kept_s)
        return undeleted
