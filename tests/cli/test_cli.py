"""The command line, in this process and against a real database."""

from __future__ import annotations

import base64
import getpass
import json
import os
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from twisted.trial.unittest import SynchronousTestCase

from s2s.cli import main
from s2s.cli.common import actor
from s2s.protocol.signing import decode_secret
from s2s.runtime import files
from tests.support.postgres import DatabaseTestCase


class CliTestCase(DatabaseTestCase):
    """Runs ``s2s`` on the test's database."""

    def s2s(self, *argv: str, expected: int = 0, env: dict[str, str | None] | None = None) -> Result:
        """Run one command line and assert its exit code."""
        clean: dict[str, str | None] = {"S2S_DATABASE_URL": self.url, "COLUMNS": "200", **(env or {})}
        result = CliRunner(env=clean).invoke(main, list(argv))
        self.assertEqual(result.exit_code, expected, result.output)
        if expected:
            self.assertNotIn("Traceback", result.output)
        return result

    def json(self, *argv: str) -> Any:
        """Run one command line with ``--json`` and parse its output."""
        return json.loads(self.s2s(*argv, "--json").output)

    def file(self, content: bytes) -> str:
        """Create a file."""
        path = Path(self.mktemp())
        path.write_bytes(content)
        return str(path)


class KeysTests(CliTestCase):
    """``s2s keys``."""

    def test_add_makes_a_random_key_and_hides_it(self) -> None:
        """A random key has 32 bytes in the table, and no output shows it."""
        said = self.s2s("keys", "add", "--key-id", "k9", "--role", "engine").output
        [(role, key_b64)] = self.execute("select role, key_b64 from s2s.s2s_keys where key_id = 'k9'")
        self.assertEqual(role, "engine")
        self.assertEqual(len(decode_secret(key_b64).reveal()), 32)
        self.assertNotIn(key_b64, said + self.s2s("keys", "list").output + self.s2s("keys", "list", "--json").output)

    def test_show_secret(self) -> None:
        """``--show-secret`` prints the secret that is in the table."""
        told = self.json("keys", "add", "--key-id", "k9", "--role", "any", "--show-secret")
        [(key_b64,)] = self.execute("select key_b64 from s2s.s2s_keys where key_id = 'k9'")
        self.assertEqual(told, {"key_id": "k9", "role": "any", "key_b64": key_b64})

    def test_secret_file(self) -> None:
        """A secret can be read from a base64 file that ends with a line break."""
        secret = base64.b64encode(b"s" * 40)
        self.s2s("keys", "add", "--key-id", "k9", "--role", "server", "--secret-file", self.file(secret + b"\n"))
        self.assertEqual(self.execute("select key_b64 from s2s.s2s_keys where key_id='k9'"), [(secret.decode(),)])

    def test_secret_file_of_windows(self) -> None:
        """A secret file that an editor on Windows has written, or that openssl has broken into lines, is read."""
        secret = base64.b64encode(b"s" * 64).decode()
        for content in (
            f"\ufeff{secret}\r\n".encode(),
            secret.encode("utf-16"),
            f"{secret[:64]}\n{secret[64:]}".encode(),
        ):
            self.s2s("keys", "add", "--key-id", "k9", "--role", "server", "--secret-file", self.file(content))
            self.assertEqual(self.execute("delete from s2s.s2s_keys returning key_b64"), [(secret,)])

    def test_bad_secrets(self) -> None:
        """A short, malformed or missing secret is refused in one line without any part of it."""
        short = base64.b64encode(b"abcdefgh12345678")
        padded = base64.b64encode(b"s" * 40)
        for content, why in (
            (short, "at least 32"),
            (b"*not base64*", "not base64"),
            (b"\xff", "not UTF-8 text"),
            (padded + b"\n" + padded, "not base64 (its 2 lines count as one secret)"),
        ):
            result = self.s2s(
                "keys", "add", "--key-id", "k9", "--role", "any", "--secret-file", self.file(content), expected=1
            )
            self.assertIn(why, result.output)
            self.assertNotIn(short.decode(), result.output)
            self.assertEqual(result.output.count("\n"), 1)
        self.patch(files, "SILENT_S", 0.1)
        pipe = self.mktemp()
        os.mkfifo(pipe)
        for path, why in (("no-such", "No such file"), (pipe, "nothing came through it")):
            result = self.s2s("keys", "add", "--key-id", "k9", "--role", "any", "--secret-file", path, expected=1)
            self.assertIn(f"cannot be read: {path}: {why}", result.output)
        self.assertEqual(self.execute("select count(*) from s2s.s2s_keys"), [(0,)])

    def test_a_name_twice_or_malformed(self) -> None:
        """A key id that exists or is malformed is refused in one line."""
        self.s2s("keys", "add", "--key-id", "k9", "--role", "any")
        self.assertIn("already", self.s2s("keys", "add", "--key-id", "k9", "--role", "any", expected=1).output)
        self.assertIn("cannot be used", self.s2s("keys", "add", "--key-id", "a b", "--role", "any", expected=1).output)

    def test_a_rotation(self) -> None:
        """Add, activate, retire and list report the state of each key, and never a secret."""
        said = [self.s2s("keys", "add", "--key-id", key_id, "--role", "any").output for key_id in ("k1", "k2")]
        said += [self.s2s("keys", *step).output for step in (("activate", "k2"), ("retire", "k1"), ("list",))]
        self.assertIn("k2 signs for engine and server from now on", said[2])
        self.assertIn("k1 signs no more, and verifies until 20", said[3])
        status = {row["key_id"]: row["status"] for row in self.json("keys", "list")}
        self.assertEqual(status["k2"], "signs for both")
        self.assertIn("retiring until", status["k1"])
        self.assertIn("signs for both", said[4])
        self.assertIn("already", self.s2s("keys", "retire", "k1").output)
        told = self.json("keys", "activate", "k2")
        self.assertEqual((told["is_changed"], told["signers"]), (False, {"engine": "k2", "server": "k2"}))
        for (key_b64,) in self.execute("select key_b64 from s2s.s2s_keys"):
            self.assertNotIn(key_b64, "".join(said) + str(told))

    def test_revoke_warns(self) -> None:
        """Revoking the last key prints one warning with the cure on stderr; stdout stays valid JSON."""
        self.s2s("keys", "add", "--key-id", "k1", "--role", "any")
        result = self.s2s("keys", "revoke", "k1", "--json")
        self.assertTrue(json.loads(result.stdout)["is_changed"])
        self.assertRegex(result.stderr, r"^warning: no key can sign for engine and server any more: .*--role any.*\n$")
        self.assertEqual(self.json("keys", "list")[0]["status"], "ended")

    def test_steps_that_are_refused(self) -> None:
        """An impossible step is refused in one line with the command to use instead."""
        self.s2s("keys", "add", "--key-id", "k1", "--role", "any")
        for argv, cure in (
            (("retire", "k1"), "s2s keys add --role"),
            (("activate", "k9"), "s2s keys list"),
            (("revoke", "k9"), "s2s keys list"),
        ):
            result = self.s2s("keys", *argv, expected=1)
            self.assertIn(cure, result.output)
            self.assertEqual(result.output.count("\n"), 1)


class BroadcastTests(CliTestCase):
    """``s2s broadcast``."""

    def test_scopes(self) -> None:
        """Each scope is stored with its id."""
        self.s2s("broadcast", "to all")
        told = self.json(
            "broadcast", "to one", "--scope", "player", "--player-id", "7", "--severity", "warn", "--ttl", "60"
        )
        self.assertEqual(told, {"broadcast_id": 2})
        self.assertEqual(
            self.execute("select scope, player_id, message, severity, ttl_s, state from s2s.broadcasts order by 1"),
            [
                ("global", None, "to all", "info", None, "pending"),
                ("player", 7, "to one", "warn", 60, "pending"),
            ],
        )

    def test_refusals(self) -> None:
        """A broadcast that notice.publish would refuse is refused on the command line, and not stored."""
        for argv, why in (
            (("",), "message"),
            (("x" * 4001,), "message"),
            (("x", "--scope", "sector"), "sector_id"),
            (("x", "--corp-id", "3"), "corp_id"),
            (("x", "--scope", "player", "--player-id", "0"), "player_id"),
            (("x", "--ttl", "0"), "ttl_s"),
        ):
            self.assertIn(why, self.s2s("broadcast", *argv, expected=1).output)
        self.assertEqual(self.execute("select count(*) from s2s.broadcasts"), [(0,)])


class ListTests(CliTestCase):
    """``s2s commands list`` and ``s2s notices list``."""

    def test_nothing_yet(self) -> None:
        """An empty table is reported as empty, and is an empty list in JSON."""
        for group in ("commands", "notices", "keys"):
            self.assertIn("there are no", self.s2s(group, "list").output)
            self.assertEqual(self.json(group, "list"), [])

    def test_rows(self) -> None:
        """Rows are listed newest first, with limit and filter, and without control characters for the terminal."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, status) values"
            " ('notice.publish', 'one', '{}', 'done'), ('notice.publish', 'two', '{}', 'ready')"
        )
        self.execute(
            "insert into s2s.notices (cmd_id, scope, message, severity) values (1, 'global', %s, 'info')",
            "\x1b[31m[bold]red",
        )
        self.assertEqual([row["idem_key"] for row in self.json("commands", "list")], ["two", "one"])
        self.assertEqual([row["idem_key"] for row in self.json("commands", "list", "--limit", "1")], ["two"])
        self.assertEqual([row["idem_key"] for row in self.json("commands", "list", "--status", "done")], ["one"])
        shown = self.s2s("notices", "list").output
        self.assertNotIn("\x1b[31m", shown)
        self.assertIn("[bold]red", shown)
        self.assertEqual(self.json("notices", "list")[0]["message"], "\x1b[31m[bold]red")


class DbTests(CliTestCase):
    """``s2s db``, and the choice of the database."""

    def test_migrate_and_status(self) -> None:
        """A database without tables is reported with the cure, is migrated once, and is up to date then."""
        self.execute("drop schema s2s, s2s_world cascade")
        self.assertIn("s2s db migrate", self.s2s("notices", "list", expected=1).output)
        self.s2s("db", "status", expected=1)
        self.assertIn("migrated: s2s/0001", self.s2s("db", "migrate").output)
        self.assertIn("up to date", self.s2s("db", "migrate").output)
        self.assertTrue(all(row["applied_at"] for row in self.json("db", "status")))

    def test_the_option_goes_before_the_environment(self) -> None:
        """``--database`` takes precedence over the environment, and may name a file."""
        elsewhere = {"S2S_DATABASE_URL": "postgresql://nobody:hunter2@127.0.0.1:1/none"}
        self.s2s("notices", "list", "--database", self.url, env=elsewhere)
        self.s2s("notices", "list", "--database", "@" + self.file(self.url.encode() + b"\n"), env=elsewhere)
        refused = self.s2s("notices", "list", env=elsewhere, expected=1)
        self.assertNotIn("hunter2", refused.output)
        self.assertEqual(refused.output.count("\n"), 1)

    def test_a_missing_file(self) -> None:
        """A missing file is reported in one line."""
        result = self.s2s("notices", "list", "--database", "@no-such-file", expected=1)
        self.assertIn("no-such-file", result.output)

    def test_help_names_every_command(self) -> None:
        """The help lists every command, and every command has its own help."""
        for name in ("up", "broadcast", "notices", "commands", "keys", "db"):
            self.assertIn(name, self.s2s("--help").output)
            self.assertIn("Usage", self.s2s(name, "--help").output)


class ActorTests(SynchronousTestCase):
    """:func:`s2s.cli.common.actor`."""

    def test_another_encoding(self) -> None:
        """A user name that is not UTF-8 is escaped, so that the database accepts it."""
        self.patch(getpass, "getuser", lambda: "j\udcf6rg")
        self.assertEqual(actor(), "cli:j\\udcf6rg")


class StateDirTests(CliTestCase):
    """The embedded PostgreSQL, when no database is named."""

    def test_it_is_found_in_the_state_directory(self) -> None:
        """Without a URL the command starts the PostgreSQL of the state directory, uses it and stops it."""
        state_dir = os.path.abspath(self.mktemp())
        env: dict[str, str | None] = {"S2S_DATABASE_URL": None}
        self.s2s("db", "migrate", "--state-dir", state_dir, env=env)
        self.s2s("broadcast", "kept", "--state-dir", state_dir, env=env)
        again = self.s2s("broadcast", "kept too", "--state-dir", state_dir, "--json", env=env)
        self.assertEqual(json.loads(again.output), {"broadcast_id": 2})
        self.assertFalse(Path(state_dir, "postgres", "postmaster.pid").exists())
