"""What is checked before a role runs."""

from __future__ import annotations

from s2s.errors import NoSigningKey, OperatorError, SchemaError
from s2s.protocol.signing import random_secret
from s2s.roles import preflight
from tests.support.postgres import DatabaseTestCase


class CheckTests(DatabaseTestCase):
    """:func:`s2s.roles.preflight.check`."""

    def add(self, key_id: str, role: str, key_b64: str | None = None, when: str = "now()") -> None:
        """Insert a key in plain SQL."""
        self.execute(
            f"insert into s2s.s2s_keys (key_id, key_b64, role, active_from) values (%s, %s, %s, {when})",
            key_id,
            key_b64 or random_secret(),
            role,
        )

    def test_no_key_names_the_cure(self) -> None:
        """Without a key for the role the refusal names the command that makes one."""
        self.add("s", "server")
        refused = self.assertRaises(NoSigningKey, preflight.check, self.url, "engine")
        self.assertIn("s2s keys add --role engine", str(refused))

    def test_a_key_just_made_can_sign(self) -> None:
        """A key is judged by the clock that dated it: the database's."""
        self.add("k", "any")
        self.assertEqual([row.key_id for row in preflight.check(self.url, "engine").rows], ["k"])

    def test_unusable_keys_do_not_count(self) -> None:
        """A key that is too short, not base64, or of the future cannot sign."""
        self.add("short", "any", "c2hvcnQ=")
        self.add("garbled", "any", "?" * 44)
        self.add("later", "any", when="now() + interval '1 hour'")
        self.assertRaises(NoSigningKey, preflight.check, self.url, "server")

    def test_a_key_that_a_wrong_clock_has_dated(self) -> None:
        """A key that was made while the clock of the database was ahead signs at once, and stays so in the table."""
        self.add("k", "any")
        self.execute("update s2s.s2s_keys set created_at = now() + '2 hours', active_from = now() + '2 hours'")
        self.assertEqual([row.key_id for row in preflight.check(self.url, "engine").rows], ["k"])
        self.assertEqual(self.execute("select 1 from s2s.s2s_keys where greatest(created_at, active_from) > now()"), [])

    def test_no_tables(self) -> None:
        """A database without tables is refused with the command that makes them."""
        self.execute("drop schema s2s, s2s_world cascade")
        refused = self.assertRaises(SchemaError, preflight.check, self.url, "server")
        self.assertIn("s2s db migrate", str(refused))

    def test_no_database(self) -> None:
        """A database that cannot be reached is one line without the password."""
        url = "postgresql://u:hunter2@127.0.0.1:1/none"
        refused = self.assertRaises(OperatorError, preflight.check, url, "server")
        self.assertNotIn("hunter2", str(refused))
        self.assertNotIn("\n", str(refused))

    def test_make_ready_twice(self) -> None:
        """The embedded database gets one key, however often it is made ready."""
        self.assertEqual(preflight.make_ready(self.url), ["made a random key: k1"])
        self.assertEqual(preflight.make_ready(self.url), [])
        self.assertNotIn(self.url, repr(preflight.Place(self.url)))
