"""Table ``s2s_keys``."""

from __future__ import annotations

import base64
import time
from typing import Any

from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import OperatorError, StatementRefused
from s2s.protocol import signing
from s2s.store.pool import Database, blocking
from s2s.store.tables import keys, rotation
from s2s.store.tables.keys import KeyRow
from tests.support.postgres import DatabaseTestCase


class KeyTestCase(DatabaseTestCase):
    """Base class of tests that change keys as operators do."""

    def add(self, *key_ids: str, role: str = "any") -> None:
        """Add keys, each in its own transaction."""
        for key_id in key_ids:
            with blocking(self.url) as txn:
                keys.add(txn, key_id, signing.random_secret(), role)

    def step(self, step: Any, key_id: str) -> rotation.Change:
        """Take one step of a rotation."""
        with blocking(self.url) as txn:
            change: rotation.Change = step(txn, key_id)
        return change

    def refused(self, step: Any, key_id: str) -> str:
        """Assert that a step is refused and that its transaction changes nothing; return the error text."""
        before = self.rows()
        with blocking(self.url) as txn:
            error = self.assertRaises(OperatorError, step, txn, key_id)
        self.assertEqual(self.rows(), before)
        return str(error)

    def rows(self) -> list[Any]:
        """Return the rows of the table."""
        return self.execute("select * from s2s.s2s_keys order by key_id")

    def signers(self) -> dict[Any, str]:
        """Return the signing key of each role."""
        with blocking(self.url) as txn:
            return keys.read(txn).signers()

    def status(self) -> dict[str, str]:
        """Return the status of each key."""
        with blocking(self.url) as txn:
            return {row.key_id: row.status for row in keys.list_public(txn)}


class KeyTests(KeyTestCase):
    """Adding and reading keys."""

    def test_added_keys_are_read(self) -> None:
        """An added key is read back with all fields, times as Unix seconds, and its repr does not show the secret."""
        secret = signing.random_secret()
        with blocking(self.url) as txn:
            keys.add(txn, "k-1", secret, "engine", "for the test")
        self.execute("update s2s.s2s_keys set active_from = to_timestamp(1000.5), active_to = to_timestamp(2000)")
        with blocking(self.url) as txn:
            table = keys.read(txn)
        self.assertEqual(table.rows, [KeyRow("k-1", secret, "engine", 1000.5, 2000.0, True)])
        self.assertNotIn(secret, repr(table))

    def test_the_clock_is_the_databases(self) -> None:
        """The time that is returned with the rows is not earlier than any time that now() has set in them."""
        self.add("a", "b")
        for statement in ("active_from = now()", "active_to = now()", "active_to = clock_timestamp()"):
            with blocking(self.url) as txn:
                txn.execute("select now()")  # this transaction began before theirs
                self.execute(f"update s2s.s2s_keys set {statement}")
                table = keys.read(txn)
            for row in table.rows:
                self.assertLessEqual(row.active_to or row.active_from, table.now)
        self.assertLess(abs(table.now - time.time()), 5)  # both clocks are this machine's

    def test_no_end_in_words(self) -> None:
        """An end of infinity is read as no end, and an end or start of -infinity as a time in the past."""
        self.add("k")
        self.execute("update s2s.s2s_keys set active_to = 'infinity', active_from = '-infinity'")
        with blocking(self.url) as txn:
            table = keys.read(txn)
            self.assertEqual(keys.list_public(txn)[0].status, "signs for both")
            self.assertIsNone(keys.list_public(txn)[0].active_to)
        self.assertIsNone(table.rows[0].active_to)
        self.assertEqual(keys.make_keyring(table.by_clock(5.0))[0].signer("engine", 5.0).key_id, "k")
        self.execute("update s2s.s2s_keys set active_to = '-infinity', is_default_tx = false")
        self.assertEqual(self.status(), {"k": "ended"})
        self.assertFalse(self.step(rotation.revoke, "k").is_changed)
        self.assertIn("it ended at", self.refused(rotation.activate, "k"))

    def test_the_public_list_has_no_secret(self) -> None:
        """The public list of keys does not contain the secret."""
        secret = signing.random_secret()
        with blocking(self.url) as txn:
            keys.add(txn, "k-1", secret, "any", "a note")
            (row,) = keys.list_public(txn)
        self.assertEqual((row.key_id, row.role, row.note), ("k-1", "any", "a note"))
        self.assertNotIn(secret, str(vars(row)))

    def test_a_key_that_is_only_added_does_not_sign(self) -> None:
        """The first key of a role becomes its default, so that a later key does not sign before its activation."""
        with blocking(self.url) as txn:
            for key_id, role in (("a", "any"), ("b", "engine"), ("c", "any"), ("d", "server")):
                keys.add(txn, key_id, signing.random_secret(), role)
            self.assertEqual([row.key_id for row in keys.read(txn).rows if row.is_default_tx], ["a"])

    def test_each_role_has_a_first_key(self) -> None:
        """The first key of each role is the default of that role."""
        with blocking(self.url) as txn:
            for key_id, role in (("a", "server"), ("b", "engine"), ("c", "engine")):
                keys.add(txn, key_id, signing.random_secret(), role)
            self.assertEqual([row.key_id for row in keys.read(txn).rows if row.is_default_tx], ["a", "b"])

    def test_an_added_key_does_not_sign_after_a_revocation_either(self) -> None:
        """After the default is revoked, its successor keeps signing when another key is added."""
        self.add("a", "b")
        self.step(rotation.revoke, "a")
        self.assertEqual(self.execute("select key_id from s2s.s2s_keys where is_default_tx"), [("b",)])
        self.assertEqual(self.signers(), {"engine": "b", "server": "b"})
        self.add("c")
        self.add("d", role="engine")
        self.assertEqual(self.signers(), {"engine": "b", "server": "b"})

    def test_an_added_key_does_not_sign_where_each_role_has_another(self) -> None:
        """Keys that sign without being defaults keep signing for their roles when another key is added."""
        self.add("a", role="any")
        self.add("b", role="server")
        self.execute("update s2s.s2s_keys set is_default_tx = false")
        self.assertEqual(self.signers(), {"engine": "a", "server": "b"})
        self.add("c", role="engine")
        self.assertEqual(self.signers(), {"engine": "a", "server": "b"})

    async def test_first_keys_at_once(self) -> None:
        """Of several first keys that are added at the same time, exactly one is the default."""
        await gatherResults([deferToThread(self.add, f"k{number}") for number in range(4)])
        self.assertEqual(self.execute("select count(*) from s2s.s2s_keys where is_default_tx"), [(1,)])

    def test_a_name_is_taken_once(self) -> None:
        """A second key of the same name is refused with an error that has no secret, and the first key is unchanged."""
        first, second = signing.random_secret(), signing.random_secret()
        with blocking(self.url) as txn:
            keys.add(txn, "k-1", first, "any")
            error = self.assertRaises(OperatorError, keys.add, txn, "k-1", second, "any")
            self.assertEqual([row.key_b64 for row in keys.read(txn).rows], [first])
        self.assertNotIn(second, str(error))

    def test_one_default_for_each_role(self) -> None:
        """A second default of the same role is refused; each role can have one default."""
        add = "insert into s2s.s2s_keys (key_id, key_b64, role, is_default_tx) values (%s, 'x', %s, true)"
        with blocking(self.url) as txn:
            for role in ("engine", "server", "any"):
                txn.execute(add, (f"k-{role}", role))
        with self.assertRaises(StatementRefused) as caught, blocking(self.url) as txn:
            txn.execute(add, ("k-2", "any"))
        self.assertEqual(caught.exception.constraint, "s2s_keys_default_tx")

    async def test_the_first_random_key_is_made_once(self) -> None:
        """Of several processes that make the first key at once, one succeeds; the key is random and of role any."""
        database = Database(self.url, threads=4)
        database.start()
        self.addCleanup(database.stop)
        made = await gatherResults([database.run(keys.add_first_random) for _ in range(4)])
        self.assertEqual(len([key_id for key_id in made if key_id]), 1)
        (row,) = (await database.run(keys.read)).rows
        self.assertEqual(row.role, "any")
        self.assertEqual(len(signing.decode_secret(row.key_b64).reveal()), 32)


class RotationTests(KeyTestCase):
    """The steps of a rotation."""

    def test_a_rotation(self) -> None:
        """An added key verifies, an activated key signs, and a retired key verifies for 60 s more."""
        self.add("a", "b")
        self.assertEqual(self.status(), {"a": "signs for both", "b": "verifies"})
        change = self.step(rotation.activate, "b")
        self.assertEqual((change.is_changed, change.signers), (True, {"engine": "b", "server": "b"}))
        self.assertEqual(self.status(), {"a": "verifies", "b": "signs for both"})
        self.step(rotation.retire, "a")
        self.assertEqual(self.status()["b"], "signs for both")
        self.assertRegex(self.status()["a"], r"^retiring until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC$")
        [(left_s,)] = self.execute(
            "select extract(epoch from active_to - now())::float8 from s2s.s2s_keys where key_id='a'"
        )
        self.assertTrue(50 < left_s <= 60, left_s)

    def test_activate_goes_before_the_defaults_of_one_role(self) -> None:
        """An activated key of role any signs for both roles, and an activated key of one role for that role only."""
        self.add("e", role="engine")
        self.add("s", role="server")
        self.add("a", "b")
        self.assertEqual(self.step(rotation.activate, "a").signers, {"engine": "a", "server": "a"})
        self.assertEqual(self.step(rotation.activate, "e").signers, {"engine": "e", "server": "a"})
        self.assertEqual(self.step(rotation.activate, "b").signers, {"engine": "b", "server": "b"})
        self.assertEqual(self.execute("select key_id from s2s.s2s_keys where is_default_tx"), [("b",)])

    def test_activate_a_key_of_the_future(self) -> None:
        """Activating a key with a future start makes it start now."""
        self.add("a", "b")
        self.execute("update s2s.s2s_keys set active_from = now() + interval '1 day' where key_id = 'b'")
        self.assertEqual(self.status()["b"], "not yet")
        self.assertEqual(self.step(rotation.activate, "b").signers, {"engine": "b", "server": "b"})

    def test_activate_what_cannot_sign(self) -> None:
        """Activating a key that has ended, ends soon, is unusable or does not exist is refused with the reason."""
        self.add("a", "b")
        for active_to, why in (("now()", "it ended at 20"), ("now() + interval '1 hour'", "it ends at 20")):
            self.execute(f"update s2s.s2s_keys set active_to = {active_to} where key_id = 'b'")
            said = self.refused(rotation.activate, "b")
            self.assertIn(why, said)
            self.assertIn("s2s keys add --role any", said)
        self.execute("update s2s.s2s_keys set active_to = null, key_b64 = 'aHVudGVyMg==' where key_id = 'b'")
        self.assertIn("at least 32", self.refused(rotation.activate, "b"))
        self.assertIn("unusable", self.status()["b"])
        for step in (rotation.activate, rotation.retire, rotation.revoke):
            said = self.refused(step, "no\nsuch")
            self.assertIn("'no\\nsuch'", said)
            self.assertIn("s2s keys list", said)

    def test_retire_needs_a_successor(self) -> None:
        """A key that signs, or has no successor, is not retired, and the error names the command to run first."""
        self.add("a")
        said = self.refused(rotation.retire, "a")
        self.assertIn("s2s keys add --role engine", said)
        self.assertIn("s2s keys activate", said)
        self.add("b")
        self.step(rotation.activate, "b")
        # As the newest key it would sign even without being the default.
        self.execute("update s2s.s2s_keys set is_default_tx = false, active_from = now() where key_id = 'b'")
        self.assertIn("s2s keys activate a", self.refused(rotation.retire, "b"))
        self.step(rotation.activate, "a")
        self.assertEqual(self.step(rotation.retire, "b").signers, {"engine": "a", "server": "a"})

    def test_retire_looks_ahead(self) -> None:
        """A key that ends earlier, is unusable or serves only one role is no successor of a key to be retired."""
        self.add("a", "b")
        self.step(rotation.activate, "b")
        for change in (
            "active_to = now() + interval '30 seconds'",
            "active_to = null, role = 'engine'",
            "key_b64 = 'x'",
        ):
            self.execute(f"update s2s.s2s_keys set {change} where key_id = 'b'")
            self.assertIn("no other key would sign for", self.refused(rotation.retire, "a"))

    def test_retire_shortens_only(self) -> None:
        """Retiring a key keeps an end within 60 s, and shortens a later one to 60 s."""
        self.add("a", "b", "c")
        for key_id, end_s in (("b", 10), ("c", 3600)):
            self.execute(
                "update s2s.s2s_keys set active_to = now() + make_interval(secs => %s) where key_id = %s", end_s, key_id
            )
            self.step(rotation.retire, key_id)
        found = self.execute(
            "select extract(epoch from active_to - now())::float8 from s2s.s2s_keys order by active_to"
        )
        self.assertTrue(5 < found[0][0] <= 10 and 50 < found[1][0] <= 60, found)

    def test_revoke(self) -> None:
        """A revoked key has ended once its row is visible, even with a future start or an unusable secret."""
        self.add("a", "b", "c", "d")
        self.execute("update s2s.s2s_keys set active_from = now() + interval '1 day' where key_id = 'c'")
        self.execute("update s2s.s2s_keys set key_b64 = 'x' where key_id = 'd'")
        self.assertEqual(self.step(rotation.revoke, "a").signers, {"engine": "b", "server": "b"})
        for key_id in "cd":
            self.assertIsNone(self.step(rotation.revoke, key_id).warning)
        self.assertEqual(self.status(), {"a": "ended", "b": "signs for both", "c": "ended", "d": "ended"})
        self.assertEqual(self.execute("select key_id from s2s.s2s_keys where is_default_tx"), [("b",)])

    def test_revoke_the_last(self) -> None:
        """The last key that signs can be revoked, with a warning that names the remedy for its roles."""
        self.add("s", role="server")
        self.add("e", role="engine")
        change = self.step(rotation.revoke, "e")
        self.assertEqual(change.signers, {"server": "s"})
        self.assertIn("s2s keys add --role engine", change.warning or "")
        self.assertNotIn("server", change.warning or "")

    def test_steps_twice(self) -> None:
        """A repeated step reports that it was already taken, and changes nothing."""
        self.add("a", "b")
        for step, key_id, word in (
            (rotation.activate, "b", "already"),
            (rotation.retire, "a", "retired already"),
            (rotation.revoke, "a", "ended already"),
        ):
            self.assertTrue(self.step(step, key_id).is_changed)
            before = self.rows()
            again = self.step(step, key_id)
            self.assertEqual((again.is_changed, self.rows()), (False, before))
            self.assertIn(word, again.text)
        self.assertIn("ended already", self.step(rotation.retire, "a").text)

    async def test_operators_at_once(self) -> None:
        """After concurrent steps of several operators, each role has a signing key, and one key is the default."""
        self.add("a", "b", "c")
        for _ in range(5):
            self.execute("update s2s.s2s_keys set active_to = null, is_default_tx = false")
            self.execute("update s2s.s2s_keys set is_default_tx = true where key_id = 'a'")
            work = [(rotation.activate, "b"), (rotation.activate, "c"), (rotation.retire, "a"), (rotation.retire, "b")]
            await gatherResults([deferToThread(self.attempt, *each) for each in work])
            with blocking(self.url) as txn:
                table = keys.read(txn)
            self.assertEqual(set(table.signers()), {"engine", "server"})
            self.assertEqual(set(table.signers(table.now + 120)), {"engine", "server"})
            self.assertEqual(len([row for row in table.rows if row.is_default_tx]), 1)

    def attempt(self, step: Any, key_id: str) -> None:
        """Take a step, or expect a one-line refusal; runs in a thread."""
        try:
            self.step(step, key_id)
        except OperatorError as error:
            assert "\n" not in str(error)


class MakeKeyringTests(SynchronousTestCase):
    """:func:`s2s.store.tables.keys.make_keyring`."""

    def test_rows(self) -> None:
        """A valid row becomes a key with every column, and an invalid row is left out with its reason."""
        key_b64 = base64.b64encode(b"never-shown-never-shown-never-shown").decode()
        rows = [KeyRow("k1", key_b64, "engine", 5.0, 9.0, True), KeyRow("k2", "short", "any", 0.0, None, False)]
        keyring, complaints = keys.make_keyring(rows)
        key = keyring.signer("engine", 6.0)
        self.assertEqual((key.key_id, key.active_from, key.active_to, key.is_default_tx), ("k1", 5.0, 9.0, True))
        self.assertEqual((len(keyring), list(complaints)), (1, ["k2"]))
        self.assertNotIn(key_b64, repr(rows))
