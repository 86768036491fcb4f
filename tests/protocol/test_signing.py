"""Keys: the choice of the signing key, verification, and secrecy."""

from __future__ import annotations

import base64
import hashlib
import hmac
import traceback
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import NoSigningKey
from s2s.protocol.signing import KEY_ID, Key, Keyring, Sealed, Secret, decode_secret, random_secret

_SECRET = b"0123456789abcdef0123456789abcdef"


def _key(key_id: str = "k1", role: str = "any", since: float = 0.0, **more: Any) -> Key:
    return Key(key_id, Secret(more.pop("secret", _SECRET)), role, since, **more)


class SecretTests(SynchronousTestCase):
    """:class:`Secret`, :func:`decode_secret` and :func:`random_secret`."""

    def test_nothing_shows_it(self) -> None:
        """No text that Python makes from a secret, a key or a keyring contains the secret."""
        key = _key()
        keyring = Keyring([key])
        texts = []
        for thing in (key.secret, key, keyring, [key], {"key": key.secret}):
            texts += [repr(thing), str(thing), f"{thing}", f"{thing!r}", "%s" % (thing,)]  # noqa: UP031 - one way more
        encoded = base64.b64encode(_SECRET).decode()
        for text in texts:
            for telling in (_SECRET.decode(), encoded, _SECRET.hex()):
                self.assertNotIn(telling, text)
        self.assertEqual(repr(key.secret), "Secret(***)")

    def test_decoding(self) -> None:
        """Base64 with padding decodes to the bytes, also with white space around it or in it."""
        text = base64.b64encode(_SECRET).decode()
        for written in (text, f"  {text}\n", text[:20] + "\n" + text[20:]):
            self.assertEqual(decode_secret(written).reveal(), _SECRET)
        self.assertEqual(decode_secret(base64.b64encode(bytes(100)).decode()).reveal(), bytes(100))

    def test_refusals_hold_nothing_of_it(self) -> None:
        """A secret that is not base64, or too short, is refused by a text and a traceback that do not quote it."""
        short = base64.b64encode(b"hunter2" * 4).decode()
        for bad, words in (
            (short, "28 bytes"),
            (base64.b64encode(bytes(31)).decode(), "31 bytes and needs at least 32"),
            ("hunter2!" * 8, "not base64"),
            (base64.b64encode(_SECRET).decode().rstrip("="), "not base64"),
            ("hünter2ü" * 8, "not base64"),
            ("", "0 bytes"),
        ):
            error = self.assertRaises(ValueError, decode_secret, bad)
            self.assertIn(words, str(error))
            shown = "".join(traceback.format_exception(type(error), error, None))
            self.assertNotIn("nter2", shown)
            self.assertNotIn(short, shown)

    def test_random(self) -> None:
        """A random secret can be decoded, and no two are equal."""
        made = {random_secret() for _ in range(20)}
        self.assertEqual(len(made), 20)
        self.assertEqual({len(decode_secret(each).reveal()) for each in made}, {32})


class KeyTests(SynchronousTestCase):
    """:class:`Key`."""

    @settings(max_examples=100)
    @given(st.binary(min_size=32, max_size=150), st.binary(max_size=200))
    def test_signature(self, secret: bytes, message: bytes) -> None:
        """A signature is the HMAC-SHA256 in lower-case hex, also for a second message, and verifies."""
        key = _key(secret=secret)
        for each in (message, message + b"!"):
            sig = key.sign(each)
            self.assertEqual(sig, hmac.new(secret, each, hashlib.sha256).hexdigest())
            self.assertTrue(key.verifies(each, sig))
            self.assertFalse(key.verifies(each + b"x", sig))

    def test_wrong_signatures(self) -> None:
        """A signature with a changed, missing or extra digit, another alphabet or no digits does not verify."""
        key = _key()
        sig = key.sign(b"m")
        other = "0" if sig[0] != "0" else "1"
        for wrong in (other + sig[1:], sig[:-1], sig + "0", "", sig.upper() + "Z", "é" * 64, "\ud800" * 64):
            self.assertFalse(key.verifies(b"m", wrong))

    def test_window(self) -> None:
        """A key is active from active_from on and before active_to, or without end."""
        key = _key(since=100.0, active_to=200.0)
        self.assertEqual([key.is_active(at) for at in (99.9, 100, 199.9, 200, 1e9)], [False, True, True, False, False])
        self.assertTrue(_key().is_active(1e12))

    def test_roles(self) -> None:
        """A key signs for its own role, and a key of role any for both."""
        roles = {
            role: [_key(role=role).may_sign_for(src) for src in ("engine", "server", "x")] for role in ("engine", "any")
        }
        self.assertEqual(roles["engine"], [True, False, False])
        self.assertEqual(roles["any"][:2], [True, True])

    def test_key_ids(self) -> None:
        """A key_id is 1 to 64 of the characters that the protocol names, without a trailing line feed."""
        for good in ("k", "A-b_c.9", "x" * 64):
            self.assertTrue(KEY_ID.fullmatch(good))
        for bad in ("", "x" * 65, "a b", "é", "k\n", "a/b"):
            self.assertFalse(KEY_ID.fullmatch(bad))


class KeyringTests(SynchronousTestCase):
    """:class:`Keyring`."""

    def signer(self, *keys: Key, role: Any = "engine", now: float = 1000.0) -> str:
        """Return the key_id of the signing key."""
        return Keyring(keys).signer(role, now).key_id

    def test_order_of_signers(self) -> None:
        """The default of the role signs, else the default of any, else the newest active key that may sign."""
        new, old = _key("new", "engine", 900.0), _key("old", "any", 100.0)
        of_any = _key("any", "any", 50.0, is_default_tx=True)
        of_role = _key("role", "engine", 10.0, is_default_tx=True)
        others = _key("others", "server", 990.0, is_default_tx=True)
        self.assertEqual(self.signer(new, old, of_any, of_role, others), "role")
        self.assertEqual(self.signer(new, old, of_any, others), "any")
        self.assertEqual(self.signer(new, old, others), "new")
        self.assertEqual(self.signer(old, others), "old")
        self.assertEqual(self.signer(new, old, of_any, of_role, others, role="server"), "others")

    def test_inactive_keys_do_not_sign(self) -> None:
        """A default key that has ended or has not begun does not sign, and the next key does."""
        ended = _key("ended", "engine", 0.0, active_to=1000.0, is_default_tx=True)
        coming = _key("coming", "engine", 1000.5, is_default_tx=True)
        self.assertEqual(self.signer(ended, coming, _key("plain")), "plain")

    def test_none_may_sign(self) -> None:
        """Without a key that may sign, the error names the command that makes one."""
        for keys in ([], [_key(role="server")], [_key(active_to=5.0)]):
            error = self.assertRaises(NoSigningKey, Keyring(keys).signer, "engine", 1000.0)
            self.assertIn("s2s keys add --role engine", str(error))

    def test_none_may_sign_yet(self) -> None:
        """If a key is to become active, the error names the first such key and its time, and not how to make one."""
        keys = [_key("ended", active_to=5.0), _key("late", since=9000.0), _key("k7", since=8200.0)]
        error = self.assertRaises(NoSigningKey, Keyring(keys).signer, "engine", 1000.0)
        self.assertIn("the key k7 is not active yet, but in 7200 s", str(error))
        self.assertIn("the database's clock is behind", str(error))
        self.assertIn("s2s keys activate k7", str(error))
        self.assertNotIn("s2s keys add", str(error))

    def test_why_inactive(self) -> None:
        """The reason names a key that is unknown, ended or not active yet, and is None for an active one."""
        keyring = Keyring([_key("k"), _key("over", active_to=5.0), _key("later", since=8200.0)])
        keyring_never = Keyring([_key("never", since=9000.0, active_to=8000.0)])
        self.assertIsNone(keyring.why_inactive("k", 1000.0))
        self.assertEqual(keyring.why_inactive("other", 1000.0), "is not known here")
        self.assertEqual(keyring.why_inactive("over", 1000.0), "is no longer valid")
        self.assertEqual(keyring_never.why_inactive("never", 1000.0), "is no longer valid")
        self.assertIn("is not active yet, but in 7200 s", str(keyring.why_inactive("later", 1000.0)))

    @settings(max_examples=150)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["engine", "server", "any"]),
                st.integers(0, 10),
                st.none() | st.integers(0, 12),
                st.booleans(),
            ),
            max_size=5,
        ),
        st.lists(st.floats(-1, 13), min_size=1, max_size=8),
    )
    def test_remembering_changes_nothing(self, rows: list[Any], moments: list[float]) -> None:
        """One keyring that is asked at many moments answers as a new keyring does at each."""
        keys = [
            _key(f"k{at}", role, float(since), active_to=until, is_default_tx=is_default)
            for at, (role, since, until, is_default) in enumerate(rows)
        ]
        keyring = Keyring(keys)
        for now in [*moments, *(float(round(each)) for each in moments), *moments]:
            for role in ("engine", "server"):
                self.assertEqual(_ask(keyring, role, now), _ask(Keyring(keys), role, now))

    def test_verify(self) -> None:
        """Only a known active key with its own MAC verifies; every other case is None."""
        key, other = _key("k1"), _key("k2", secret=b"x" * 32)
        ended = _key("ended", active_to=10.0)
        coming = _key("coming", since=1e9)
        keyring = Keyring([key, other, ended, coming])
        self.assertIs(keyring.verify(Sealed("k1", key.sign(b"m"), b"m"), 1000.0), key)
        for key_id, sig in (
            ("k2", key.sign(b"m")),
            ("k1", key.sign(b"n")),
            ("nobody", key.sign(b"m")),
            ("", key.sign(b"m")),
            ("ended", ended.sign(b"m")),
            ("coming", coming.sign(b"m")),
        ):
            self.assertIsNone(keyring.verify(Sealed(key_id, sig, b"m"), 1000.0))

    def test_an_unknown_key_costs_a_mac(self) -> None:
        """For an unknown key_id exactly as many MACs are computed as for a known one."""
        made: list[bytes] = []
        true_sign = Key.sign

        def counted(key: Key, message: bytes) -> str:
            made.append(message)
            return true_sign(key, message)

        self.patch(Key, "sign", counted)
        keyring = Keyring([_key("k1"), _key("ended", active_to=1.0)])
        for key_id in ("k1", "unknown", "ended"):
            made.clear()
            self.assertIsNone(keyring.verify(Sealed(key_id, "0" * 64, b"m"), 1000.0))
            self.assertEqual(made, [b"m"])

    def test_contents(self) -> None:
        """A keyring finds its keys by key_id, ended or not."""
        keyring = Keyring([_key("k1"), _key("k2", active_to=1.0)])
        self.assertEqual((len(keyring), "k1" in keyring, "k2" in keyring, "k3" in keyring), (2, True, True, False))


def _ask(keyring: Keyring, role: Any, now: float) -> str | None:
    try:
        return keyring.signer(role, now).key_id
    except NoSigningKey:
        return None
