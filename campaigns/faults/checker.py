"""Check a campaign only by the answers that its clients received and by the rows of the database.

The check is a pure function of both, so that tests can call it with wrong histories.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from campaigns.faults.history import Operation
from tests.support.peer import PUSH

#: The command type of the pushers.
CMD_TYPE: Final = "faults.mark"
#: Error codes after which a push may still have taken effect (docs/protocol.rst, "Commands").
DOUBTFUL: Final = frozenset({"db_unavailable", "internal_error", "deadline_exceeded"})
#: Error codes that may answer a replayed request. A push may also be accepted: as a duplicate, or as new if its sender
#: was refused temporarily; the sender's next try is then the duplicate.
REPLAYED: Final = frozenset({"replay", "not_ready", "ts_skew", "auth_bad", "overloaded"})


@dataclass(frozen=True)
class Command:
    """A row of ``commands``.

    :param fingerprint: the fingerprint stored with its key, as hexadecimal digits; ``None`` if the key is not stored.
    """

    cmd_id: int
    idem_key: str
    content: Mapping[str, Any]
    status: str
    fingerprint: str | None


@dataclass(frozen=True)
class Order:
    """A row of ``orders``."""

    order_id: str
    idem_key: str | None
    params: Mapping[str, Any]
    status: str
    result: Mapping[str, Any] | None


@dataclass(frozen=True)
class Facts:
    """The content of the database when all work is done.

    :param effects: the rows that the ``faults.mark`` commands inserted: key, half of the work, time in Unix seconds.
    :param notices: the message of every notice.
    :param outbox: key and state of the remaining rows of the outbox.
    :param broadcasts: the message and state of every broadcast.
    :param changes: for each sector, its changes of status in order, as old and new status.
    :param sectors: the present status of each sector.
    :param versions: the versions of the configuration, in order.
    :param engines: for each engine, the version of the configuration that it reports as in force, and its state.
    :param audited: the entries of the audit: the subjects of orders, the versions of settings, the names of keys, the
        ids of cancelled and retried commands, the types of the requests that engines obeyed, and the desired states.
    :param keys: the names of all keys.
    :param notes: the number of claims that still exist.
    """

    commands: Sequence[Command] = ()
    effects: Sequence[tuple[str, int, float]] = ()
    notices: Sequence[str] = ()
    outbox: Sequence[tuple[str, str]] = ()
    broadcasts: Sequence[tuple[str, str]] = ()
    orders: Sequence[Order] = ()
    changes: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    sectors: Mapping[int, str] = field(default_factory=dict)
    versions: Sequence[int] = ()
    engines: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    audited: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    keys: Sequence[str] = ()
    notes: int = 0


def check(operations: Iterable[Operation], facts: Facts) -> list[str]:
    """Return a line for each violation of a promise."""
    by_op: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_op[operation.op].append(operation)
    return [
        *_pushes(by_op["push"], facts),
        *_emitted(by_op["emit"], facts),
        *_broadcasts(by_op["broadcast"], facts),
        *_orders(by_op["order"], facts),
        *_config(by_op["config"], facts),
        *_keys(by_op["rotate"], facts),
        *_by_hand(by_op["cancel"] + by_op["retry"], facts),
        *_steered(by_op["steer"], facts),
        *_replays(by_op["replay"]),
        *_outages(by_op["outage"], by_op["push"], by_op["order"]),
        *_recoveries(by_op["recovery"]),
        *_left_over(facts),
    ]


def _by_key(operations: Iterable[Operation]) -> Mapping[str, list[Operation]]:
    found: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        found[operation.asked["key"]].append(operation)
    return found


def _once(what: str, count: int, is_certain: bool, is_possible: bool) -> Iterator[str]:
    """Check that a row exists once.

    :param is_certain: the row must exist.
    :param is_possible: the row may exist.
    """
    if count > 1:
        yield f"{what} is there {count} times"
    if count == 0 and is_certain:
        yield f"{what} was accepted and is not there"
    if count == 1 and not is_possible:
        yield f"{what} was refused and is there"


# --- commands -------------------------------------------------------------------------------------------------------


def _pushes(pushes: Sequence[Operation], facts: Facts) -> Iterator[str]:
    stored: defaultdict[str, list[Command]] = defaultdict(list)
    for command in facts.commands:
        stored[command.idem_key].append(command)
    halves: defaultdict[str, Counter[int]] = defaultdict(Counter)
    first: dict[str, float] = {}
    for key, half, at in facts.effects:
        halves[key][half] += 1
        first[key] = min(at, first.get(key, at))
    asked = _by_key(pushes)
    hurried = set(facts.audited.get("retry", ()))
    for key, tries in asked.items():
        found = stored[key]
        accepted = [each for each in tries if each.ended == "ok"]
        doubtful = [each for each in tries if each.ended == "unknown" or each.came.get("code") in DOUBTFUL]
        yield from _once(f"push {key}", len(found), bool(accepted), bool(accepted or doubtful))
        cmd_ids = {each.came["cmd_id"] for each in accepted}
        if len(cmd_ids) > 1 or (found and cmd_ids - {command.cmd_id for command in found}):
            yield f"push {key} was accepted as {sorted(cmd_ids)} and is {[command.cmd_id for command in found]}"
        for command in found:
            yield from _one_push(key, command, accepted, tries)
            if command.status not in ("done", "cancelled"):
                yield f"push {key} is {command.status}"
        if found and halves[key] != Counter((1, 2) if found[0].status == "done" else ()):
            yield f"push {key} is {found[0].status} and took effect by halves {dict(halves[key])}"
        # The first push of a key to arrive sets the due time: it may be any try. An operator's retry ignores it.
        due_at = min((each.asked.get("due_at") or 0 for each in tries), default=0)
        if key in first and first[key] < due_at and not {command.cmd_id for command in found} & hurried:
            yield f"push {key} took effect at {first[key]}, and was due at {due_at}"
        if not found and halves[key]:
            yield f"push {key} is not there and took effect"
        # Pushes of one key with different contents cannot both be accepted.
        contents = {_frozen(each.asked["content"]) for each in accepted}
        if len(contents) > 1:
            yield f"push {key} was accepted with {len(contents)} contents"
    for key in halves.keys() - asked.keys():
        yield f"{key} took effect and was never pushed"


def _one_push(key: str, command: Command, accepted: Sequence[Operation], tries: Sequence[Operation]) -> Iterator[str]:
    contents = [_frozen(each.asked["content"]) for each in accepted or tries]
    if _frozen(command.content) not in contents:
        yield f"push {key} is there with another content than was pushed"
    if command.fingerprint != fingerprint(command.content):
        yield f"push {key} has another fingerprint than its content: {command.fingerprint}"
    for each in tries:
        is_same = _frozen(each.asked["content"]) == _frozen(command.content)
        if each.came.get("code") == "idem_conflict" and is_same:
            yield f"push {key} was refused as a conflict with itself"


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return the fingerprint (docs/protocol.rst, "Commands") of a ``faults.mark`` command; its JSON is ASCII only."""
    whole = {"cmd_type": CMD_TYPE, "payload": content}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _emitted(emitted: Sequence[Operation], facts: Facts) -> Iterator[str]:
    notices = Counter(facts.notices)
    for each in emitted:
        for key in each.asked["keys"]:
            yield from _once(f"emitted {key}", notices[key], each.ended == "ok", each.ended != "fail")


def _broadcasts(broadcasts: Sequence[Operation], facts: Facts) -> Iterator[str]:
    notices, rows = Counter(facts.notices), Counter(message for message, _ in facts.broadcasts)
    for each in broadcasts:
        for message in each.asked["messages"]:
            yield from _once(f"broadcast {message}", rows[message], each.ended == "ok", each.ended != "fail")
            if notices[message] != rows[message]:
                yield f"broadcast {message} is there {rows[message]} times and was published {notices[message]} times"
    for message, state in facts.broadcasts:
        if state != "queued":
            yield f"broadcast {message} is {state}"


# --- orders and settings --------------------------------------------------------------------------------------------


def _orders(orders: Sequence[Operation], facts: Facts) -> Iterator[str]:
    rows: defaultdict[str | None, list[Order]] = defaultdict(list)
    for row in facts.orders:
        rows[row.idem_key].append(row)
    for key, tries in _by_key(orders).items():
        accepted = any(each.ended == "ok" for each in tries)
        yield from _once(f"order {key}", len(rows[key]), accepted, any(each.ended != "fail" for each in tries))
    results: defaultdict[int, Counter[tuple[str, str]]] = defaultdict(Counter)
    for row in facts.orders:
        if row.status not in ("done", "refused"):
            yield f"order {row.order_id} is {row.status}: {row.result}"
        elif row.status == "done" and "was" in (row.result or {}):
            assert row.result is not None
            results[row.result["sector_id"]][row.result["was"], row.result["status"]] += 1
    for sector in results.keys() | facts.changes.keys():
        changes = facts.changes.get(sector, ())
        if Counter(changes) != results[sector]:
            yield f"sector {sector} was changed {Counter(changes)}, and its orders say {results[sector]}"
        for (_, became), (was, _) in itertools.pairwise(changes):
            if became != was:
                yield f"sector {sector} became {became}, and was {was} then"
        if changes and facts.sectors.get(sector) != changes[-1][1]:
            yield f"sector {sector} is {facts.sectors.get(sector)}, and became {changes[-1][1]} last"
    audited = Counter(facts.audited.get("order", ()))
    for row in facts.orders:
        if audited[row.order_id] != 2:
            yield f"order {row.order_id} is in the audit {audited[row.order_id]} times, and not twice"


def _config(changes: Sequence[Operation], facts: Facts) -> Iterator[str]:
    versions = list(facts.versions)
    if versions != list(range(1, len(versions) + 1)):
        yield f"the versions of the configuration have gaps: {versions}"
    for each in changes:
        if each.ended == "ok" and each.came["changed"] and each.came["version"] not in versions:
            yield f"version {each.came['version']} was answered, and is not in the history"
    for name, (version, _) in facts.engines.items():
        if version != (versions or [0])[-1]:
            yield f"engine {name} has version {version} in force, of {(versions or [0])[-1]}"
    if Counter(facts.audited.get("config", ())) != Counter(map(str, versions)):
        yield "the audit does not name every change of the configuration"


def _keys(rotations: Sequence[Operation], facts: Facts) -> Iterator[str]:
    for each in rotations:
        key_id = each.asked["key"]
        yield from _once(f"key {key_id}", facts.keys.count(key_id), each.ended == "ok", each.ended != "fail")
        if key_id in facts.keys and key_id not in facts.audited.get("key", ()):
            yield f"key {key_id} is not in the audit"


def _by_hand(handled: Sequence[Operation], facts: Facts) -> Iterator[str]:
    """Check that the audit has every cancel and retry of a command, and no others."""
    audited = {verb: Counter(facts.audited.get(verb, ())) for verb in ("cancel", "retry")}
    for command in facts.commands:
        times = {verb: audited[verb][command.cmd_id] for verb in audited}
        if times["cancel"] - times["retry"] != (command.status == "cancelled"):
            yield f"command {command.cmd_id} is {command.status}, and the audit has {times} of it"
    for each in handled:
        if each.ended == "ok" and not audited[each.op][each.asked["cmd_id"]]:
            yield f"the {each.op} of command {each.asked['cmd_id']} is not in the audit"


def _steered(steered: Sequence[Operation], facts: Facts) -> Iterator[str]:
    obeyed = Counter(each.asked["type"] for each in steered if each.ended == "ok")
    for type_, times in (obeyed - Counter(facts.audited.get("steer", ()))).items():
        yield f"{times} times {type_} was obeyed, and is not in the audit"
    wanted = list(facts.audited.get("wanted", ()))
    for was, became in itertools.pairwise(wanted):
        if was == became:
            yield f"an engine was wanted {was}, and then {became}"
    for name, (_, state) in facts.engines.items():
        if state != "running" or wanted[-1:] == ["paused"]:
            yield f"engine {name} is {state}, and wanted {wanted[-1:]}"


# --- the link -------------------------------------------------------------------------------------------------------


def _replays(replays: Sequence[Operation]) -> Iterator[str]:
    admitted: set[str] = set()
    for each in replays:
        # A request that was refused because of a wrong clock may be admitted once, after the clock is correct.
        is_first = each.asked.get("was_skewed", False) and each.asked["id"] not in admitted
        if is_first and each.ended == "ok" and each.came["code"] not in REPLAYED:
            admitted.add(each.asked["id"])
            continue
        is_known = each.asked["type"] == PUSH and (each.came.get("duplicate") or not each.asked["was_accepted"])
        is_away = each.asked["type"] == PUSH and each.came.get("code") in DOUBTFUL
        if each.ended == "ok" and each.came["code"] not in REPLAYED and not is_known and not is_away:
            yield f"a {each.asked['type']} that was sent again ({each.asked['where']}) was answered {each.came['code']}"


def _outages(outages: Sequence[Operation], pushes: Sequence[Operation], orders: Sequence[Operation]) -> Iterator[str]:
    """Check that during an outage nothing is acked, and that each refusal of a push says when to try again."""
    for outage in outages:
        for push in pushes:
            if push.since < outage.since or push.until > outage.until:
                continue
            if push.ended == "ok":
                yield f"push {push.asked['key']} was acked while the database was away"
            elif push.ended == "fail" and (push.came["code"] != "db_unavailable" or not push.came["retry_after_ms"]):
                yield f"push {push.asked['key']} was answered {push.came} while the database was away"
        for order in orders:
            if outage.since <= order.since and order.until <= outage.until and order.came.get("status", 503) != 503:
                yield f"order {order.asked['key']} was answered {order.came} while the database was away"
        if outage.came.get("links_lost"):
            yield f"{outage.came['links_lost']} links were lost while the database was away"


def _recoveries(recoveries: Sequence[Operation]) -> Iterator[str]:
    for each in recoveries:
        if each.ended != "ok":
            yield f"after {each.asked['fault']}: {each.came.get('why', 'not whole again')}"


def _left_over(facts: Facts) -> Iterator[str]:
    for key, state in facts.outbox:
        yield f"{key} is in the outbox still, {state}"
    if facts.notes:
        yield f"{facts.notes} batches are noted still"


def _frozen(content: Mapping[str, Any]) -> str:
    return repr(sorted(content.items()))
