"""Table ``s2s_keys``."""

from __future__ import annotations

from twisted.internet.defer import gatherResults

from s2s import signing
from s2s.errors import OperatorError, StatementRefused
from s2s.store import keys
from s2s.store.pool import Database, blocking
from tests.support.postgres import DatabaseTestCase


class KeyTests(DatabaseTestCase):
    """Adding and reading keys."""

    def test_added_keys_are_read(self) -> None:
        """A key that was added is read back whole, times as Unix seconds, and its repr shows no secret."""
        secret = signing.random_secret()
        with blocking(self.url) as txn:
            keys.add(txn, "k-1", secret, "engine", "for the test")
        self.execute("update s2s_keys set active_from = to_timestamp(1000.5), active_to = to_timestamp(2000)")
        with blocking(self.url) as txn:
            self.assertEqual(keys.read(txn), [keys.KeyRow("k-1", secret, "engine", 1000.5, 2000.0, True)])
            self.assertNotIn(secret, repr(keys.read(txn)))

    def test_the_public_list_has_no_secret(self) -> None:
        """What is listed for people does not hold the secret anywhere."""
        secret = signing.random_secret()
        with blocking(self.url) as txn:
            keys.add(txn, "k-1", secret, "any", "a note")
            (row,) = keys.list_public(txn)
        self.assertEqual((row.key_id, row.role, row.note), ("k-1", "any", "a note"))
        self.assertNotIn(secret, str(vars(row)))

    def test_a_key_that_is_only_added_does_not_sign(self) -> None:
        """The first key of a role is its default, so that one added later does not sign before it is told to."""
        with blocking(self.url) as txn:
            for key_id, role in (("a", "any"), ("b", "engine"), ("c", "any"), ("d", "server")):
                keys.add(txn, key_id, signing.random_secret(), role)
            self.assertEqual([row.key_id for row in keys.read(txn) if row.is_default_tx], ["a"])

    def test_each_role_has_a_first_key(self) -> None:
        """Keys of two roles are each the default of its own."""
        with blocking(self.url) as txn:
            for key_id, role in (("a", "server"), ("b", "engine"), ("c", "engine")):
                keys.add(txn, key_id, signing.random_secret(), role)
            self.assertEqual([row.key_id for row in keys.read(txn) if row.is_default_tx], ["a", "b"])

    def test_a_name_is_taken_once(self) -> None:
        """A second key of the same name is refused in one line without a secret, and the first one stays."""
        first, second = signing.random_secret(), signing.random_secret()
        with blocking(self.url) as txn:
            keys.add(txn, "k-1", first, "any")
            error = self.assertRaises(OperatorError, keys.add, txn, "k-1", second, "any")
            self.assertEqual([row.key_b64 for row in keys.read(txn)], [first])
        self.assertNotIn(second, str(error))

    def test_one_default_for_each_role(self) -> None:
        """Two defaults of one role cannot be stored; one for each role can."""
        add = "insert into s2s_keys (key_id, key_b64, role, is_default_tx) values (%s, 'x', %s, true)"
        with blocking(self.url) as txn:
            for role in ("engine", "server", "any"):
                txn.execute(add, (f"k-{role}", role))
        with self.assertRaises(StatementRefused) as caught, blocking(self.url) as txn:
            txn.execute(add, ("k-2", "any"))
        self.assertEqual(caught.exception.constraint, "s2s_keys_default_tx")

    async def test_the_first_random_key_is_made_once(self) -> None:
        """Of several processes that make the first key at once, one does; it is random and usable by either role."""
        database = Database(self.url, threads=4)
        database.start()
        self.addCleanup(database.stop)
        made = await gatherResults([database.run(keys.add_first_random) for _ in range(4)])
        self.assertEqual(len([key_id for key_id in made if key_id]), 1)
        (row,) = await database.run(keys.read)
        self.assertEqual(row.role, "any")
        self.assertEqual(len(signing.decode_secret(row.key_b64).reveal()), 32)
