"""Canonical JSON: each fast path agrees with its exact path, and every rule is enforced."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import gzip
import json
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from canonicaljson import encode_canonical_json
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BadJson, CanonicalError
from s2s.protocol import canonical
from s2s.protocol.canonical import MAX_DEPTH, MAX_INTEGER, RULES

_MANY = settings(max_examples=200)

# --- values that have a canonical form ---

_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
_scalars = st.none() | st.booleans() | st.integers(-MAX_INTEGER, MAX_INTEGER) | _text
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4), max_leaves=12
)
_objects = st.dictionaries(_text, _values, max_size=5)

# --- values that have none ---


class _Colour(enum.Enum):
    RED = "red"


class _Word(str):
    """A string subclass whose ``str()`` is another text."""

    def __str__(self) -> str:
        return "shown"


class _Number(enum.IntEnum):
    ONE = 1


_odd_scalars = (
    st.floats()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**53, -(2**53), 2**53 - 1, 1 - 2**53, 2**63, 2**64, 10**400, -0.0, 1.0, 1e400])
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(["\0", "\ud800", "a\udfffb", "\ud83d\ude00", "\x7f", "\u2028", "\ufeff"])
    | st.binary(max_size=3)
    | st.sampled_from([_Colour.RED, _Number.ONE, _Word("word"), decimal.Decimal(1), datetime.date(2025, 1, 1)])
    | st.sampled_from([uuid.UUID(int=1), frozenset((1,)), object, ...])
)
_odd_names = _text | st.text(st.characters(), max_size=3) | st.integers() | st.none() | st.just(_Word("word"))
_odd_values = st.recursive(
    _scalars | _odd_scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(_odd_names, inner, max_size=3)
        | st.dictionaries(_text, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(_text, inner, max_size=3).map(MappingProxyType)
    ),
    max_leaves=8,
)

# --- texts that are JSON, nearly JSON, or resemble JSON ---

_number_tokens = st.sampled_from(
    [
        "0", "1", "-1", "-0", "0.0", "1.0", "-1.5", "1e2", "1E+2", "1e400", "1e-400", "00", "01", "-01", "+1", "-",
        "1.", ".5", "NaN", "Infinity", "-Infinity", "9007199254740991", "9007199254740992", "-9007199254740991",
        "-9007199254740992", "9007199254740993", "18446744073709551616", "12345678901234567", "1" + "0" * 40,
    ]
)  # fmt: skip
_string_tokens = st.sampled_from(
    [
        '""', '"a"', '"b"', '"A"', '"\\u0061"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"😀"',
        '"\\u0000"', '"\\u001f"', '"\\u001F"', '"\\b\\f\\n\\r\\t\\"\\\\"', '"\\/"', '"/"', '"\x7f"', '"é"', '"e\u0301"',
        '"{[{["', '"]}"', '"\\x"', '"\x01"', '"\n"', '"\ufeff"', '"\\', '"', '"\\u00"', "'a'", '"\\\\u0000"', '"\u2028"'
    ]
)  # fmt: skip
_other_tokens = st.sampled_from(
    ["true", "false", "null", "True", "nul", "//", "/**/", ",", ":", "{}", "[]", "}", "]"]
)  # fmt: skip
_blanks = st.sampled_from(["", "", "", " ", "\n", "\t", "\r ", "\x0b", "\u00a0", "\0", "\ufeff"])
_texts = st.recursive(
    _number_tokens | _string_tokens | _other_tokens | _blanks,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]")
        | st.lists(st.tuples(_string_tokens, _blanks, inner), max_size=4).map(
            lambda members: "{" + ",".join(f"{name}{blank}:{value}" for name, blank, value in members) + "}"
        )
    ),
    max_leaves=10,
)
_object_texts = st.lists(st.tuples(_string_tokens, _texts), max_size=4).map(
    lambda members: "{" + ",".join(f"{name}:{value}" for name, value in members) + "}"
)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """Draw the canonical form of an object with one stretch of it replaced by other bytes."""
    frame = canonical.dumps_exactly(draw(_objects))
    start = draw(st.integers(0, len(frame)))
    end = draw(st.integers(start, min(len(frame), start + 3)))
    tokens = (_number_tokens | _string_tokens | _other_tokens).map(str.encode)
    return frame[:start] + draw(tokens | st.binary(max_size=3)) + frame[end:]


def _in(parse: Any, frame: bytes) -> str:
    """Return the result of parsing, with types distinguished."""
    try:
        return repr(parse(frame))
    except BadJson as error:
        return str(error.details["rule"])


def _out(write: Any, value: Any) -> bytes | str:
    """Return the result of writing."""
    try:
        written: bytes = write(value)
    except CanonicalError as error:
        return str(error)
    return written


def _nested(depth: int) -> bytes:
    """Return an object that is nested this many levels deep."""
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


class ParseTests(SynchronousTestCase):
    """:func:`canonical.parse`, :func:`canonical.parse_plainly` and :func:`canonical.parse_exactly`."""

    @contextlib.contextmanager
    def unexplained(self) -> Iterator[None]:
        """Turn off explanations by the exact path, as for a long frame."""
        patch = self.patch(canonical, "EXPLAINED_BYTES", -1)
        try:
            yield
        finally:
            patch.restore()

    def agree(self, frame: bytes) -> None:
        """Assert that both parsers give the same result, and return it."""
        exact = _in(canonical.parse_exactly, frame)
        self.assertEqual(_in(canonical.parse, frame), exact)
        with self.unexplained():
            # Each parser may name another of several broken rules; the accepted values and their types are the same.
            quick = _in(canonical.parse, frame)
            self.assertEqual(RULES.keys() & {quick} and "refused", RULES.keys() & {exact} and "refused")
            self.assertTrue(quick in RULES or quick == exact)
        plain = canonical.parse_plainly(frame)
        if plain is not None:
            self.assertEqual(repr(plain), repr(canonical.parse_exactly(frame)))
            self.assertEqual(frame, canonical.dumps_exactly(plain))
        try:
            value = canonical.parse(frame)
        except BadJson:
            return
        # An accepted value can be written, and the written text parses to the same value.
        written = canonical.dumps_exactly(value)
        self.assertEqual(canonical.dumps(value), written)
        self.assertEqual(repr(canonical.parse_exactly(written)), repr(_sorted(value)))
        self.assertEqual(canonical.dumps(canonical.parse(written)), written)
        self.assertEqual(canonical.rewrite(canonical.parse_exactly(written)), written)

    @_MANY
    @given(st.binary(max_size=64))
    def test_random_bytes(self, frame: bytes) -> None:
        """For any bytes both parsers give the same result, and raise nothing but BadJson."""
        self.agree(frame)
        self.agree(b"{" + frame + b"}")

    @_MANY
    @given(_texts | _object_texts, _blanks)
    @example('{"a":1,"a":1}', "")
    @example('{"a":-0}', "")
    @example('{"a":1e2}', "")
    @example('{"a":1.5}', "")
    @example('{"a":9007199254740992}', "")
    @example('{"a":"\\ud800"}', "")
    @example('{"a":"\\u0000"}', "")
    @example('{"a":1}', "{}")
    def test_nearly_json(self, text: str, behind: str) -> None:
        """For JSON and near-JSON both parsers give the same result."""
        self.agree((text + behind).encode())

    @_MANY
    @given(_damaged())
    def test_damaged(self, frame: bytes) -> None:
        """For a canonical frame with a replaced stretch both parsers give the same result."""
        self.agree(frame)

    @_MANY
    @given(_objects)
    @example({"a": [{"b": []}] * 100})
    def test_canonical_is_seen(self, value: dict[str, Any]) -> None:
        """A canonical frame takes the fast path unless it may hold a NUL, and every such frame is parsed unchanged."""
        frame = canonical.dumps_exactly(value)
        self.assertEqual(canonical.parse(frame), value)
        self.assertEqual(canonical.parse_plainly(frame), None if b"\\u0000" in frame else value)

    @_MANY
    @given(_objects, st.sampled_from([None, 1, " "]), st.booleans())
    def test_other_writings(self, value: dict[str, Any], indent: Any, is_ascii: bool) -> None:
        """White space, another member order and other escapes are accepted and do not change the value."""
        frame = json.dumps(dict(reversed(value.items())), indent=indent, ensure_ascii=is_ascii).encode()
        self.assertEqual(canonical.parse(frame), value)
        is_plain = frame == canonical.dumps_exactly(value) and b"\\u0000" not in frame
        self.assertEqual(canonical.parse_plainly(frame) is not None, is_plain)

    @_MANY
    @given(_objects)
    def test_canonical_as_the_library(self, value: dict[str, Any]) -> None:
        """Every valid value is written as canonicaljson writes it."""
        self.assertEqual(canonical.dumps(value), encode_canonical_json(value))

    def test_rules(self) -> None:
        """Each broken rule is refused by its name and its fixed text."""
        for rule, frames in _BREACHES.items():
            for frame in frames:
                with self.subTest(rule=rule, frame=frame[:40]):
                    error = self.assertRaises(BadJson, canonical.parse, frame)
                    self.assertEqual(error.payload()["details"], {"retryable": False, "rule": rule})
                    self.assertEqual(error.message, RULES[rule])
        self.assertEqual(set(_BREACHES), set(RULES))

    def test_rules_of_long_frames(self) -> None:
        """In a frame too long to be explained each broken rule is named, except two that no C library distinguishes."""
        self.assertGreater(len(_LONG), canonical.EXPLAINED_BYTES)
        exact = self.patch(canonical, "parse_exactly", None)
        for rule, breaches in _BREACHES.items():
            for frame in breaches:
                if not (frame.startswith(b"{") and frame.endswith(b"}")):
                    continue
                named = _in(canonical.parse, b'{"":[%b],"a":%b}' % (_LONG, frame))
                with self.subTest(rule=rule, frame=frame[:40]):
                    unread = rule == "lone_surrogate" or b"NaN" in frame
                    self.assertEqual(named, "syntax" if unread else rule)
        for frame, rule in (
            (b"\xef\xbb\xbf{}" + b" " * len(_LONG), "bom"),
            (b"\xff\xfe" + b" " * len(_LONG), "utf8"),
            (b"[" + _LONG + b"]", "not_object"),
        ):
            self.assertEqual(_in(canonical.parse, frame), rule)
        exact.restore()

    def test_depth(self) -> None:
        """Depth 32 is accepted and depth 33 refused, for objects and arrays; brackets inside strings do not count."""
        for frame in (_nested(32), b'{"a":' + b"[" * 31 + b"]" * 31 + b"}"):
            self.assertIsNotNone(canonical.parse_plainly(frame))
            self.assertIsNone(canonical.parse_plainly(frame, depth=2))
        for frame in (_nested(33), b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", _nested(5000), b"[" * 60000):
            self.assertEqual(_in(canonical.parse, frame), "depth")
        many = b'{"a":"' + b"[{" * 500 + b'\\"[","b":[' + b",".join([b"{}"] * 500) + b"]}"
        self.assertEqual(canonical.parse(many)["b"], [{}] * 500)

    def test_integers(self) -> None:
        """The largest integers are accepted exactly, and larger ones are refused however many digits they have."""
        for number in (MAX_INTEGER, -MAX_INTEGER, 0, -1):
            self.assertEqual(canonical.parse_plainly(b'{"a":%d}' % number), {"a": number})
        for number in (MAX_INTEGER + 1, -MAX_INTEGER - 1, 10**16, -(10**17), 2**63, 2**64, 10**4000):
            self.assertEqual(_in(canonical.parse, b'{"a":%d}' % number), "integer_range")
        self.assertEqual(_in(canonical.parse, b'{"a":' + b"9" * 50000 + b"}"), "integer_range")

    def test_types_are_told_apart(self) -> None:
        """On every path ``true`` is not an integer and 1 is not a boolean."""
        for frame in (b'{"a":true,"b":1}', b' {"a":true,"b":1}'):
            value = canonical.parse(frame)
            self.assertIs(value["a"], True)
            self.assertIs(type(value["b"]), int)

    def test_hostile_frames_are_cheap(self) -> None:
        """No frame of a few kilobytes blocks the process, whatever it contains."""
        for frame in (
            b'{"a":"' + b'\\"' * 16000,
            b'"' * 32000,
            b'{"a":"' + b"\\\\" * 16000,
            b'{"":' * 8000,
            b'{"a":' + b"9" * 32000 + b"}",
            b'{"a":' + b"[]," * 10000,
            b"[" + b'"\\ud800",' * 4000,
        ):
            with self.subTest(frame=frame[:20]):
                began = time.process_time()
                self.assertRaises(BadJson, canonical.parse, frame)
                self.assertLess(time.process_time() - began, 0.5)

    def test_gzip(self) -> None:
        """A frame compressed with gzip is named as such, and no other frame that is not UTF-8 is, long or short."""
        for length in (10, 100_000):
            frame = gzip.compress(os.urandom(length))
            for parse in (canonical.parse, canonical.parse_exactly):
                error = self.assertRaises(BadJson, parse, frame)
                self.assertEqual(error.details["rule"], "utf8")
                self.assertEqual(error.message, "it is compressed with gzip: send it as it is")


#: The items of a long list, as JSON text.
_LONG = b",".join([b'"ab"'] * 1000)
_BREACHES = {
    "utf8": [b"\xff", b'{"a":"\xc0\x80"}', b'{"a":"\xed\xa0\x80"}', '{"a":1}'.encode("utf-16"), b"{\xf4\x90\x80\x80}"],
    "bom": [b"\xef\xbb\xbf{}", b"\xef\xbb\xbf"],
    "syntax": [b"", b" ", b"{", b"{} {}", b"{}\0", b'{"a":1,}', b'{"a":01}', b"{'a':1}", b'{"a":"\t"}', b'{"a"', b"{}x",
               '{"a":1}'.encode("utf-16-le"), b"{\x0b}", b'{"a":"\\x"}', b'{"a":"', b'{"a":tru}', b"{//\n}"],
    "not_object": [b"[]", b"1", b'"a"', b"null", b"true", b"[{}]"],
    "float": [b'{"a":1.0}', b'{"a":1e2}', b'{"a":0.5}', b'{"a":1e400}', b'{"a":-0.0}', b'{"a":NaN}', b"[-Infinity]"],
    "integer_range": [b'{"a":9007199254740992}', b'{"a":-9007199254740992}', b'{"a":[18446744073709551616]}'],
    "negative_zero": [b'{"a":-0}', b'{"a":[-0]}'],
    "duplicate_member": [b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}', b'{"b":{"a":1,"b":2,"a":3}}', b'{"":1,"":1}'],
    "lone_surrogate": [b'{"a":"\\ud800"}', b'{"\\udfff":1}', b'{"a":["\\ude00\\ud83d"]}', b'{"a":"\\ud83d\\u0041"}'],
    "nul": [b'{"a":"\\u0000"}', b'{"\\u0000":1}', b'{"a":[{"b":"x\\u0000"}]}'],
    "depth": [_nested(33), b'{"a":' + b"[" * 32 + b"]" * 32 + b"}"],
}  # fmt: skip


def _sorted(value: Any) -> Any:
    """Return a value with the members of all its objects in canonical order."""
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


class DumpsTests(SynchronousTestCase):
    """:func:`canonical.dumps` and :func:`canonical.dumps_exactly`."""

    @_MANY
    @given(_odd_values | st.dictionaries(_odd_names, _odd_values, max_size=3))
    @example({"a": float("nan")})
    @example({"a": 2**53})
    @example({"a": _Colour.RED})
    @example({"a": uuid.UUID(int=1)})
    @example({"a": (1, [2.0])})
    @example({1: 1})
    def test_any_value(self, value: Any) -> None:
        """For any value both writers give the same bytes or the same error."""
        self.assertEqual(_out(canonical.dumps, value), _out(canonical.dumps_exactly, value))

    @_MANY
    @given(_odd_values | st.dictionaries(_odd_names, _odd_values, max_size=3))
    def test_we_send_what_we_take(self, value: Any) -> None:
        """The strict parser accepts every written frame as canonical."""
        written = _out(canonical.dumps, value)
        if isinstance(written, bytes):
            self.assertEqual(canonical.dumps_exactly(canonical.parse_exactly(written)), written)

    @_MANY
    @given(_objects)
    def test_order_of_members_does_not_matter(self, value: dict[str, Any]) -> None:
        """Two objects with the same members are written identically."""
        self.assertEqual(canonical.dumps(dict(reversed(value.items()))), canonical.dumps(value))

    def test_refusals_name_the_place_and_the_cure(self) -> None:
        """The error for a value without a canonical form names its place and, for a float, the alternative."""
        for value, place, words in (
            ({"a": [1, {"b": 1.5}]}, "/a/1/b", "basis points"),
            ({"a": 2**53}, "/a", "as a string"),
            ({"a": 1e20}, "/a", "an integer is beyond"),
            ({"a": "x\0"}, "/a", "U+0000"),
            ({"a": ["\ud800"]}, "/a/0", "surrogate"),
            ({"\ud800": 1}, "/", "surrogate"),
            ({"a": b"x"}, "/a", "bytes"),
            ({"a": {1: 2}}, "/a", "not a string"),
            ({"a": {1, 2}}, "/a", "set"),
        ):
            with self.subTest(value=value):
                error = self.assertRaises(CanonicalError, canonical.dumps, value)
                self.assertIn(f"at {place}", str(error))
                self.assertIn(words, str(error))

    def test_only_objects(self) -> None:
        """A list, a string and None are refused, because only an object can be an envelope or a payload."""
        for value in ([], "a", None, 1):
            self.assertRaises(CanonicalError, canonical.dumps, value)

    def test_depth(self) -> None:
        """Depth 32 is written and depth 33 refused, and a value that contains itself is refused too."""
        value: Any = {}
        for _ in range(MAX_DEPTH - 1):
            value = {"a": value}
        self.assertEqual(canonical.dumps(value), _nested(MAX_DEPTH))
        self.assertRaises(CanonicalError, canonical.dumps, {"a": value})
        # The depth in the envelope counts against the limit.
        self.assertRaises(CanonicalError, canonical.dumps, value, 2)
        self.assertEqual(canonical.dumps(value["a"], 2), _nested(MAX_DEPTH - 1))
        loop: dict[str, Any] = {}
        loop["a"] = loop
        self.assertRaises(CanonicalError, canonical.dumps, loop)

    def test_mappings_and_tuples(self) -> None:
        """Mappings other than dict, tuples and integers of a subclass are written as objects, arrays and integers."""
        value = MappingProxyType({"b": (1, _Number.ONE), "a": OrderedDict(c=None)})
        self.assertEqual(canonical.dumps(value), b'{"a":{"c":null},"b":[1,1]}')

    def test_string_subclasses(self) -> None:
        """A string of a subclass is written by its characters, and not by its ``__str__``."""
        self.assertEqual(canonical.dumps({"a": _Word("word"), _Word("word"): 1}), b'{"a":"word","word":1}')

    def test_escapes(self) -> None:
        """Only the five short escapes and lower-case \\u00xx are used; all characters from U+007F on are raw."""
        value = {"a": '\b\f\n\r\t"\\/\x01\x1f\x7f\u2028é😀'}
        self.assertEqual(canonical.dumps(value), '{"a":"\\b\\f\\n\\r\\t\\"\\\\/\\u0001\\u001f\x7f\u2028é😀"}'.encode())
