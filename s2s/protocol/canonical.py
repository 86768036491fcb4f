"""The only JSON in and out: strict parsing and canonical writing (docs/protocol.rst, "Canonical JSON").

Each direction has an exact path, which says what is wrong, and a fast one beside it. Of a frame both say the same, but
for the rule that is named where several are broken. The fast writer may give up on a good value, never pass a bad one;
``tests/protocol/test_canonical.py`` holds the paths together.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import msgspec
import orjson
from canonicaljson import encode_canonical_json

from s2s.errors import BadJson, CanonicalError

#: The envelope is depth 1.
MAX_DEPTH: Final = 32
#: The largest integer that every JSON implementation keeps exact (RFC 8259, section 6).
MAX_INTEGER: Final = 2**53 - 1
#: The longest frame, in bytes, in which the first broken rule is looked for by :func:`parse_exactly`: that takes up to
#: 1 ms, and the sender need not have a key.
EXPLAINED_BYTES: Final = 1024
#: The rules by the name that ``details.rule`` of ``bad_json`` carries, each with its fixed text.
RULES: Final[Mapping[str, str]] = {
    "utf8": "the frame is not valid UTF-8",
    "bom": "the frame begins with a byte order mark",
    "syntax": "the frame is not one JSON document",
    "not_object": "the frame is not a JSON object",
    "float": "a number is not an integer: say it in basis points, in permille or as a decimal string",
    "integer_range": "an integer is beyond 2^53 - 1: say it as a string",
    "negative_zero": "a number is written -0",
    "duplicate_member": "a member name stands twice in one object",
    "lone_surrogate": "a string holds a lone surrogate",
    "nul": "a string holds U+0000",
    "depth": f"the nesting is deeper than {MAX_DEPTH}",
}

_SORTED: Final = orjson.OPT_SORT_KEYS
# orjson would write dates, dataclasses and subclasses by rules of its own; passed through, they are refused.
_STRICT: Final = (
    _SORTED
    | orjson.OPT_STRICT_INTEGER
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_SUBCLASS
)
_GZIP: Final = b"\x1f\x8b"
_BACKSLASH: Final = ord("\\")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
# Whole strings first, so that brackets inside them are not counted. One that does not end is taken to the end as well:
# else every quote in it would be tried anew, in time quadratic in the frame.
_BRACKET: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def _refuse(rule: str, frame: bytes = b"") -> NoReturn:
    is_gzip = rule == "utf8" and frame.startswith(_GZIP)
    raise BadJson(rule, "it is compressed with gzip: send it as it is" if is_gzip else RULES[rule])


# --- in ------------------------------------------------------------------------------------------------------------


def parse(frame: bytes) -> dict[str, Any]:
    """Parse one frame, in whatever way it is written.

    :param frame: the frame's body.
    :raises BadJson: naming the rule broken (protocol, "Canonical JSON").
    """
    return parse_and_write(frame)[0]


def parse_and_write(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """Parse one frame and write its canonical form, both at the speed of the C libraries.

    A sender without a key decides what a frame holds, so Python code never walks the values of a long one.

    :raises BadJson: naming the rule broken.
    """
    try:
        return _parse_and_write(frame)
    except BadJson:
        if len(frame) > EXPLAINED_BYTES:
            raise
    value = parse_exactly(frame)
    return value, rewrite(value)


def _parse_and_write(frame: bytes) -> tuple[dict[str, Any], bytes]:
    # Where several rules are broken, the one named need not be the one that parse_exactly() names.
    try:
        value = _without_floats(frame)
        nested = orjson.dumps(_nested(value, _SPARE_LEVELS), option=_STRICT)
    except UnicodeDecodeError:
        _refuse("utf8", frame)
    except RecursionError:
        _refuse("depth")
    except msgspec.ValidationError:  # an integer of thousands of digits
        _refuse("integer_range")
    except msgspec.DecodeError:
        _refuse(_rule_of_unreadable(frame), frame)
    except orjson.JSONEncodeError as error:
        _refuse("integer_range" if "Integer" in str(error) else "depth")
    if type(value) is not dict:
        _refuse("not_object")
    written = nested[_SPARE_LEVELS:-_SPARE_LEVELS]
    if written == frame and not _may_hold_nul(frame):
        return value, written
    strings, signs, nuls = _tally(frame)
    # The parser keeps the last of equal names and takes -0 for 0: then the canonical form has fewer strings or signs.
    strings_kept, signs_kept, _ = _tally(written)
    if strings != strings_kept:
        _refuse("duplicate_member")
    if signs != signs_kept:
        _refuse("negative_zero")
    if nuls:
        _refuse("nul")
    return value, written


def _rule_of_unreadable(frame: bytes) -> str:
    try:
        frame.decode("utf-8")
    except UnicodeDecodeError:
        return "utf8"
    return "bom" if frame.startswith(codecs.BOM_UTF8) else "syntax"


def _tally(text: bytes) -> tuple[int, int, int]:
    """Count the quotes that delimit strings, the minus signs and the NULs of valid JSON."""
    if _BACKSLASH not in text or not (b'\\"' in text or b"\\u00" in text):
        return text.count(b'"'), text.count(b"-"), 0
    # Without the escaped backslashes, a backslash always begins an escape.
    text = text.replace(b"\\\\", b"")
    signs = text.count(b"-") + text.count(b"\\u002d") + text.count(b"\\u002D")
    return text.count(b'"') - text.count(b'\\"'), signs, text.count(b"\\u0000")


def parse_plainly(text: bytes, depth: int = 1) -> dict[str, Any] | None:
    """Parse an object that is written in its canonical form.

    :param depth: how deep it lies in its envelope, which is depth 1.
    :returns: ``None`` for any other: it may be wrong, or only written in another way.
    """
    if _may_hold_nul(text):
        return None
    try:
        value = _without_floats(text)
        # Equal to its own canonical form: no duplicate member, no -0, no surrogate, no other writing of anything.
        is_plain = type(value) is dict and orjson.dumps(value, option=_STRICT) == text and _is_plain(value, depth)
    except (BadJson, msgspec.DecodeError, UnicodeDecodeError, orjson.JSONEncodeError, RecursionError):
        return None
    return value if is_plain else None


def parse_exactly(frame: bytes) -> dict[str, Any]:
    """Parse one frame the slow way, which knows what is wrong.

    :raises BadJson: naming the rule broken.
    """
    try:
        text = frame.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("utf8", frame)
    if text.startswith("\ufeff"):
        _refuse("bom")
    _check_depth(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_members,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_float,
        )
    except ValueError:
        _refuse("syntax")
    if type(value) is not dict:
        _refuse("not_object")
    _check_strings(value)
    return value


def _check_depth(text: str) -> None:
    # Before the parser, whose recursion has limits of its own.
    depth = 0
    for match in _BRACKET.finditer(text):
        first = match[0][0]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                _refuse("depth")
        elif first in "]}":
            depth -= 1


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        _refuse("duplicate_member")
    return value


def _integer(token: str) -> int:
    if token == "-0":
        _refuse("negative_zero")
    # Counted before int(), which is quadratic in the digits and refuses over 4300 of them.
    if len(token) > 17 or abs(int(token)) > MAX_INTEGER:
        _refuse("integer_range")
    return int(token)


def _float(_token: str) -> NoReturn:
    _refuse("float")


def _nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def _levels_written() -> int:
    """Return how many levels orjson writes before it refuses: it has a fixed limit, which no option sets."""
    levels = MAX_DEPTH
    with contextlib.suppress(orjson.JSONEncodeError):
        while levels < 2048:
            orjson.dumps(_nested(0, levels + 1))
            levels += 1
    return levels


#: Levels around a value with which orjson refuses exactly the values deeper than :data:`MAX_DEPTH`.
_SPARE_LEVELS: Final = _levels_written() - MAX_DEPTH

_without_floats: Final = msgspec.json.Decoder(float_hook=_float).decode


def _check_strings(value: Any) -> None:
    if type(value) is str:
        if "\0" in value:
            _refuse("nul")
        if _SURROGATE.search(value):
            _refuse("lone_surrogate")
    elif type(value) is dict:
        for name, member in value.items():
            _check_strings(name)
            _check_strings(member)
    elif type(value) is list:
        for item in value:
            _check_strings(item)


def _may_hold_nul(text: bytes) -> bool:
    """Whether ``\\u0000`` stands somewhere in JSON: without it there is none in the strings."""
    # By a number first: the machine compares many bytes at once, and nothing is made ready for a search.
    return _BACKSLASH in text and b"\\u0000" in text


def _is_plain(value: Any, depth: int) -> bool:
    """Whether there is nothing below but what canonical JSON knows, no float above all, and nothing too deep."""
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind is str or kind is int or kind is bool or item is None:
            continue
        if (kind is not dict and kind is not list) or depth >= MAX_DEPTH or not _is_plain(item, depth + 1):
            return False
    return True


# --- out -----------------------------------------------------------------------------------------------------------


def dumps(value: Mapping[str, Any], depth: int = 1) -> bytes:
    """Write an object in its canonical form.

    :param depth: how deep it is to lie in its envelope, which is depth 1.
    :raises CanonicalError: what cannot be said, where, and what to say instead.
    """
    if type(value) is dict:
        try:
            written = orjson.dumps(value, option=_STRICT)
            if not _may_hold_nul(written) and _is_plain(value, depth):
                return written
        except orjson.JSONEncodeError:
            pass
    return dumps_exactly(value, depth)


def rewrite(value: dict[str, Any]) -> bytes:
    """Write what was parsed here, or a part of it: nothing in it can be wrong, and it is not looked at again."""
    return orjson.dumps(value, option=_STRICT)


def dumps_exactly(value: Mapping[str, Any], depth: int = 1) -> bytes:
    """Write an object the slow way, which knows what is wrong.

    :param depth: as of :func:`dumps`.
    :raises CanonicalError: what cannot be said, where, and what to say instead.
    """
    if not isinstance(value, Mapping):
        raise CanonicalError(f"canonical JSON is written of a mapping, and this is of type {type(value).__name__}")
    written: bytes = encode_canonical_json(_sayable(value, "", depth))
    return written


def _sayable(value: Any, path: str, depth: int) -> Any:
    """Give the value as plain dicts and lists.

    :raises CanonicalError: for what has no canonical form.
    """

    def wrong(rule: str) -> NoReturn:
        raise CanonicalError(f"at {path or '/'}: {RULES[rule]}")

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if "\0" in value:
            wrong("nul")
        if _SURROGATE.search(value):
            wrong("lone_surrogate")
        return str.__str__(value)  # a subclass may show itself as something else
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            wrong("integer_range")
        return int.__index__(value)
    if isinstance(value, float):
        # A parser of the database's JSON makes a float of every integer that is beyond 64 bits.
        wrong("integer_range" if abs(value) > MAX_INTEGER and value.is_integer() else "float")
    if isinstance(value, (Mapping, list, tuple)):
        if depth > MAX_DEPTH:
            wrong("depth")
        if not isinstance(value, Mapping):
            return [_sayable(item, f"{path}/{at}", depth + 1) for at, item in enumerate(value)]
        for name in value:
            if not isinstance(name, str):
                raise CanonicalError(f"at {path or '/'}: the member name {name!r} is not a string")
        return {
            _sayable(name, f"{path}/{name}", depth): _sayable(member, f"{path}/{name}", depth + 1)
            for name, member in value.items()
        }
    raise CanonicalError(
        f"at {path or '/'}: a value of type {type(value).__name__} has no canonical form: "
        "use a string, an integer, a list or an object"
    )
