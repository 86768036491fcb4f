"""A database that s2s shares with a game: tables of the same names, and a misleading search_path."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from psycopg2.extensions import parse_dsn
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread

from tests.support.peer import K1
from tests.support.roles import RoleTestCase, environment
from tests.support.waiting import PATIENCE_S, poll

_NAMES = (
    "orders",
    "config",
    "audit",
    "commands",
    "outbox",
    "notices",
    "jobs",
    "engines",
    "s2s_keys",
    "ships",
    "sectors",
)
#: Objects that replace those used by statements of s2s, wherever a statement uses a name without its schema.
_HOSTILE = """
create schema hostile;
create function hostile.now() returns timestamptz language sql as $$ select timestamptz '1970-01-01' $$;
create function hostile.clock_timestamp() returns timestamptz language sql as $$ select timestamptz '1970-01-01' $$;
create function hostile.pg_notify(text, text) returns void language sql as $$ select $$;
create function hostile.unnest(text[]) returns setof text language sql as $$ select 'nothing'::text $$;
create function hostile.unnest(bigint[]) returns setof bigint language sql as $$ select 0::bigint $$;
create function hostile.to_regclass(text) returns regclass language sql as $$ select null::regclass $$;
create function hostile.length(text) returns integer language sql as $$ select 0 $$;
create function hostile.never(text, text) returns boolean language sql as $$ select false $$;
create operator hostile.= (function = hostile.never, leftarg = text, rightarg = text);
create operator hostile.<> (function = hostile.never, leftarg = text, rightarg = text);
create domain hostile.jsonb as text check (value is null);
"""


class SharedDatabaseTests(RoleTestCase):
    """Both roles on such a database, from the first migration on."""

    def setUp(self) -> None:
        """Create the game's tables in an empty database, set the search_path of its sessions, and migrate."""
        super().setUp()
        self.execute("drop schema s2s, s2s_world cascade")
        for name in _NAMES:
            self.execute(f"create table public.{name} (note text); insert into public.{name} values ('mine')")
        self.execute(_HOSTILE)
        database = parse_dsn(self.url)["dbname"]
        self.execute(f"alter database {database} set search_path = hostile, public, pg_catalog")
        self.assertIn("migrated: s2s/0001_initial", self.s2s("db", "migrate"))
        self.add_key(K1, is_default=True)

    def s2s(self, *argv: str) -> str:
        """Run a command, and return its output."""
        program = str(Path(sys.executable).with_name("s2s"))
        done = subprocess.run(
            [program, *argv, "--database", self.url],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout

    @inlineCallbacks
    def test_all_of_it_works(self) -> Iterator[Deferred[Any]]:
        """A broadcast, a job and an order are processed, and the game's tables do not change."""
        self.s2s("world", "seed", "--sectors", "20", "--ships", "20")
        server = self.server()
        yield server.start()
        yield self.engine(server.port).start()
        yield deferToThread(self.s2s, "broadcast", "hello")
        yield poll(lambda: self.count("s2s.notices where message = 'hello'") == 1, "the broadcast is a notice")
        order = ("order", "force-tick", "port_refresh", "--json")
        said = yield deferToThread(self.s2s, *order)
        self.assertEqual(json.loads(said)["status"], "done")
        yield poll(lambda: self.count("s2s.jobs where runs > 0") > 0, "a job has run")
        entries = yield deferToThread(self.s2s, "audit", "--json")
        actions = {entry["action"] for entry in json.loads(entries)}
        self.assertLessEqual({"keys.add", "admin.engine.force_tick.v1", "broadcasts.add"}, actions)
        self.assertEqual(self.s2s("db", "status", "--json").count("0001_initial"), 2)
        for name in _NAMES:
            self.assertEqual(self.execute(f"select note from public.{name}"), [("mine",)])
        server.assert_calm()
