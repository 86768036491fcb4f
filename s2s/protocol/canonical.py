"""The only JSON in and out: strict parsing and canonical writing (docs/protocol.rst, "Canonical JSON").

Parsing and writing each have an exact path, which names the broken rule, and a fast path. Both parsers accept the same
frames; when a frame breaks several rules, they may name different ones. The fast writer may reject a valid value, which
the exact writer then writes, but never accepts an invalid one. ``tests/protocol/test_canonical.py`` compares the paths.
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

#: Maximum levels of nesting in a frame; the envelope is depth 1.
MAX_DEPTH: Final = 32
#: The largest integer that every JSON implementation represents exactly (RFC 8259, section 6).
MAX_INTEGER: Final = 2**53 - 1
#: The longest refused frame, in bytes, in which :func:`parse_exactly` looks for the first broken rule. The limit exists
#: because that takes up to 1 ms and a sender without a key can cause it.
EXPLAINED_BYTES: Final = 1024
#: The fixed text of each rule, by the rule's name in ``details.rule`` of ``bad_json``.
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
# By default orjson writes dates, dataclasses and subclasses in its own formats; the PASSTHROUGH options make it refuse
# them.
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
# The pattern matches whole strings first, so that brackets inside them are not counted. It also matches an unterminated
# string up to the end of the text: otherwise the search would start again at every quote in the string, in time
# quadratic in the frame's length.
_BRACKET: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def _refuse(rule: str, frame: bytes = b"") -> NoReturn:
    is_gzip = rule == "utf8" and frame.startswith(_GZIP)
    raise BadJson(rule, "it is compressed with gzip: send it as it is" if is_gzip else RULES[rule])


# --- parsing -------------------------------------------------------------------------------------------------------


def parse(frame: bytes) -> dict[str, Any]:
    """Parse one frame, which need not be canonical.

    :param frame: the frame's body.
    :raises BadJson: the frame breaks a rule, which the error names (protocol, "Canonical JSON").
    """
    return parse_and_write(frame)[0]


def parse_and_write(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """Parse one frame and write its canonical form, both with the C libraries.

    A sender without a key may choose the frame's content, so Python code never walks the values of a frame that is
    longer than :data:`EXPLAINED_BYTES`.

    :raises BadJson: the frame breaks a rule, which the error names.
    """
    try:
        return _parse_and_write(frame)
    except BadJson:
        if len(frame) > EXPLAINED_BYTES:
            raise
    value = parse_exactly(frame)
    return value, rewrite(value)


def _parse_and_write(frame: bytes) -> tuple[dict[str, Any], bytes]:
    # When the frame breaks several rules, this function may name another one than parse_exactly() does.
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
    # The parser keeps the last of several equal member names and reads -0 as 0. The canonical form of such a frame
    # therefore has fewer strings or minus signs than the frame.
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
    # After the escaped backslashes are removed, every backslash begins another escape.
    text = text.replace(b"\\\\", b"")
    signs = text.count(b"-") + text.count(b"\\u002d") + text.count(b"\\u002D")
    return text.count(b'"') - text.count(b'\\"'), signs, text.count(b"\\u0000")


def parse_plainly(text: bytes, depth: int = 1) -> dict[str, Any] | None:
    """Parse an object that is written in its canonical form.

    :param depth: the object's depth in its envelope, which is depth 1.
    :returns: ``None`` if the text is not canonical: it may be invalid, or valid JSON that is written differently.
    """
    if _may_hold_nul(text):
        return None
    try:
        value = _without_floats(text)
        # A text that equals its canonical form has no duplicate member, no -0, no surrogate and no alternative
        # spelling of a value.
        is_plain = type(value) is dict and orjson.dumps(value, option=_STRICT) == text and _is_plain(value, depth)
    except (BadJson, msgspec.DecodeError, UnicodeDecodeError, orjson.JSONEncodeError, RecursionError):
        return None
    return value if is_plain else None


def parse_exactly(frame: bytes) -> dict[str, Any]:
    """Parse one frame by the slow path, which finds the broken rule.

    :raises BadJson: the frame breaks a rule, which the error names.
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
    # This check runs before the parser, whose own recursion limit may be lower.
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
    # The length is checked first: int() takes time quadratic in the number of digits and refuses more than 4300 digits.
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
    """Return the number of levels that orjson writes: it has a fixed limit, which no option sets."""
    levels = MAX_DEPTH
    with contextlib.suppress(orjson.JSONEncodeError):
        while levels < 2048:
            orjson.dumps(_nested(0, levels + 1))
            levels += 1
    return levels


#: The number of lists to wrap around a value so that orjson refuses exactly the values deeper than :data:`MAX_DEPTH`.
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
    """Whether ``\\u0000`` occurs in JSON text: if it does not, no string in it contains U+0000."""
    # The search for one byte, given as an int, comes first because it is the cheapest: it needs no preparation and
    # compares many bytes at once.
    return _BACKSLASH in text and b"\\u0000" in text


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a container holds only the types of canonical JSON, which exclude floats, and is not nested too deep."""
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind is str or kind is int or kind is bool or item is None:
            continue
        if (kind is not dict and kind is not list) or depth >= MAX_DEPTH or not _is_plain(item, depth + 1):
            return False
    return True


# --- writing -------------------------------------------------------------------------------------------------------


def dumps(value: Mapping[str, Any], depth: int = 1) -> bytes:
    """Write an object in its canonical form.

    :param depth: the object's depth in its envelope, which is depth 1.
    :raises CanonicalError: a value has no canonical form; the text names its place, the fault and the alternative.
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
    """Write a value that this module parsed, or a part of one, without checking the value again."""
    return orjson.dumps(value, option=_STRICT)


def dumps_exactly(value: Mapping[str, Any], depth: int = 1) -> bytes:
    """Write an object by the slow path, which finds the value that has no canonical form.

    :param depth: as of :func:`dumps`.
    :raises CanonicalError: as of :func:`dumps`.
    """
    if not isinstance(value, Mapping):
        raise CanonicalError(f"canonical JSON is written of a mapping, and this is of type {type(value).__name__}")
    written: bytes = encode_canonical_json(_sayable(value, "", depth))
    return written


def _sayable(value: Any, path: str, depth: int) -> Any:
    """Return the value as plain dicts and lists.

    :raises CanonicalError: the value has no canonical form.
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
        return str.__str__(value)  # a subclass may override __str__
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            wrong("integer_range")
        return int.__index__(value)
    if isinstance(value, float):
        # A parser of JSON from the database returns every integer beyond 64 bits as a float.
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
