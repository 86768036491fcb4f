"""Tokens: their format, their table, and ``s2s tokens``."""

from __future__ import annotations

import resource
import stat
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import OperatorError
from s2s.store.access import ACCESS, allows, digest, is_of, make, name_of
from s2s.store.pool import blocking
from s2s.store.tables import tokens
from tests.cli.test_cli import CliTestCase


class TokenTests(SynchronousTestCase):
    """:mod:`s2s.store.access`."""

    def test_a_name_and_a_secret(self) -> None:
        """A token contains its name, is new each time, and has only characters that a header may hold."""
        first, second = make("a.b-c_9"), make("a.b-c_9")
        self.assertNotEqual(first, second)
        self.assertRegex(first, r"^s2s_a\.b-c_9~[A-Za-z0-9_-]{43}$")
        self.assertEqual(name_of(first), "a.b-c_9")

    def test_no_token(self) -> None:
        """A text that is not a token has no name."""
        token = make("a")
        for text in ("", "a", token + "x", token[:-1], token.replace("~", "!"), "S" + token[1:], token + "\n"):
            self.assertIsNone(name_of(text), text)

    def test_comparison(self) -> None:
        """A token matches its own hash only, and matches nothing if no hash is stored."""
        token = make("a")
        self.assertTrue(is_of(token, digest(token)))
        self.assertFalse(is_of(make("a"), digest(token)))
        self.assertFalse(is_of(token, None))
        self.assertFalse(is_of("\u00e9", digest(token)))

    def test_access(self) -> None:
        """Each role includes the access of the roles before it."""
        allowed = [[allows(has, wants) for wants in ACCESS] for has in ACCESS]
        self.assertEqual(allowed, [[True, False, False], [True, True, False], [True, True, True]])


class TableTests(CliTestCase):
    """:mod:`s2s.store.tables.tokens` and the command line on top of it."""

    def test_only_a_hash_is_kept(self) -> None:
        """Neither the database nor any later output contains the token."""
        token = self.s2s("tokens", "add", "alice", "--role", "operator", "--note", "on call").stdout.strip()
        self.assertEqual(name_of(token), "alice")
        [row] = self.execute("select api_tokens::text from s2s.api_tokens")
        audit = self.execute("select audit::text from s2s.audit")
        shown = self.s2s("tokens", "list").output + self.s2s("tokens", "list", "--json").output
        secret = token.partition("~")[2]
        for text in (str(row), str(audit), shown):
            self.assertNotIn(secret, text)
        with blocking(self.url) as txn:
            [kept] = tokens.read(txn)
        self.assertTrue(is_of(token, kept.token_sha256))
        self.assertNotIn(str(kept.token_sha256), repr(kept))
        [told] = self.json("tokens", "list")
        self.assertEqual(
            (told["name"], told["role"], told["note"], told["is_expired"]), ("alice", "operator", "on call", False)
        )

    def test_without_a_name(self) -> None:
        """A token added without a name gets one, which stderr shows; the JSON has both name and token."""
        result = self.s2s("tokens", "add", "--role", "observer")
        name = name_of(result.stdout.strip())
        self.assertEqual(result.stderr, f"the token {name} is shown this once:\n")
        told = self.json("tokens", "add", "--role", "observer")
        self.assertEqual((name_of(told["token"]), told["role"]), (told["name"], "observer"))
        self.assertEqual({row["name"] for row in self.json("tokens", "list")}, {name, told["name"]})

    def test_audit(self) -> None:
        """Adding, changing by hand and revoking a token are audited with the actor and without the hash."""
        self.s2s("tokens", "add", "alice", "--role", "admin")
        self.execute("update s2s.api_tokens set role = 'observer'")
        self.s2s("tokens", "revoke", "alice")
        told = self.execute("select actor, action, subject, params from s2s.audit order by audit_id")
        self.assertEqual([row[1] for row in told], ["tokens.add", "tokens.change", "tokens.revoke"])
        self.assertEqual([row[3]["role"] for row in told], ["admin", "observer", "observer"])
        self.assertEqual({row[2] for row in told}, {"alice"})
        self.assertEqual({tuple(row[3]) for row in told}, {("note", "role", "expires_at")})
        self.assertRegex(told[0][0], "^cli:.")
        self.assertNotIn("cli:", told[1][0])

    def test_a_file(self) -> None:
        """The token is written to a new file that only its owner can read, and is then not printed."""
        path = Path(self.mktemp())
        said = self.s2s("tokens", "add", "alice", "--role", "admin", "--to", str(path)).output
        self.assertEqual(said, f"the token alice is in {path}\n")
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
        self.assertEqual(name_of(path.read_text().strip()), "alice")
        refused = self.s2s("tokens", "add", "bob", "--role", "admin", "--to", str(path), expected=1).output
        self.assertIn("cannot be written, File exists: name another one", refused)
        self.assertEqual([row["name"] for row in self.json("tokens", "list")], ["alice"])

    def test_a_file_of_no_token(self) -> None:
        """If the token cannot be written or stored, no file remains that would block the next attempt."""
        path = Path(self.mktemp())
        add = ("tokens", "add", "alice", "--role", "admin", "--to", str(path))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            said = self.s2s(*add, expected=1).output
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        self.assertIn("cannot be written, File too large: name another one", said)
        self.assertFalse(path.exists())
        self.execute(
            "create function refuse() returns trigger language plpgsql set search_path from current as 'begin"
            " raise exception $$no$$; end'"
        )
        self.execute(
            "create constraint trigger refused after insert on s2s.api_tokens initially deferred"
            " for each row execute function refuse()"
        )
        self.s2s(*add, expected=1)
        self.assertFalse(path.exists())
        self.execute("drop trigger refused on s2s.api_tokens")
        self.s2s(*add)

    def test_expiry(self) -> None:
        """An expired token is listed as expired, and is not valid any more."""
        self.s2s("tokens", "add", "alice", "--role", "observer", "--days", "2")
        with blocking(self.url) as txn:
            [row] = tokens.read(txn)
        self.assertTrue(row.left_s is not None and 2 * 86400 - 60 < row.left_s <= 2 * 86400)
        self.execute("update s2s.api_tokens set expires_at = now() - interval '1 second'")
        with blocking(self.url) as txn:
            self.assertEqual(tokens.read(txn), [])
        self.assertTrue(self.json("tokens", "list")[0]["is_expired"])

    def test_mistakes(self) -> None:
        """An invalid, taken or unknown name is reported in one line with the fix."""
        self.s2s("tokens", "add", "alice", "--role", "observer")
        for argv, cure in (
            (("add", "alice", "--role", "admin"), "s2s tokens revoke alice"),
            (("add", "a b", "--role", "admin"), "take 1 to 64 of"),
            (("revoke", "bob"), "s2s tokens list"),
        ):
            result = self.s2s("tokens", *argv, expected=1)
            self.assertIn(cure, result.stderr)
            self.assertEqual(result.output.count("\n"), 1)
        self.s2s("tokens", "add", "bob", "--role", "king", expected=2)
        self.assertEqual(self.json("tokens", "revoke", "alice"), {"name": "alice", "revoked": True})
        self.assertIn("s2s tokens add", self.s2s("tokens", "list").output)
        with blocking(self.url) as txn:
            tokens.add(txn, "carol", "admin")
            self.assertRaises(OperatorError, tokens.add, txn, "carol", "admin")
