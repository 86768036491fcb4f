#!/usr/bin/env python3
"""Write the vectors beside this file: what a peer of s2s must accept, and what it must refuse.

It uses nothing but the standard library and none of our own code, so that the vectors check that code and do not repeat
its mistakes. Without an argument it writes the files; with ``--check`` it only says which of them are not current. The
result is the same on every run. ``README.rst`` describes the formats, ``docs/protocol.rst`` the rules.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: The reader's clock, in Unix seconds.
NOW = 1737990000
MAX = 2**53 - 1
SECRETS = {
    "k1": bytes(range(32)),
    # Its base64 has both characters that the URL-safe alphabet writes otherwise.
    "k2": b"\xfb\xff\xbe" * 20 + b"key2",
    # Longer than a block of SHA-256, so that HMAC hashes the key first.
    "long": bytes(range(100)),
    "x": hashlib.sha256(b"one character").digest(),
    "K" * 58 + "_.-9zZ": hashlib.sha256(b"sixty-four characters").digest(),
}
HOLE = "@@"

Json = Any
Vector = dict[str, Json]


# --- the rules, written once more ----------------------------------------------------------------------------------


SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quoted(text: str) -> str:
    """One string in canonical form."""
    return '"' + "".join(SHORT.get(c) or (f"\\u{ord(c):04x}" if c < " " else c) for c in text) + '"'


def canonical(value: Json) -> str:
    """Any value in canonical form."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    # Python compares strings by code point.
    return "{" + ",".join(f"{quoted(name)}:{canonical(value[name])}" for name in sorted(value)) + "}"


def mac(key_id: str, message: bytes) -> str:
    """The signature of the message."""
    return hmac.new(SECRETS[key_id], message, hashlib.sha256).hexdigest()


def ulid(seed: str) -> str:
    """Make a ULID of the reader's time whose random part depends on the seed alone."""
    number = (NOW * 1000 << 80) | int.from_bytes(hashlib.sha256(seed.encode()).digest()[:10], "big")
    return "".join("0123456789ABCDEFGHJKMNPQRSTVWXYZ"[number >> shift & 31] for shift in range(125, -1, -5))


def unsigned(name: str, kind: str, payload: Json, src: str = "engine", key_id: str = "k1", **others: Json) -> Vector:
    """Make an envelope that lacks only ``auth.sig``; ``others`` add members or replace them."""
    return {
        "v": 1,
        "id": ulid(name),
        "ts": NOW,
        "src": src,
        "dst": "server" if src == "engine" else "engine",
        "type": kind,
        "auth": {"key_id": key_id},
        "payload": payload,
        **others,
    }


def push(name: str, payload: Json, **others: Json) -> Vector:
    """Make a push of a command that the vectors alone know."""
    return unsigned(
        name, "s2s.command.push", {"cmd_type": "vector.echo", "idem_key": name, "payload": payload}, **others
    )


def with_sig(envelope: Vector, sig: Json) -> Vector:
    """The envelope with this ``auth.sig``."""
    return {**envelope, "auth": {**envelope["auth"], "sig": sig}}


def signed(envelope: Vector) -> Vector:
    """The envelope with the signature that it ought to have."""
    return with_sig(envelope, mac(envelope["auth"]["key_id"], canonical(envelope).encode()))


def sealed(body: bytes) -> bytes:
    """Sign these very bytes, as a peer with a lax JSON reader would, and put ``sig`` in its canonical place."""
    place = b'"key_id":"k1"'
    assert body.count(place) == 1
    return body.replace(place, place + b',"sig":"' + mac("k1", body).encode() + b'"')


def key(key_id: str) -> Vector:
    """The members that name the key in force."""
    return {"key_id": key_id, "key_b64": base64.b64encode(SECRETS[key_id]).decode()}


def shown(frame: bytes) -> Vector:
    """The frame as text, where it is text of a length that a person would read, and as hex."""
    try:
        text = {"frame_utf8": frame.decode()} if len(frame) < 4096 else {}
    except UnicodeDecodeError:
        text = {}
    return {**text, "frame_hex": frame.hex()}


# --- accept.json ---------------------------------------------------------------------------------------------------


def accept(name: str, why: str, envelope: Vector, write: Callable[[Json], str] = canonical) -> Vector:
    """A frame that verifies: ``write`` says how the sender spells it."""
    whole = signed(envelope)
    frame = write(whole)
    assert json.loads(frame) == whole, name
    return {
        "name": name,
        "why": why,
        "reader": envelope["dst"],
        "kind": "reply" if "ack_of" in envelope or envelope["type"] in REPLY_ONLY else "request",
        **shown(frame.encode()),
        **key(envelope["auth"]["key_id"]),
        "canonical_utf8": canonical(envelope),
        "sig": whole["auth"]["sig"],
        "envelope": whole,
    }


REPLY_ONLY = ("s2s.ack", "s2s.health.ack", "s2s.error")
ORDER = {"order_id": "order-1"}
NOTICE = {"scope": "global", "message": "Harbour closed until 06:00", "severity": "warn"}
#: Every type with a payload and with the type and payload of its reply; the sender of the request first.
CATALOGUE: list[tuple[str, str, Vector, str, Vector]] = [
    (
        "engine",
        "s2s.command.push",
        {"cmd_type": "notice.publish", "idem_key": "broadcast:7", "payload": NOTICE, "priority": 100},
        "s2s.ack",
        {"accepted": True, "duplicate": False, "cmd_id": 123, "status": "ready"},
    ),
    ("engine", "s2s.health.check", {}, "s2s.health.ack", {"role": "server", "version": "0.1.0", "uptime_s": 120}),
    (
        "server",
        "s2s.health.check",
        {},
        "s2s.health.ack",
        {
            "role": "engine",
            "version": "0.1.0",
            "uptime_s": 120,
            "name": "engine-1",
            "boot_id": ulid("boot"),
            "state": "running",
            "degraded": False,
            "config_version": 5,
            "frame_size_limit": 65536,
            "outbox_depth": 0,
        },
    ),
    (
        "server",
        "s2s.engine.shutdown",
        {"grace_ms": 5000, "reason": "maintenance"},
        "s2s.ack",
        {"ok": True, "state": "draining", "deadline_ms": NOW * 1000 + 5000},
    ),
    ("server", "s2s.engine.pause", {"reason": "admin_pause"}, "s2s.ack", {"ok": True, "state": "paused"}),
    ("server", "s2s.engine.resume", {"reason": "admin_pause ends"}, "s2s.ack", {"ok": True, "state": "running"}),
    (
        "server",
        "s2s.broadcast.sweep",
        {"since_ts": 1737900000},
        "s2s.ack",
        {"ok": True, "since_ts": 1737900000, "queued": 3},
    ),
    ("server", "s2s.config.bump", {"version": 5}, "s2s.ack", {"ok": True, "version": 5}),
    (
        "server",
        "admin.engine.force_tick.v1",
        {**ORDER, "job_type": "port_refresh"},
        "s2s.ack",
        {**ORDER, "ok": True, "status": "done", "result": {}},
    ),
    (
        "server",
        "admin.config.set.v1",
        {**ORDER, "key": "decay.rate_bp", "value": 25},
        "s2s.ack",
        {**ORDER, "ok": True, "status": "done", "result": {}},
    ),
    (
        "server",
        "world.set_sector_status.v1",
        {**ORDER, "sector_id": 12, "status": "port_closed"},
        "s2s.ack",
        {**ORDER, "ok": False, "status": "refused", "result": {"code": "not_found"}},
    ),
    (
        "server",
        "admin.player.update_all_ships.v1",
        {**ORDER, "update_field": "fuel", "new_value": 500, "reason": "anniversary"},
        "s2s.ack",
        {**ORDER, "ok": True, "status": "running", "result": None},
    ),
]


def every_type() -> list[Vector]:
    """Each request of the catalogue and its reply; the first pair is worked out in the protocol's description."""
    found = []
    for src, kind, payload, reply, answer in CATALOGUE:
        name = f"{kind} from the {src}"
        ask = unsigned(name, kind, payload, src)
        found.append(accept(name, "a request of the catalogue", ask))
        ack = unsigned(f"{name}, reply", reply, answer, ask["dst"], ack_of=ask["id"])
        found.append(accept(f"{name}, reply", f"the {reply} that answers the vector before", ack))
    details = {"retryable": False, "path": "/payload/priority"}
    error = {"code": "bad_payload", "message": "1001 is greater than the maximum of 1000", "details": details}
    ack_of = found[0]["envelope"]["id"]
    found.append(
        accept(
            "s2s.error to the engine",
            "a signed error that answers a request",
            unsigned("s2s.error to the engine", "s2s.error", error, "server", ack_of=ack_of),
        )
    )
    return found


def reversed_members(value: Json) -> str:
    """Write with the members of every object in descending order."""
    if isinstance(value, dict):
        names = sorted(value, reverse=True)
        return "{" + ",".join(f"{quoted(name)}:{reversed_members(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(reversed_members(item) for item in value) + "]"
    return canonical(value)


def all_escaped(value: Json) -> str:
    """Write every character of every string, of the member names too, as an upper-case escape."""

    def escaped(text: str) -> str:
        units = text.encode("utf-16-be")
        return '"' + "".join(f"\\u{units[at]:02X}{units[at + 1]:02X}" for at in range(0, len(units), 2)) + '"'

    if isinstance(value, dict):
        return "{" + ",".join(f"{escaped(name)}:{all_escaped(value[name])}" for name in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(all_escaped(item) for item in value) + "]"
    return escaped(value) if isinstance(value, str) else canonical(value)


def spaced(value: Json) -> str:
    """Write with all four kinds of white space wherever it may stand."""
    if isinstance(value, dict):
        return "{ \t" + " ,\r\n".join(f"{quoted(name)}\t:\n{spaced(value[name])}" for name in value) + "\r }"
    if isinstance(value, list):
        return "[ \n" + "\t, ".join(spaced(item) for item in value) + " ]"
    return canonical(value)


def replacing(*pairs: tuple[str, str]) -> Callable[[Json], str]:
    """Write canonically, then spell some pieces otherwise."""

    def write(value: Json) -> str:
        text = canonical(value)
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        return text

    return write


def nested(depth: int, inner: Json = None) -> Json:
    """Arrays in one another, ``depth`` of them."""
    value = inner
    for level in range(depth):
        value = [] if level == 0 and inner is None else [value]
    return value


def accepted() -> list[Vector]:
    """All of accept.json."""
    found = every_type()

    def add(
        name: str, why: str, write: Callable[[Json], str] = canonical, payload: Json = None, **others: Json
    ) -> None:
        found.append(accept(name, why, push(name, {} if payload is None else payload, **others), write))

    text = {"text": 'a/b "c" \\ \u00af \u007f \U0001f680', "list": [1, [2, {}], []], "none": None, "yes": True}
    add("white space", "verified over its canonical form", lambda value: "\n " + spaced(value) + " \r\n\t", text)
    add("descending members", "verified over its canonical form", reversed_members, text)
    add("every character escaped", "names too, auth and sig among them, and surrogate pairs", all_escaped, text)
    add("ASCII only", "what many JSON writers do by default", json.dumps, text)
    add("escaped solidus", r"\/ is one way to write /", replacing(("a/b", r"a\/b")), {"path": "a/b"})
    add("escaped letter", r"\u0041 is one way to write A", replacing(("ABC", r"\u0041BC")), {"text": "ABC"})
    add("upper-case escape", r"\u00AF is one way to write U+00AF", replacing(("\u00af", r"\u00AF")), {"text": "\u00af"})
    add(
        "escaped name",
        "a member name is unescaped before it is sorted",
        replacing(('"zz"', r'"\u007az"')),
        {"zz": 1, "a": 2},
    )
    add(
        "long escapes of the short ones",
        r"canonical form has \b \f \n \r \t, the frame \u0008 and so on",
        replacing(*((SHORT[c], f"\\u{ord(c):04X}") for c in "\b\f\n\r\t")),
        {"text": "\b\f\n\r\t"},
    )
    add(
        "escaped surrogate pair",
        "two escapes, one character",
        replacing(("\U0001f600", r"\ud83d\uDE00")),
        {"text": "\U0001f600"},
    )
    controls = "".join(map(chr, range(1, 32)))
    add("every control character", r"five short escapes, the others \u00xx in lower case", payload={controls: controls})
    add("delete and C1 controls", "U+007F to U+009F stand raw", payload={"text": "\u007f\u0080\u0085\u009f"})
    add("line separators", "U+2028 and U+2029 stand raw", payload={"text": "\u2028 \u2029"})
    add("quotes and backslashes", r"\" and \\ are escaped, / is not", payload={'"\\/': '\\"/'})
    add("html characters", "< > & and ' stand raw", payload={"text": "<script>&'</script>"})
    add(
        "noncharacters",
        "U+FFFF, U+FDD0, U+10FFFF and U+FEFF inside a string are text",
        payload={"text": "\uffff\ufdd0\U0010ffff\ufeff"},
    )
    add(
        "members by code point",
        "U+FB01 sorts before U+1F600; by UTF-16 code units it would be the other way round",
        payload={"\U0001f600": 1, "\ufb01": 2, "\uffff": 3, "\ud7ff": 4, "z": 5, "\U00010000": 6},
    )
    add(
        "prefixes and case",
        "the shorter name first, upper case before lower case",
        payload={"ab": 1, "a": 2, "": 3, "B": 4, "a\u0001": 5},
    )
    add(
        "NFC and NFD",
        "two names that look alike are two names; nothing is normalised",
        payload={"\u00e9": "\u00e9", "e\u0301": "e\u0301"},
    )
    add(
        "largest integers",
        "both ends of the range, and zero",
        payload={"most": MAX, "least": -MAX, "zero": 0, "minus": -1},
    )
    add("depth 32", "the envelope is depth 1, the innermost array depth 32", payload={"deep": nested(29)})
    add("depth 32 with a scalar within", "a scalar has no depth", payload={"deep": nested(29, 1)})
    add("brackets in a string", "they are no nesting", payload={"text": '[{"' * 40})
    add("empty things", "an empty object, array, string and name", payload={"": "", "object": {}, "array": []})
    add("unknown members", "signed like the rest and ignored", a={"x": [1]}, Zone="eu", trace_id="t-1", zz=None)
    add(
        "a sig elsewhere",
        "only auth.sig is left out of what is signed",
        sig="top",
        payload={"auth": {"key_id": "k", "sig": "p"}},
    )
    add(
        "text like a signature",
        "found in a value that sorts before auth",
        ab='"auth":{"key_id":"k1","sig":"' + "0" * 64 + '"}',
    )
    for scheme, why in (("hmac-sha256", "may be named"), (None, "any other member of auth is signed and ignored")):
        extra = {"scheme": scheme} if scheme else {"hint": "blue", "Sig": "", "a": 1, "zone": {"sig": "deep"}}
        add(f"auth with {', '.join(extra)}", why, auth={"key_id": "k1", **extra})
    for key_id, why in (
        ("k2", "a secret of 64 bytes, + and / in its base64"),
        ("long", "a secret of 100 bytes, longer than the block of SHA-256"),
        ("x", "a key_id of one character"),
        (max(SECRETS, key=len), "a key_id of 64 characters"),
    ):
        add(f"key {key_id[:8]}", why, key_id=key_id)
    for seconds in (-300, 300):
        add(f"ts {seconds:+d}", "the edge of the default freshness window", ts=NOW + seconds)
    for name in ("-", "_", "0" * 64):
        add(f"id {name[:4]}", "any id of 1 to 64 of A-Z a-z 0-9 _ -", id=name)
    late = unsigned("a late reply", "s2s.ack", {}, ts=0, ack_of="nobody-asked")
    found.append(
        accept("a late reply", "the ts of a reply is not checked; what nobody awaits is counted and dropped", late)
    )
    return found


# --- refuse.json ---------------------------------------------------------------------------------------------------


#: What the answer is like: signed, and whether the link is closed after it.
ANSWERS = {
    **dict.fromkeys(("bad_json", "toolarge", "auth_required", "auth_bad"), (False, True)),
    **dict.fromkeys(("forbidden", "replay"), (True, True)),
}


class Refused(list[Vector]):
    """refuse.json as it grows."""

    def frame(self, name: str, why: str, code: str, frame: bytes, **others: Json) -> None:
        """Add one frame."""
        is_signed, closes = ANSWERS.get(code, (True, False))
        expected = {"code": code, "signed": is_signed, "closes": closes, **others}
        self.append({"name": name, "why": why, "reader": "server", **shown(frame), **key("k1"), **expected})

    def json(self, rule: str, name: str, why: str, spelled: str | bytes) -> None:
        """Add a push, signed as it stands, in whose payload the hole is spelled so."""
        body = canonical(push(name, {"n": HOLE})).encode()
        value = spelled if isinstance(spelled, bytes) else spelled.encode()
        self.frame(name, why, "bad_json", sealed(body.replace(b'"%s"' % HOLE.encode(), value)), rule=rule)

    def around(self, rule: str, name: str, why: str, change: Callable[[bytes], bytes]) -> None:
        """Add a right frame that is changed as a whole."""
        self.frame(name, why, "bad_json", change(canonical(signed(push(name, {}))).encode()), rule=rule)

    def envelope(self, name: str, why: str, code: str, envelope: Vector, **others: Json) -> None:
        """Add an envelope that is signed as it ought to be."""
        self.frame(name, why, code, canonical(signed(envelope)).encode(), **others)

    def auth(self, name: str, why: str, auth: Json, **others: Json) -> None:
        """Add an envelope with just this ``auth``."""
        self.frame(name, why, "auth_bad", canonical(push(name, {}, auth=auth, **others)).encode())


def refused_json(add: Refused) -> None:
    """Everything that fails before there is an envelope."""
    for name, spelled in (
        ("float 1.0", "1.0"),
        ("float 0.5", "0.5"),
        ("float 1e2", "1e2"),
        ("float 1E2", "1E2"),
        ("float 1e-2", "1e-2"),
        ("float 1e400", "1e400"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
    ):
        add.json("float", name, "numbers are integers", spelled)
    for name, number in (
        ("2^53", 2**53),
        ("-2^53", -(2**53)),
        ("2^63", 2**63),
        ("2^64", 2**64),
        ("20 digits", 12345678901234567890),
    ):
        add.json("integer_range", name, "integers are within 2^53 - 1", str(number))
    add.json(
        "integer_range", "5000 digits", "some readers refuse so many digits with an error of their own", "1" * 5000
    )
    add.json("negative_zero", "-0", "zero is written 0", "-0")

    twice = "a member stands twice"
    add.json("duplicate_member", "duplicate, nested", twice, '{"a":1,"a":2}')
    add.json("duplicate_member", "duplicate, equal values", twice, '{"a":1,"b":2,"a":1}')
    add.json("duplicate_member", "duplicate after unescaping", r"a and \u0061 are one name", r'{"a":1,"\u0061":2}')
    add.json("duplicate_member", "duplicate empty name", twice, '[{"":1,"":2}]')
    for name, old in (("type", b'"type":'), ("ts", b'"ts":'), ("payload", b'"payload":{"cmd_type"')):
        title = f"duplicate, {name}"
        body = canonical(push(title, {})).encode()
        first = b'"' + name.encode() + b'":null,'
        add.frame(title, twice, "bad_json", sealed(body.replace(old, first + old)), rule="duplicate_member")
    add.around(
        "duplicate_member",
        "duplicate, sig",
        "the first one is right",
        lambda f: f.replace(b'"},"dst"', b'","sig":"00"},"dst"'),
    )

    for name, spelled in (
        ("high surrogate", r'"\ud800"'),
        ("low surrogate", r'"\udfff"'),
        ("high surrogate before a letter", r'"\ud83dx"'),
        ("high surrogate before an escape", r'"\uD83D\u0041"'),
        ("two high surrogates", r'"\ud83d\ud83d\ude00"'),
        ("surrogates the wrong way round", r'"\ude00\ud83d"'),
        ("surrogate in a name", r'{"\ud83d":1}'),
    ):
        add.json("lone_surrogate", name, "a surrogate without its partner is no character", spelled)
    add.json("nul", "U+0000", "PostgreSQL cannot store it", r'"a\u0000b"')
    add.json("nul", "U+0000 in a name", "PostgreSQL cannot store it", r'{"\u0000":1}')
    add.json("depth", "depth 33", "the envelope is depth 1", canonical(nested(30)))
    add.json("depth", "depth 33, objects", "the envelope is depth 1", '{"a":' * 30 + "0" + "}" * 30)
    add.json("depth", "depth 30003", "a reader that recurses must not fall", "[" * 30000 + "]" * 30000)

    for name, raw in (
        ("overlong solidus", b"\xc0\xaf"),
        ("overlong of three bytes", b"\xe0\x80\xaf"),
        ("overlong NUL", b"\xc0\x80"),
        ("surrogate in UTF-8", b"\xed\xa0\x80"),
        ("surrogate pair in UTF-8", b"\xed\xa0\xbd\xed\xb8\x80"),
        ("beyond U+10FFFF", b"\xf4\x90\x80\x80"),
        ("truncated sequence", b"\xe2\x82"),
        ("stray continuation", b"\x80"),
        ("Latin-1", b"caf\xe9"),
        ("byte FF", b"\xff"),
    ):
        add.json("utf8", name, "the frame is not UTF-8", b'"' + raw + b'"')
    add.around("utf8", "UTF-16 with a BOM", "the frame is not UTF-8", lambda f: f.decode().encode("utf-16"))
    add.around("bom", "UTF-8 with a BOM", "nothing stands before the object", lambda f: b"\xef\xbb\xbf" + f)

    one = "the frame is one JSON document"
    add.around(
        "syntax",
        "UTF-16 without a BOM",
        "its bytes are UTF-8 with NUL between",
        lambda f: f.decode().encode("utf-16-le"),
    )
    add.around("syntax", "two documents", one, lambda f: f + f)
    add.around("syntax", "two documents on two lines", one, lambda f: f + b"\n{}")
    add.around("syntax", "trailing NUL", one, lambda f: f + b"\0")
    add.around("syntax", "trailing comma", one, lambda f: f[:-1] + b",}")
    add.around("syntax", "unterminated object", one, lambda f: f[:-1])
    add.around("syntax", "unterminated string", one, lambda f: f[:-4])
    add.around("syntax", "comment", one, lambda f: b"/* */" + f)
    add.around("syntax", "no-break space", "it is no white space of JSON", lambda f: f + b"\xc2\xa0")
    add.around("syntax", "form feed", "it is no white space of JSON", lambda f: f + b"\f")
    add.frame("empty frame", "length 0", "bad_json", b"", rule="syntax")
    add.frame("white space only", one, "bad_json", b" \n", rule="syntax")
    add.frame("no JSON", one, "bad_json", b"GET / HTTP/1.1\r\n\r\n", rule="syntax")
    for name, spelled in (
        ("leading zero", "01"),
        ("leading plus", "+1"),
        ("no digit after the point", "1."),
        ("no digit before the point", ".5"),
        ("minus alone", "-"),
        ("hexadecimal", "0x10"),
        ("True", "True"),
        ("undefined", "undefined"),
        ("single quotes", "'a'"),
        ("unquoted name", "{a:1}"),
        ("number as a name", "{1:1}"),
        ("elision", "[1,,2]"),
        ("raw line feed", '"a\nb"'),
        ("raw tab", '"a\tb"'),
        ("raw NUL", '"a\0b"'),
        ("raw U+001F", '"a\x1fb"'),
        ("unknown escape", r'"\x41"'),
        ("short escape", r'"\u12"'),
        ("escape with a sign", r'"\u+123"'),
        ("digits that are not ASCII", "\u0661"),
    ):
        add.json("syntax", name, one, spelled)
    for name, frame in (("array", b"[{}]"), ("string", b'"a"'), ("null", b"null"), ("true", b"true"), ("number", b"1")):
        add.frame(f"{name} as the frame", "the frame is one object", "bad_json", frame, rule="not_object")


def refused_auth(add: Refused) -> None:
    """Everything that fails before the MAC holds."""
    bare = push("no auth", {})
    del bare["auth"]
    add.frame("no auth", "there is no auth member", "auth_required", canonical(bare).encode())
    add.frame("an empty object", "there is no auth member", "auth_required", b"{}")
    for name, value in (
        ("null", None),
        ("a string", "k1"),
        ("an array", ["k1"]),
        ("a number", 1),
        ("true", True),
        ("empty", {}),
    ):
        add.auth(f"auth is {name}", "it is an object of key_id and sig", value)

    def right(name: str) -> str:
        return mac("k1", canonical(push(name, {})).encode())

    for name, key_id in (
        ("empty", ""),
        ("of 65 characters", "k" * 65),
        ("with a space", "k 1"),
        ("with a final line feed", "k1\n"),
        ("not ASCII", "k\u00e9"),
        ("a number", 1),
        ("null", None),
    ):
        title = f"key_id {name}"
        body = canonical(push(title, {}, auth={"key_id": key_id})).encode()
        sig = hmac.new(SECRETS["k1"], body, hashlib.sha256).hexdigest()
        add.auth(title, "1 to 64 of A-Z a-z 0-9 _ . -", {"key_id": key_id, "sig": sig})
    add.auth("key_id missing", "auth has a key_id", {"sig": right("key_id missing")})
    add.auth("sig missing", "auth has a sig", {"key_id": "k1"})
    spellings: tuple[tuple[str, Callable[[str], Json]], ...] = (
        ("upper-case", str.upper),
        ("of 63 digits", lambda sig: sig[:-1]),
        ("of 65 digits", lambda sig: sig + "0"),
        ("with a final line feed", lambda sig: sig + "\n"),
        ("with a leading space", lambda sig: " " + sig),
        ("not hexadecimal", lambda sig: sig[:-1] + "g"),
        ("in base64", lambda sig: base64.b64encode(bytes.fromhex(sig)).decode()),
        ("in full-width digits", lambda sig: "".join(chr(ord(c) + 0xFEE0) for c in sig)),
        ("empty", lambda sig: ""),
        ("null", lambda sig: None),
        ("a number", lambda sig: int(sig[:12], 16)),
        ("with one bit turned", lambda sig: sig[:-1] + f"{int(sig[-1], 16) ^ 1:x}"),
        ("of zeros", lambda sig: "0" * 64),
    )
    for name, spell in spellings:
        title = f"sig {name}"
        add.auth(title, "64 lower-case hex digits, the MAC", {"key_id": "k1", "sig": spell(right(title))})

    title = "unknown key"
    sig = mac("k2", canonical(push(title, {}, key_id="nobody")).encode())
    add.auth(title, "the reader has no key of this name", {"key_id": "nobody", "sig": sig})
    title = "another secret"
    add.auth(title, "k1 has another secret", {"key_id": "k1", "sig": mac("k2", canonical(push(title, {})).encode())})
    title = "SHA-256 without a key"
    sig = hashlib.sha256(SECRETS["k1"] + canonical(push(title, {})).encode()).hexdigest()
    add.auth(title, "HMAC is not a hash of key and message", {"key_id": "k1", "sig": sig})
    title = "secret not decoded"
    sig = hmac.new(base64.b64encode(SECRETS["k1"]), canonical(push(title, {})).encode(), hashlib.sha256).hexdigest()
    add.auth(title, "the secret is the decoded base64", {"key_id": "k1", "sig": sig})

    def over(name: str, why: str, message: Callable[[Vector], str], payload: Json = None) -> None:
        envelope = push(name, payload or {})
        frame = canonical(with_sig(envelope, mac("k1", message(envelope).encode())))
        add.frame(name, why, "auth_bad", frame.encode())

    over("signed over the payload", "the whole envelope is signed", lambda e: canonical(e["payload"]))
    over("signed without auth", "auth.key_id is covered", lambda e: canonical({n: e[n] for n in e if n != "auth"}))
    over("signed with an empty sig", "auth.sig is left out, not emptied", lambda e: canonical(with_sig(e, "")))
    over("signed with its length", "the prefix is not signed", lambda e: "\0\0\1\0" + canonical(e))
    over("signed with a line feed", "nothing follows the object", lambda e: canonical(e) + "\n")
    over("signed in the order of sending", "members are sorted", lambda e: json.dumps(e, separators=(",", ":")))
    over("signed with spaces", "there is no white space", lambda e: json.dumps(e, sort_keys=True))
    ascii_only: Callable[[Vector], str] = lambda e: json.dumps(e, sort_keys=True, separators=(",", ":"))  # noqa: E731
    over("signed over ASCII", "what may stand raw stands raw", ascii_only, {"text": "caf\u00e9"})
    by_utf16 = {"\U0001f600": 1, "\ufb01": 2}
    over("signed in UTF-16 order", "members are sorted by code point", _utf16, by_utf16)
    solidus: Callable[[Vector], str] = lambda e: canonical(e).replace("/", "\\/")  # noqa: E731
    over("signed over an escaped solidus", "the canonical form is signed", solidus, {"path": "a/b"})
    spelled = push("signed as sent, not canonical", {"b": 1, "a": 2})
    raw = reversed_members(spelled)
    sent = raw.replace('"key_id":"k1"', '"sig":"' + mac("k1", raw.encode()) + '","key_id":"k1"')
    add.frame("signed as sent, not canonical", "the canonical form is signed, not the bytes", "auth_bad", sent.encode())

    def changed(name: str, why: str, change: Callable[[Vector], Vector]) -> None:
        add.frame(name, why, "auth_bad", canonical(change(signed(push(name, {})))).encode())

    changed("changed payload", "the payload is signed", lambda e: {**e, "payload": {**e["payload"], "priority": 0}})
    changed("changed id", "the id is signed", lambda e: {**e, "id": ulid("other")})
    changed("changed ts", "the ts is signed", lambda e: {**e, "ts": NOW + 1})
    changed("added member", "unknown members are signed", lambda e: {**e, "extra": 1})
    changed("added member of auth", "all of auth but sig is signed", lambda e: {**e, "auth": {**e["auth"], "extra": 1}})
    changed("added ack_of", "ack_of is signed", lambda e: {**e, "ack_of": ulid("other")})
    title = "scheme hmac-sha512"
    auth = {"key_id": "k1", "scheme": "hmac-sha512"}
    add.auth(title, "there is one scheme", {**auth, "sig": mac("k1", canonical(push(title, {}, auth=auth)).encode())})


def _utf16(value: Json) -> str:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{quoted(name)}:{_utf16(value[name])}" for name in names) + "}"
    return canonical(value)


def refused_envelope(add: Refused) -> None:
    """Everything that verifies and is refused all the same."""

    def without(name: str) -> Vector:
        envelope = push(f"{name} missing", {})
        del envelope[name]
        return envelope

    for value in (0, 2):
        title = f"v is {value}"
        add.envelope(title, "there is version 1", "unsupported_version", push(title, {}, v=value))
    for name in ("v", "id", "ts", "src", "dst", "type", "payload"):
        add.envelope(f"{name} missing", "every envelope has it", "bad_envelope", without(name), path=f"/{name}")
    wrong: tuple[tuple[str, str, Json], ...] = (
        ("v", "a string", "1"),
        ("v", "true", True),
        ("v", "null", None),
        ("id", "empty", ""),
        ("id", "of 65 characters", "i" * 65),
        ("id", "with a space", "a b"),
        ("id", "with a final line feed", "abc\n"),
        ("id", "with a point", "a.b"),
        ("id", "a number", 7),
        ("ts", "a string", str(NOW)),
        ("ts", "true", True),
        ("ts", "null", None),
        ("type", "a number", 1),
        ("src", "null", None),
        ("dst", "an array", ["server"]),
        ("payload", "an array", []),
        ("payload", "a string", "{}"),
        ("payload", "null", None),
    )
    for member, name, value in wrong:
        title = f"{member} is {name}"
        envelope = {**push(title, {}), member: value}
        add.envelope(title, f"{member} is ill-formed", "bad_envelope", envelope, path=f"/{member}")

    for title, others in (
        ("src is server", {"src": "server"}),
        ("dst is engine", {"dst": "engine"}),
        ("a server's own frame sent back", {"src": "server", "dst": "engine"}),
        ("src is neither", {"src": "moon"}),
        ("dst is upper-case", {"dst": "SERVER"}),
    ):
        add.envelope(title, "src is the peer's role, dst the reader's", "forbidden", push(title, {}, **others))
    title = "key of the other role"
    add.envelope(title, "this key may not sign for an engine", "forbidden", push(title, {}), key_role="server")

    for title, ts in (
        ("ts too old", NOW - 301),
        ("ts too new", NOW + 301),
        ("ts zero", 0),
        ("ts negative", -1),
        ("ts in milliseconds", NOW * 1000),
        ("ts at the end of the range", MAX),
    ):
        add.envelope(title, "more than 300 s from the reader's clock", "ts_skew", push(title, {}, ts=ts))

    for kind in ("s2s.nothing", "S2S.COMMAND.PUSH", "s2s.command.push ", "", "__init__"):
        title = f"type {kind!r}"
        add.envelope(title, "no such type", "unsupported_type", unsigned(title, kind, {}))
    for src, kind, payload, _, _ in CATALOGUE:
        if src == "server" and kind != "s2s.health.check":
            title = f"{kind} from an engine"
            add.envelope(title, "only a server sends it", "unsupported_type", unsigned(title, kind, payload))

    for title, kind, payload, path in bad_payloads():
        reason = "the payload breaks its schema"
        add.envelope(title, reason, "bad_payload", unsigned(title, kind, payload), path=path)
    title = "cmd_type that no handler serves"
    add.envelope(title, "refused at the push", "unknown_command", push(title, {}))


def bad_payloads() -> list[tuple[str, str, Json, str]]:
    """Payloads that a server refuses: title, type, payload, path."""
    good = {"cmd_type": "notice.publish", "idem_key": "k", "payload": NOTICE}
    found: list[tuple[str, str, Json, str]] = [
        ("health check with a member", "s2s.health.check", {"x": 1}, "/payload/x"),
        ("name that a pointer escapes", "s2s.command.push", {**good, "a/b~c": 1}, "/payload/a~1b~0c"),
    ]
    for name in good:
        rest = {other: good[other] for other in good if other != name}
        found.append((f"push without {name}", "s2s.command.push", rest, f"/payload/{name}"))
    for name, said, value in (
        ("idem_key", "empty", ""),
        ("idem_key", "of 201 characters", "k" * 201),
        ("idem_key", "with a final line feed", "k\n"),
        ("idem_key", "not ASCII", "cl\u00e9"),
        ("idem_key", "with U+007F", "k\u007f"),
        ("idem_key", "a number", 7),
        ("cmd_type", "upper-case", "Notice.Publish"),
        ("cmd_type", "of 65 characters", "c" * 65),
        ("cmd_type", "with a digit first", "1st"),
        ("payload", "an array", []),
        ("payload", "null", None),
        ("priority", "-1", -1),
        ("priority", "1001", 1001),
        ("priority", "true", True),
        ("priority", "a string", "100"),
        ("priority", "null", None),
        ("due_at", "-1", -1),
        ("due_at", "beyond 2100", 4102444801),
        ("prio", "unknown", 1),
    ):
        found.append((f"push: {name} {said}", "s2s.command.push", {**good, name: value}, f"/payload/{name}"))
    for name, said, value in (
        ("message", "empty", ""),
        ("message", "of 4001 characters", "m" * 4001),
        ("severity", "unknown", "fatal"),
        ("scope", "unknown", "galaxy"),
        ("colour", "is no member", "red"),
    ):
        notice = {**good, "payload": {**NOTICE, name: value}}
        found.append((f"notice: {name} {said}", "s2s.command.push", notice, f"/payload/payload/{name}"))
    return found


def refused() -> list[Vector]:
    """All of refuse.json."""
    found = Refused()
    refused_json(found)
    refused_auth(found)
    refused_envelope(found)
    return list(found)


# --- canonical.json, lengths.json ----------------------------------------------------------------------------------


def canonical_pairs() -> list[Vector]:
    """All of canonical.json."""
    pairs = [
        ("members sorted", '{"b": 1, "a": {"d": 2, "c": 3}}'),
        ("arrays keep their order", "[3, 1, 2, [true, false, null]]"),
        ("empty things", '{"o": {}, "a": [], "s": "", "": 0}'),
        ("integers", "[0, -1, 10, 9007199254740991, -9007199254740991]"),
        ("short escapes", r'"\u0008\u000c\u000a\u000d\u0009\u0022\u005c"'),
        ("other control characters", r'"\u0001\u000B\u001F"'),
        ("solidus", r'"\/"'),
        ("raw from U+007F", r'"\u007f\u0080\u00AF\u2028\u2029\ufeff\uffff"'),
        ("surrogate pair", r'"\ud83d\ude80"'),
        ("sorted by code point", r'{"\ud83d\ude00": 1, "\ufb01": 2, "\u20ac": 3, "z": 4, "Z": 5, "": 6}'),
        ("not normalised", r'{"\u00e9": "NFC", "e\u0301": "NFD"}'),
        ("names escaped", r'{"\u000a": 1, "\u0022": 2, "\u0001": 3, "\u0041": 4}'),
        ("digits sort as text", '{"10": 1, "9": 2, "1": 3}'),
        ("html", '"<>&\'"'),
    ]
    found = []
    for name, text in pairs:
        written = canonical(json.loads(text))
        found.append({"name": name, "value": text, "canonical_utf8": written, "canonical_hex": written.encode().hex()})
    return found


def lengths() -> list[Vector]:
    """All of lengths.json: what is judged on the four bytes of the prefix alone."""
    found = []
    for limit, length in ((65536, 0), (65536, 65536), (65536, 65537), (65536, 2**31), (65536, 2**32 - 1), (4096, 4097)):
        code = "bad_json" if length == 0 else "toolarge" if length > limit else None
        found.append({"frame_size_limit": limit, "length": length, "prefix_hex": f"{length:08x}", "code": code})
    return found


FILES: dict[str, Callable[[], list[Vector]]] = {
    "accept.json": accepted,
    "refuse.json": refused,
    "canonical.json": canonical_pairs,
    "lengths.json": lengths,
}


def main(arguments: list[str]) -> int:
    """Write the files, or only look whether they are current."""
    stale = []
    for name, make in FILES.items():
        vectors = make()
        titles = [vector["name"] for vector in vectors if "name" in vector]
        assert len(set(titles)) == len(titles), name
        # ASCII, so that no editor normalises or drops a character.
        text = json.dumps(vectors, indent=1) + "\n"
        path = HERE / name
        if arguments == ["--check"]:
            if not path.exists() or path.read_text("ascii") != text:
                stale.append(name)
        else:
            path.write_text(text, "ascii")
    if stale:
        print("not current: " + ", ".join(stale), file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
