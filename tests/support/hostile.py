"""Data that a client without a key may send: as large as the limit, and as expensive to check as possible."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

_HEAD = b'{"auth":{"key_id":"k1","sig":"' + b"0" * 64 + b'"},"dst":"server","id":"i1","payload":'
_TAIL = b',"src":"engine","ts":5,"type":"s2s.command.push","v":1}'
#: Items of a payload's list: each is expensive to parse, to write or to count in a different way.
_ITEMS = (
    b"[]", b"{}", b'{"a":1}', b'{"a":{}}', b"1", b"12345", b"null", b'""', b'"ab"', '"\u00e9"'.encode(), b'"\\n"',
    b'"\\""', b'"\\\\"', b'"\\u00e9"', b'"\\ud83d\\ude00"', '"\U0001f600"'.encode(), b'"-0"', b'"\\u002d"', b'"1.5"',
    b'"\\u0000x"', b'"\\\\u0000"', b'"NaN"', b"[" * 28 + b"]" * 28, b'{"":' * 28 + b"1" + b"}" * 28, b" \n1\t",
)  # fmt: skip
#: Values that break a rule; they stand at the end of the list, where the parser finds them last.
_BREACHES = (
    b"1.5",
    b"NaN",
    b"-0",
    b"9007199254740992",
    b"9" * 4000,
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\xff"',
    b"[" * 40,
    b"]",
)


def _payload(size: int, item: bytes, last: bytes = b"1") -> bytes:
    room = size - len(_HEAD) - len(_TAIL) - len(b'{"a":[,]}') - len(last)
    return b'{"a":[' + b",".join([item] * (room // (len(item) + 1))) + b"," + last + b"]}"


def frames(size: int) -> Iterator[bytes]:
    """Generate frames of about this size that have a wrong MAC or break a rule at their end, in several spellings."""
    payloads = [_payload(size, item) for item in _ITEMS]
    payloads += [_payload(size, item, breach) for item in (b"[]", b'"ab"') for breach in _BREACHES]
    room = size - len(_HEAD) - len(_TAIL) - 16
    payloads += [
        b"{" + b",".join(b'"%x":1' % at for at in range(room // 9)) + b"}",
        b"{" + b",".join([b'"a":1'] * (room // 6)) + b"}",
        b'{"a":"' + b"x" * room + b'"}',
        b'{"a":"' + b"\\n" * (room // 2) + b'"}',
        b'{"a":"' + b'\\"' * (room // 2) + b'"}',
        b'{"a":"' + b"\\\\" * (room // 2) + b'"}',
        b'{"a":' + b"[" * room,
        b'{"a":' + b"[" * (room // 2) + b"]" * (room // 2) + b"}",
        b'{"a":' + b"9" * room + b"}",
        b'{"a":1}' + b" " * room,
        b"{" + b'},"src":"engine","ts":5,"type":"t","v":1' * (room // 41) + b"}",
        b'{"a":"' + b'\\"' * (room // 2),
    ]
    for payload in payloads:
        canonical = _HEAD + payload + _TAIL
        yield canonical
        yield canonical.replace(b'"auth":', b' "\\u0061uth":', 1)
        # The large member stands before auth, or in auth.
        yield b'{"a":' + payload + b"," + canonical[1:].replace(payload, b"{}")
        yield canonical.replace(b'"key_id"', b'"a":' + payload + b',"key_id"', 1).replace(
            b'"payload":' + payload, b'"payload":{}'
        )
    yield b'"' * size
    yield b"[" * size


def dearest(size: int) -> list[bytes]:
    """Return the frames of about this size that are the most expensive to parse: many small items, not canonical."""
    return [(_HEAD + _payload(size, item) + _TAIL).replace(b'"auth":', b' "auth":', 1) for item in _ITEMS[:4]]


#: Most lines of Python code that may run for a frame before its MAC is verified. A walk over the values of a large
#: frame takes tens of thousands.
MOST_STEPS = 2000


def steps(act: Callable[[Any], object], frame: bytes) -> int:
    """Return the number of lines of Python code that run while ``act`` handles a frame: a measure without a clock."""
    lines = 0

    def trace(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act(frame)
    finally:
        sys.settrace(before)
    return lines


def client_hello() -> bytes:
    """Return the first message of a TLS handshake, which is all that a client needs for its server's signature."""
    context = ssl.create_default_context()
    sent = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()
