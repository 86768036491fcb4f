"""Before anything runs: which database, and whether it can serve. All of it blocks, and none of it stays connected."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from s2s.errors import DatabaseError, DatabaseUnavailable, NoSigningKey, OperatorError
from s2s.handlers.discovery import Found
from s2s.protocol.signing import Role
from s2s.runtime import streams
from s2s.runtime.status_log import status_log
from s2s.store import connection_limits, migrations, privileges, sequences, shape, sqlstate
from s2s.store.driver import Cursor
from s2s.store.embedded import lease
from s2s.store.migrations import Migrations
from s2s.store.pool import blocking
from s2s.store.tables import clock_drift, config, keys, own_keys
from s2s.store.tables.config import Snapshot
from s2s.store.tables.keys import KeyRow, make_keyring
from s2s.store.url import locate

DATABASE_VARIABLE = "S2S_DATABASE_URL"
STATE_DIR = "var"

T = TypeVar("T")

#: Seconds for which a start waits until the database lets it in: a PostgreSQL that starts, or has all its connections
#: taken, says so itself.
PASSES_S: Final = 60.0
#: Seconds of silent waiting if no server answers: a wrong URL is reported soon, but 5 starts take over 10 s, so that
#: systemd does not give up.
NOBODY_S: Final = 5.0
#: Seconds that one look may take: more than the timeout of a statement, which says more.
LOOK_S: Final = 90.0
_AGAIN_S: Final = 0.5
#: The SQLSTATE of each is kept by libpq.
_COMES: Final = "the database system is "


@dataclass(frozen=True)
class Place:
    """Where the tables are.

    :param url: a URL, which may hold a password, or ``@FILE``.
    :param leave: gives an embedded PostgreSQL back; the last one out stops it.
    :param trim_log: keeps the log of an embedded PostgreSQL within its bound; it may block for a moment.
    """

    url: str = field(repr=False)
    leave: Callable[[], object] = lambda: None
    trim_log: Callable[[], object] = lambda: None
    is_embedded: bool = False


def find_database(given: str | None, state_dir: Path) -> Place:
    """Find the database: the one named, else the environment's, else the embedded one under ``state_dir``.

    :param given: a URL, or ``@FILE`` for a file that holds one: every user of the machine can read argv.
    :raises OperatorError: the file or the variable cannot be read, or the embedded PostgreSQL does not start.
    """
    url, source = (os.environ.get(DATABASE_VARIABLE), DATABASE_VARIABLE) if given is None else (given, "--database")
    if url is None:
        held = lease.join(state_dir)
        return Place(held.url, held.leave, held.trim_log, is_embedded=True)
    return Place(locate(url, source))


def make_ready(url: str, plugins: Found) -> list[str]:
    """Migrate, and make the first key; for the embedded database only, which no operator prepares.

    :returns: the actions that were taken, one sentence each.
    """
    with blocking(url) as txn:
        ran = migrations.migrate(txn.connection, list(plugins.migrations.values()), plugins.settings.values())
        done = [f"migrated the database: {name}" for name in ran]
        key_id = keys.add_first_random(txn)
    return done if key_id is None else [*done, f"made a random key: {key_id}"]


def unusable(error: DatabaseError) -> str:
    """Return the line for an operator whose database cannot be used."""
    return f"the database cannot be used: {sqlstate.with_cure(error, f'see --database and {DATABASE_VARIABLE}')}"


@dataclass(frozen=True)
class Ready:
    """What a role needs of the database before it starts.

    :param rows: the keys, their windows told by our clock.
    """

    rows: Sequence[KeyRow]
    snapshot: Snapshot


def check(url: str, role: Role, plugins: Found, sessions: int = 1) -> Ready:
    """See that the schema is ours, that new rows get new ids and that a key may sign, by the clock that dated the keys.

    :param plugins: the installed plug-ins, whose tables are checked too.
    :param sessions: of the database, which the role has when all of its work is under way.
    :raises OperatorError: one line that names the cure.
    """
    return when_ready(lambda: _check(url, role, list(plugins.migrations.values()), sessions))


def when_ready(look: Callable[[], T]) -> T:
    """Check the database, and try again while the obstacle is a passing one. A line on stderr names it.

    :raises OperatorError: it does not pass; one line that names the cure.
    """
    began_at, patience_s, told = time.monotonic(), 0.0, ""
    while True:
        try:
            return look()
        except DatabaseError as error:
            why = unusable(error)
            passes_s = _patience_s(error)
            # A database that stops is not there for a while, and then it starts.
            patience_s = max(patience_s, passes_s)
            if not passes_s or time.monotonic() >= began_at + patience_s:
                raise OperatorError(why) from None
        if patience_s > NOBODY_S and why != told:
            told = why
            streams.say(f"{why}; trying again for up to {patience_s:g} s")
        time.sleep(_AGAIN_S)


def _patience_s(error: DatabaseError) -> float:
    """Return the seconds for which an error may pass by itself."""
    if not isinstance(error, DatabaseUnavailable):
        return 0.0
    if error.state.startswith(("08", "53300", "57P")) or _COMES in str(error):
        return PASSES_S
    return 0.0 if error.state else NOBODY_S


def _check(url: str, role: Role, plugins: Sequence[Migrations], sessions: int) -> Ready:
    with blocking(url, within_s=LOOK_S) as txn:
        # First: without a privilege the schema seems to be another.
        privileges.check(txn, plugins)
        migrations.check(txn, plugins)
        connection_limits.check(txn, sessions)
        # First: the look at a sequence reads the largest id, which needs the index.
        shape.check(txn)
        sequences.check(txn)
        if line := own_keys.copied(txn):
            # s2s up shows it, too.
            status_log.warn("{line}", line=line)
        snapshot = config.read(txn)
        try:
            rows = _keys(txn, role)
        except NoSigningKey:
            # A clock that was ahead may have dated them. A role that runs pulls such dates back, too.
            txn.execute(clock_drift.KEYS)
            rows = _keys(txn, role)
    return Ready(rows, snapshot)


def _keys(txn: Cursor, role: Role) -> list[KeyRow]:
    """Read the keys, their windows told by our clock.

    :raises NoSigningKey: none of them may sign for the role now.
    """
    table = keys.read(txn)
    now = time.time()
    rows = table.by_clock(now)
    make_keyring(rows)[0].signer(role, now)
    return rows


def prepare(
    given: str | None, state_dir: Path, role: Role, plugins: Found, sessions: int = 1
) -> tuple[Place, Ready, list[str]]:
    """Find the database, make it ready if it is the embedded one, and check it.

    :param plugins: see :func:`check`, also for ``sessions``.
    :returns: the place, the rows found there, and the actions that were taken, one sentence each.
    :raises OperatorError: one line that names the cure.
    """
    place = find_database(given, state_dir)
    try:
        done = []
        if place.is_embedded:
            done = [
                f"no database is named: using the embedded PostgreSQL under {state_dir}",
                *make_ready(place.url, plugins),
            ]
        return place, check(place.url, role, plugins, sessions), done
    except BaseException:
        place.leave()
        raise
