"""The catalogue: its table, and the agreement of the fast validator and the explaining one on every schema."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from importlib import resources
from random import Random
from time import thread_time
from typing import Any
from unittest import mock

from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BadPayload, OperatorError
from s2s.handlers.commands import BUILTIN
from s2s.protocol import canonical
from s2s.protocol.catalogue import ERROR_SCHEMA, REPLY_ONLY
from s2s.protocol.catalogue import vet as vet_module
from s2s.protocol.catalogue.schema import Schema, _compile, load
from tests.support.installed import CATALOGUE

_FILES = sorted(each.name for each in (resources.files("s2s.protocol.catalogue") / "schemas").iterdir())
_SCHEMAS = {name.removesuffix(".json"): load(name.removesuffix(".json")) for name in _FILES}
_COMMANDS = {f"command {kind.cmd_type}": Schema(kind.schema) for kind in BUILTIN}

_odd = st.sampled_from(
    [None, True, False, 0, -1, 1, "", "a", "A", "a\n", "a b", "é", "\x7f", "~", " ", [], {}, [1], {"a": 1}, 2**53 - 1]
)
_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=3)


def _around(rule: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw values at the bounds of one rule of a schema, just beyond them, and unrelated values."""
    values: list[Any] = [rule["const"]] if "const" in rule else []
    values += rule.get("enum", [])
    for bound in ("minimum", "maximum"):
        if bound in rule:
            # Only values of canonical JSON, because the parser has refused any other value before.
            values += [n for n in (rule[bound] - 1, rule[bound], rule[bound] + 1) if abs(n) <= canonical.MAX_INTEGER]
    for bound in ("minLength", "maxLength"):
        if bound in rule:
            values += [letter * max(0, rule[bound] + step) for step in (-1, 0, 1) for letter in "aZ9_. é😀"]
            values.append("a" * max(0, rule[bound] - 1) + "\n")
    if "default" in rule:
        values.append(rule["default"])
    drawn = _odd | _text
    return (st.sampled_from(values) | drawn) if values else drawn


@st.composite
def _payloads(draw: st.DrawFn, schema: Schema) -> Any:
    """Draw a payload that is often valid, often nearly valid, and sometimes unrelated to the schema."""
    if draw(st.integers(0, 19)) == 0:
        return draw(_odd)
    good = draw(_likely({"type": "object", **schema.document}))
    rules = schema.document.get("properties", {})
    spoiled = draw(st.lists(st.sampled_from(sorted(rules)), max_size=2) if rules else st.just([]))
    payload = {**good, **{name: draw(_around(rules[name])) for name in spoiled}}
    if draw(st.integers(0, 5)) == 0:
        payload[draw(_text | st.sampled_from(["a/b", "m~n", *rules]))] = draw(_odd)
    return payload


def _likely(rule: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw values of the right type; for an object sometimes only the required members."""
    if "const" in rule or "enum" in rule:
        return st.sampled_from(rule.get("enum", [rule.get("const")]))
    kinds = rule.get("type", "object")
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if kind == "integer":
        return st.integers(rule.get("minimum", 0), rule.get("maximum", 9))
    if kind == "object" and "properties" in rule:
        members = {name: _likely(each) for name, each in rule["properties"].items()}
        required = {name: members.pop(name) for name in rule.get("required", ())}
        return st.fixed_dictionaries(required) | st.fixed_dictionaries(required, optional=members)
    return {
        "string": st.sampled_from(["a", "b"]).map(lambda letter: letter * rule.get("minLength", 1)),
        "boolean": st.booleans(),
        "object": st.dictionaries(_text, _odd, max_size=2),
        "array": st.lists(_odd, max_size=2),
        "null": st.none(),
    }[kind]


#: Search for any example, and do not shrink the example.
_ANY = settings(max_examples=5000, phases=[Phase.generate])


class SchemaTests(SynchronousTestCase):
    """Every schema file, and the schemas of our commands."""

    def test_both_validators_agree(self) -> None:
        """For payloads around the bounds of every schema jsonschema-rs and jsonschema give the same answer."""
        for name, schema in {**_SCHEMAS, **_COMMANDS}.items():
            with self.subTest(schema=name):
                self.hold_together(schema)

    def hold_together(self, schema: Schema) -> None:
        """Assert that both validators of a schema agree, and that both answers occur."""
        exact = Draft202012Validator(schema.document)

        @settings(max_examples=60)
        @given(_payloads(schema))
        def agree(payload: Any) -> None:
            is_valid = schema.is_valid(payload)
            self.assertEqual(is_valid, exact.is_valid(payload))
            told = schema.explain(payload, "")
            self.assertEqual(told is None, is_valid)
            if told is not None:
                # For a missing or unknown member jsonschema names the object, and we name the member.
                path = told[0].rpartition("/")[0] if told[1].startswith("the member is") else told[0]
                self.assertIn(
                    path, {"".join(f"/{step}" for step in error.path) for error in exact.iter_errors(payload)}
                )

        agree()
        for wanted in (True, False):
            payload = find(_payloads(schema), lambda drawn: schema.is_valid(drawn) is wanted, settings=_ANY)  # noqa: B023
            self.assertIs(exact.is_valid(payload), wanted)

    def test_what_is_no_schema(self) -> None:
        """A document that jsonschema refuses as a schema is refused with the same text."""
        for document in (
            {"type": "strin"},
            {"type": ["string", "string"]},
            {"minimum": "x"},
            {"maxLength": -1},
            {"pattern": "("},
            {"patternProperties": {"(": {}}},
            {"properties": 3},
            {"properties": {"a": {"properties": {"b": {"enum": "x"}}}}},
            {"required": "a"},
            {"additionalProperties": 5},
            {"anyOf": []},
            {"format": 3},
        ):
            with self.subTest(document=document):
                told = self.assertRaises(SchemaError, Draft202012Validator.check_schema, document)
                self.assertEqual(self.assertRaises(SchemaError, Schema, document).message, told.message)

    def test_refusals_can_be_sent(self) -> None:
        """Every refusal has a path below /payload and makes an error that canonical JSON can express."""

        @settings(max_examples=200)
        @given(
            st.sampled_from(sorted(_SCHEMAS)).flatmap(lambda name: st.tuples(st.just(name), _payloads(_SCHEMAS[name])))
        )
        def check(drawn: tuple[str, Any]) -> None:
            name, payload = drawn
            try:
                _SCHEMAS[name].check(payload)
            except BadPayload as error:
                self.assertTrue(error.details["path"].startswith("/payload"))
                ERROR_SCHEMA.check(error.payload())
                self.assertLess(len(canonical.dumps(error.payload())), 4096 - 512)

        check()

    def test_files(self) -> None:
        """Every file is 2020-12, has its own name as its id, and uses no reference, format or look-around."""
        for name in _FILES:
            text = (resources.files("s2s.protocol.catalogue") / "schemas" / name).read_text("utf-8")
            document = json.loads(text)
            with self.subTest(file=name):
                self.assertEqual(document["$schema"], "https://json-schema.org/draft/2020-12/schema")
                self.assertEqual(document["$id"], f"urn:s2s:schema:{name.removesuffix('.json')}")
                for word in ('"$ref"', '"format"', "(?", '"$dynamicRef"'):
                    self.assertNotIn(word, text)

    def test_integers_have_bounds(self) -> None:
        """Every integer of every schema is bounded within 2^53 - 1, so that the database can store it."""
        for name, schema in {**_SCHEMAS, **_COMMANDS}.items():
            for member, rule in schema.document.get("properties", {}).items():
                if "integer" in str(rule.get("type", "")):
                    with self.subTest(schema=name, member=member):
                        self.assertLessEqual(abs(rule["minimum"]), canonical.MAX_INTEGER)
                        self.assertLessEqual(abs(rule["maximum"]), canonical.MAX_INTEGER)

    def test_requests_are_strict_and_replies_tolerant(self) -> None:
        """A request with an unknown member is refused by the member's name; a reply may have further members."""
        for message in CATALOGUE.values():
            with self.subTest(message=message.name):
                self.assertIs(message.request_schema.document["additionalProperties"], False)
                self.assertNotIn("additionalProperties", message.reply_schema.document)
        path, _ = CATALOGUE["s2s.health.check"].request_schema.explain({"more/of~it": 1}) or ("", "")
        self.assertEqual(path, "/payload/more~1of~0it")

    def test_defaults_are_valid(self) -> None:
        """Every default of a schema is valid by that schema."""
        push = CATALOGUE["s2s.command.push"].request_schema
        self.assertEqual(push.defaults, {"priority": 100})
        self.assertEqual(CATALOGUE["s2s.engine.shutdown"].request_schema.defaults, {"grace_ms": 5000})
        for schema in _SCHEMAS.values():
            for name, value in schema.defaults.items():
                rule = Draft202012Validator(schema.document["properties"][name])
                self.assertTrue(rule.is_valid(value))


#: Schemas whose refusals jsonschema, or the error list of jsonschema-rs, takes minutes to years to explain.
_NODE = {"properties": {"a": {"$ref": "#/$defs/n"}}}
_DEAR: dict[str, tuple[dict[str, Any], str, str]] = {
    "pattern": ({"properties": {"a": {"pattern": "^([A-Za-z]+ ?)+$"}}}, "{'a': 'a' * 48 + '!'}", "/payload/a"),
    "long pattern": ({"properties": {"a": {"pattern": "^(a|a)*$"}}}, "{'a': 'a' * 64000 + '!'}", "/payload/a"),
    "unique objects": (
        {"properties": {"a": {"uniqueItems": True}}},
        "{'a': [{'n': i} for i in range(7000)] + [{'n': 0}]}",
        "/payload/a",
    ),
    "many faults": (
        {"properties": {"a": {"items": {"enum": [f"x{n}" for n in range(2000)]}}}},
        "{'a': ['y'] * 16000}",
        "/payload/a/0",
    ),
    "alternatives": (
        {"properties": {"a": {"anyOf": [{"items": {"type": "string"}}, {"type": "null"}] * 10}}},
        "{'a': [1] * 32000}",
        "/payload/a",
    ),
    "recursion": (
        {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{**_NODE, "required": ["x"]}, {**_NODE, "required": ["y"]}]}}},
        "__import__('functools').reduce(lambda inner, _: {'a': inner}, range(28), {})",
        "/payload",
    ),
}
_EXPLAIN = """
import sys, json
from s2s.protocol.catalogue.schema import Schema
print(*Schema(json.loads(sys.argv[1])).explain(eval(sys.argv[2])), sep="\\n")
"""
_MANY = [{"const": n} for n in range(200)]
_DEAR_TEXTS = [{"pattern": f"[ab]*a[ab]{{300}}[cd]{{{n}}}"} for n in range(1, 21)]
_MILLION = {"t": {"anyOf": [{"$ref": "#/$defs/h"}] * 70}, "h": {"anyOf": [{"type": "null"}] * 70}}
_TEXTS = (
    "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$", r"^[^@\s]+@[^@\s]+\.[^@\s]+$",
    r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|[+-]\d{2}:\d{2})$", "^[A-Z]{2}[0-9]{2}[A-Z0-9]{1,30}$",
    r"^(https?|ftp)://[^\s/$.?#].[^\s]*$", r"^(\d{1,3}\.){3}\d{1,3}$", "^[a-z][a-z0-9_-]{0,63}$", r"^\+?\d{7,15}$",
)  # fmt: skip
#: A schema with the keywords that the description of an HTTP API uses.
_RICH = {
    "type": "object",
    "properties": {
        **{f"text{n}": {"type": "string", "pattern": _TEXTS[n % 8], "description": "A text"} for n in range(30)},
        **{f"count{n}": {"type": "integer", "minimum": 0, "maximum": 100} for n in range(80)},
        **{f"place{n}": {"$ref": "#/$defs/place"} for n in range(20)},
        **{f"places{n}": {"type": "array", "items": {"$ref": "#/$defs/place"}} for n in range(20)},
        **{f"tags{n}": {"items": {"type": "string"}, "maxItems": 50, "uniqueItems": True} for n in range(20)},
        **{f"kind{n}": {"type": ["string", "null"], "enum": ["a", "b", None]} for n in range(30)},
        "body": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {
                        "kind": {"const": f"k{n}"},
                        "place": {"$ref": "#/$defs/place"},
                        **{f"b{m}": {"type": "string", "pattern": _TEXTS[(n + m) % 8]} for m in range(3)},
                    },
                    "required": ["kind"],
                    "additionalProperties": False,
                }
                for n in range(10)
            ]
        },
    },
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"street": {"maxLength": 200}, "zip": {"pattern": r"^\d{5}$"}, "at": {"enum": ["A", "B"]}},
            "required": ["street"],
        }
    },
}


class ApartTests(SynchronousTestCase):
    """Parts of a schema with an ``$id`` of their own."""

    def test_references_below_an_id(self) -> None:
        """A reference inside such a part is not followed: the explanation of a refusal ends there."""
        document = {
            "$id": "http://example.com/root",
            "type": "object",
            "$defs": {"n": {"type": "integer"}},
            "properties": {
                "a": {"$id": "inner", "$defs": {"m": {"type": "integer"}}, "$ref": "#/$defs/m"},
                "b": {"$id": "other", "$defs": {"n": {"type": "string", "maxLength": 2}}, "$ref": "#/$defs/n"},
            },
        }
        schema = Schema(document)
        self.assertIsNone(schema.explain({"a": 1, "b": "xy"}))
        for payload, path in (({"a": "x"}, "/payload/a"), ({"b": "xyz"}, "/payload/b")):
            error = self.assertRaises(BadPayload, schema.check, payload)
            self.assertEqual(error.details["path"], path)
            self.assertNotIn("integer", error.message)

    def test_an_explanation_that_fails(self) -> None:
        """A refused value stays refused if its explanation fails."""
        schema = Schema({"type": "object", "properties": {"a": {"type": "integer"}}})
        schema.document = {"properties": None}
        error = self.assertRaises(BadPayload, schema.check, {"a": "x"})
        self.assertIn("breaks its schema", error.message)


_NAMES = [f"{number:x}" for number in range(6000)]
_OBJECT = dict.fromkeys(_NAMES, 1)
_SOME = dict.fromkeys(_NAMES[:900], 1)
_ONES = [1] * 32_000
_LONGEST = [2**53 - 1] * 3_700


def _refuses(part: dict[str, Any]) -> dict[str, Any]:
    return {"items": {"not": part}}


#: By keyword, parts of a schema and for each the payload of 64 KiB with which it takes longest. All are valid.
_PAYLOADS: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "multipleOf": [
        ({"items": {"multipleOf": 7}}, [-7] * 21_000),
        (_refuses({"multipleOf": 10**19}), _LONGEST),
        *((_refuses({"multipleOf": number}), _ONES) for number in (1e18, 1e300, 1.5, 0.3, 3.1e-9, 3.1e-18, 3.1e-20)),
        *((_refuses({"multipleOf": number}), _LONGEST) for number in (1.3, 0.3, 3.1e-18, 3.1e-20)),
    ],
    **{
        word: [
            (_refuses({word: sign * number}), payload)
            for number in (2**53, 2**63 - 1, 10**19, 10**30, 1e30, 1e308, 2**53 + 0.5, 2**52 + 0.5)
            for payload in (_ONES, [-1] * 21_000)
        ]
        + [({"items": {word: 0.5}} if sign > 0 else _refuses({word: 0.5}), payload) for payload in (_ONES, _LONGEST)]
        for word, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1))
    },
    "const": [
        *((_refuses({"const": number}), _ONES) for number in (2, 10**19, 10**30, 10**300, 0.5, 1e300, 1e-19)),
        *((_refuses({"const": number}), _LONGEST) for number in (2, 10**19, 10**30, 10**300, 0.5, 1e300, 1e-19)),
        ({"const": "a" * 60_000}, "a" * 60_000),
        ({"not": {"const": "a" * 59_999 + "b"}}, "a" * 60_000),
        ({"const": dict.fromkeys(_NAMES, "")}, dict.fromkeys(_NAMES, "")),
        ({"const": {"a" * 60_000: 1}}, {"a" * 60_000: 1}),
        ({"const": ["a"] * 15_000}, ["a"] * 15_000),
        ({"const": [{}] * 20_000}, [{}] * 20_000),
        ({"items": {"const": {"a": "", "b": ""}}}, [{"a": "", "b": ""}] * 4_000),
    ],
    "enum": [
        (_refuses({"enum": [0.5, 2]}), _ONES),
        (_refuses({"enum": [10**30, 5]}), _LONGEST),
        (_refuses({"enum": [2.0, "x"]}), _ONES),
        (_refuses({"enum": [2, "x"]}), _ONES),
        (_refuses({"enum": [2, 3]}), _ONES),
        ({"enum": ["a" * 64_000, *map(str, range(100))]}, "a" * 64_000),
        (_refuses({"enum": [{"a": 1, "b": 2}, {"c": 5}]}), [{"a": 1, "b": 1}] * 4_000),
    ],
    "required": [
        ({"required": _NAMES}, _OBJECT),
        ({"items": {"required": _NAMES[:200]}}, [dict.fromkeys(_NAMES[:200], 1)] * 45),
        (_refuses({"required": ["a"]}), [{}] * 21_000),
    ],
    "dependentRequired": [
        ({"dependentRequired": {"0": _NAMES}}, _OBJECT),
        ({"dependentRequired": dict.fromkeys(_NAMES[:150], _NAMES[:40])}, _OBJECT),
        ({"items": {"dependentRequired": {"0": _NAMES[:50]}}}, [dict.fromkeys(_NAMES[:50], 1)] * 180),
    ],
    "dependentSchemas": [({"dependentSchemas": {name: {"required": ["0"]} for name in _NAMES[:1000]}}, _OBJECT)],
    "properties": [
        ({"properties": {name: {} for name in _NAMES}}, _OBJECT),
        ({"properties": {f"x{name}": {} for name in _NAMES[:4000]}}, _OBJECT),
        ({"items": {"properties": {f"x{name}": {} for name in _NAMES[:1000]}}}, [{}] * 21_000),
    ],
    "patternProperties": [
        ({"patternProperties": {"^[0-9a-f]*$": {}}, "propertyNames": {"pattern": "[0-9a-f]$"}}, _OBJECT),
        ({"items": {"patternProperties": {"b$": {}}}}, [{"": 1}] * 9_000),
    ],
    "additionalProperties": [({"additionalProperties": {"type": "integer"}}, _OBJECT)],
    "propertyNames": [({"propertyNames": {"maxLength": 9}}, _OBJECT), ({"propertyNames": {"enum": _NAMES}}, _OBJECT)],
    "minProperties": [(_refuses({"minProperties": 2}), [{}] * 21_000)],
    "maxProperties": [({"items": {"maxProperties": 2}}, [{}] * 21_000)],
    "minItems": [(_refuses({"minItems": 2}), [[]] * 21_000)],
    "maxItems": [({"items": {"maxItems": 2}}, [[]] * 21_000)],
    "items": [({"items": {"type": "integer"}}, _ONES)],
    "prefixItems": [({"prefixItems": [{"type": "integer"}] * 3_000, "items": {"type": "integer"}}, _ONES)],
    "contains": [
        ({"contains": {"minimum": 1}, "minContains": 32_000}, _ONES),
        ({"contains": {"minimum": 1}, "maxContains": 32_000}, _ONES),
        ({"contains": {"const": 2}, "minContains": 0}, _ONES),
    ],
    "uniqueItems": [
        ({"uniqueItems": True}, list(range(11_000))),
        ({"items": {"uniqueItems": True}}, [list(range(14))] * 2_000),
        ({"items": {"uniqueItems": True}}, [[{"a": number} for number in range(14)]] * 500),
        ({"uniqueItems": True}, [[1] * 2_000 + [number] for number in range(15)]),
        ({"uniqueItems": True}, [[number] for number in range(8_000)]),
        ({"uniqueItems": True}, ["a" * 4_000 + str(number) for number in range(15)]),
    ],
    "minLength": [({"allOf": [{"minLength": number} for number in range(50)]}, "é" * 32_000)],
    "maxLength": [({"allOf": [{"maxLength": 70_000 + number} for number in range(50)]}, "é" * 32_000)],
    "pattern": [
        ({"pattern": r"^[\p{L}\s]+$"}, "é" * 32_000),
        ({"items": {"pattern": "[ab]$"}}, ["a"] * 16_000),
        ({"items": {"pattern": "^a*$"}}, [""] * 21_000),
    ],
    "format": [
        ({"allOf": [{"format": name}] * 50}, "a" * 65_000)
        for name in ("date-time", "email", "idn-hostname", "ipv6", "uri", "regex", "uri-template", "duration")
    ],
    "type": [({"items": {"type": ["string", "null", "integer"]}}, _ONES)],
    "anyOf": [({"items": {"anyOf": [*[{"type": "null"}] * 20, {}]}}, _ONES)],
    "oneOf": [({"items": {"oneOf": [{"type": "integer"}, *[{"type": "null"}] * 20]}}, _ONES)],
    "allOf": [({"items": {"allOf": [{"type": "integer"}] * 20}}, _ONES)],
    "not": [({"items": {"not": {"type": "null"}}}, _ONES)],
    "if": [({"items": {"if": {"type": "integer"}, "then": {"minimum": 0}, "else": False}}, _ONES)],
    "$ref": [({"$id": "x", "$defs": {"t": {"items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}, [[]] * 21_000)],
    "unevaluatedItems": [
        ({"allOf": [{"contains": {"type": "integer"}}], "unevaluatedItems": False}, _ONES),
        ({"prefixItems": [{}] * 100, "unevaluatedItems": {"type": "integer"}}, _ONES),
    ],
    "unevaluatedProperties": [
        ({"anyOf": [{"properties": {n: {} for n in _NAMES[:900]}}], "unevaluatedProperties": {"type": "null"}}, _SOME),
        ({"anyOf": [{"required": _NAMES[:900]}], "unevaluatedProperties": {"type": "integer"}}, _OBJECT),
        ({"if": {"required": _NAMES[:900]}, "unevaluatedProperties": {"type": "integer"}}, _OBJECT),
    ],
}  # fmt: skip
#: Keywords that only lead to a part, which counts by itself.
_WITHOUT_OWN_WORK = {"$dynamicRef"}


class VetTests(SynchronousTestCase):
    """Schemas that would cost too much, or that would make the validator fetch a document."""

    def test_an_explanation_is_bounded(self) -> None:
        """A refusal is explained soon and with its path, where other validators search for minutes or years."""
        for name, (document, value, path) in _DEAR.items():
            with self.subTest(name=name):
                # In a separate process, because a search in C cannot be interrupted.
                done = subprocess.run(
                    [sys.executable, "-c", _EXPLAIN, json.dumps(document), value],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=True,
                )
                told, sentence = done.stdout.splitlines()
                self.assertEqual(told, path)
                self.assertRegex(sentence, "must satisfy (pattern|uniqueItems|enum|anyOf) ")

    def test_a_long_way_ends(self) -> None:
        """An explanation that takes too many steps names the path that it reached."""
        schema = Schema({"properties": {"a": {"allOf": [{}] * 30 + [{"allOf": [{}] * 40 + [False]}]}}})
        self.assertEqual(schema.explain({"a": 1}), ("/payload/a", "the value breaks its schema"))

    def test_nothing_is_fetched(self) -> None:
        """A reference or dialect outside the document is refused in a line that names it; no connection is made."""
        with socket.create_server(("127.0.0.1", 0)) as canary:
            canary.setblocking(False)
            url = f"http://127.0.0.1:{canary.getsockname()[1]}/x"
            for document in (
                {"$ref": url},
                {"$dynamicRef": url + "#n"},
                {"$schema": url},
                {"$id": url, "$ref": "y"},
                {"properties": {"a": {"items": {"$ref": url}}}},
                {"$defs": {"unused": {"$ref": url}}},
                {"definitions": {"unused": {"$ref": url}}},
                {"$defs": {"part": {"$id": "part", "$schema": url}}},
                {"unknown": {"a": {"$ref": url}}, "$ref": "#/unknown/a"},
            ):
                with self.subTest(document=document):
                    told = str(self.assertRaises(OperatorError, Schema, document))
                    self.assertRegex(told, r"\A[^\n]*(refers to|has \"\$schema\")[^\n]*: (put|write) [^\n]*\Z")
            Schema({"$vocabulary": {url: True}, "const": {"$ref": url}, "examples": [{"$ref": url}]})
            self.assertRaises(BlockingIOError, canary.accept)
        for reference in ("file:///etc/hostname", "other.json", "#/nowhere", "#nobody", "urn:x:y", "http://[", "//a/b"):
            with self.subTest(reference=reference):
                self.assertRaises(OperatorError, Schema, {"$ref": reference})

    def test_references_inside(self) -> None:
        """Each spelling of a reference within the document works, and a refusal by it is explained."""
        number = {"type": "integer"}
        for document in (
            {"$ref": "#/$defs/n", "$defs": {"n": number}},
            {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": number}},
            {"$ref": "#n", "$defs": {"n": {"$anchor": "n", **number}}},
            {"$id": "http://127.0.0.1:1/x", "$ref": "http://127.0.0.1:1/x#/$defs/n", "$defs": {"n": number}},
            {"$id": "http://127.0.0.1:1/x", "$ref": "part", "$defs": {"n": {"$id": "part", **number}}},
            {"$schema": "https://json-schema.org/draft/2020-12/schema#", **number},
        ):
            with self.subTest(document=document):
                schema = Schema(document)
                self.assertTrue(schema.is_valid(1))
                path, sentence = schema.explain("x") or ("", "")
                self.assertEqual(path, "/payload")
                self.assertRegex(sentence, "must satisfy (type|\\$ref) ")

    def test_what_could_blow_up_is_refused(self) -> None:
        """A schema that could take long for a payload is refused when it is loaded, in a line with a remedy."""
        doubling: dict[str, Any] = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}
        for document, cure in (
            ({"properties": {"a": {"pattern": r"^(a)\1$"}}}, "/properties/a/pattern .*write it without"),
            ({"patternProperties": {"(?=a)b": {}}}, "/patternProperties/.*write it without"),
            ({"pattern": "^.{1,400}$"}, "/pattern .*by maxLength"),
            ({"pattern": "^.{0,9}a.{4000}$"}, "with maxLength"),
            ({"pattern": "^(?:a?b?){900}|c$"}, "with maxLength"),
            *(
                ({"allOf": [{"pattern": f"[ab]*a({name}[ab]{{300}})"}] * 20}, "maxLength")
                for name in ("", "?:", "?i:", "?<x>", "?P<x>")
            ),
            ({"items": {"anyOf": _MANY}}, "maxItems"),
            ({"additionalProperties": {"oneOf": _MANY}}, "maxProperties"),
            ({"items": {"enum": [[n] for n in range(200)]}}, "maxItems"),
            ({"anyOf": [{"contains": each} for each in _MANY]}, "maxItems"),
            ({"items": {"dependentRequired": {f"p{n}": [] for n in range(200)}}}, "maxItems"),
            ({"allOf": [{"pattern": f"a{n}"} for n in range(200)]}, "maxLength"),
            ({"patternProperties": {f"a{n}": {} for n in range(200)}}, "fewer alternatives"),
            ({"allOf": [{"properties": {"a": {"items": {"anyOf": _MANY[:9]}}}}] * 9}, "maxItems"),
            ({"allOf": [{"patternProperties": {"a": {}}}] * 90, "unevaluatedProperties": False}, "fewer"),
            (
                {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": _MANY, "properties": {"a": {"$ref": "#/$defs/n"}}}}},
                "maxItems",
            ),
            ({"$ref": "#/$defs/d0", "$defs": {**doubling, "d30": {}}}, "fewer alternatives"),
            (_behind(55, {"properties": {"x": {"anyOf": _DEAR_TEXTS}}}), "#/\\$defs/d0/properties/x/anyOf/0: .*begin "),
            (_behind(60, {"items": {"enum": [{"a": n} for n in range(40)]}}), "#/\\$defs/d0/items: .*maxItems"),
            ({"properties": {"a": {"items": {"enum": [*range(200), "x"]}}}}, "#/properties/a/items: .*maxItems"),
            ({"items": {"anyOf": [{"enum": [n]} for n in range(50)]}}, "#/items: .*maxItems"),
            ({"allOf": [{"$ref": "#/$defs/m"}] * 60, "$defs": {"m": {"const": [0] * 9000}}}, "fewer alternatives"),
            ({"allOf": [{"contains": {"const": n}} for n in range(20)], "unevaluatedItems": False}, "fewer"),
            (_unevaluated(20), "fewer alternatives"),
            (
                {"properties": {f"p{n}": {"$ref": "#/$defs/t"} for n in range(1000)}, "$defs": _MILLION},
                "fewer alternatives",
            ),
            (
                {"type": "array", "items": {"not": {"anyOf": [{"multipleOf": (n + 22) * 1e-19} for n in range(100)]}}},
                "#/items/not: .*maxItems",
            ),
            ({"items": {"anyOf": [{"minimum": n + 0.5} for n in range(9)]}}, "#/items: .*maxItems"),
            (_doubled(13, {"required": _NAMES}), "fewer alternatives"),
            (_doubled(13, {"dependentRequired": {"0": _NAMES}}), "fewer alternatives"),
            (_doubled(15, {"const": "x" * 60_000}), "fewer alternatives"),
            (_doubled(13, {"const": dict.fromkeys(_NAMES[:3000], "")}), "fewer alternatives"),
            ({"$ref": "#"}, "from a member or item"),
            ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "from a member or item"),
            ({"const": "x" * 70_000}, "make it smaller"),
            (_nested(3000), "make it flatter"),
            (_nested(150), "make it flatter"),
        ):
            with self.subTest(cure=cure, words=list(document)):
                told = str(self.assertRaises(OperatorError, Schema, document))
                self.assertRegex(told, cure)
                self.assertNotIn("\n", told)

    def test_what_is_bounded_is_taken(self) -> None:
        """The same keywords are accepted where they apply to few values, and where they are cheap."""
        for document in (
            {"properties": {"a": {"anyOf": _MANY}}},
            {"items": {"anyOf": _MANY}, "maxItems": 100},
            {"items": {"anyOf": _MANY}, "maxItems": 100.0},
            {"additionalProperties": {"oneOf": _MANY}, "maxProperties": 100},
            {"items": {"enum": [f"x{n}" for n in range(5000)]}},
            {"items": {"oneOf": [{"properties": {"kind": each}, "required": ["kind"]} for each in _MANY[:20]]}},
            {"properties": {f"p{n}": {"pattern": "^[A-Za-z0-9_.-]{1,200}$"} for n in range(500)}},
            {"allOf": [{"pattern": f"a{n}", "maxLength": 100} for n in range(200)]},
            {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}},
            {"pattern": "[ab]*a[ab]{300}[cd]", "maxLength": 1000},
            _RICH,
        ):
            with self.subTest(document=str(document)[:80]):
                Schema(document)

    def test_the_dearest_that_is_taken(self) -> None:
        """No payload of 64 KiB takes long to accept or to refuse with any schema that is accepted."""
        numbers, text = [1] * 32_000, "".join(Random(1).choices("ab", k=65_000))
        for part, payload in (
            ({"items": {"anyOf": [{"type": "null"}, {"minimum": 0}]}}, numbers),
            ({"items": {"anyOf": [{"enum": [7]}, {}]}}, numbers),
            ({"items": {"anyOf": [{"const": [1, 2]}, {}]}}, [[1, 2]] * 10_000),
            ({"contains": {"const": 7}, "minContains": 0, "unevaluatedItems": True}, numbers),
            ({"not": {"items": {"enum": [{"a": 2}, "x", {"a": 1}]}}}, [*[{"a": 1}] * 8000, 0]),
            ({"items": {"enum": [*range(2, 5), "x", 1]}}, numbers),
            ({"patternProperties": {"[ab]a[0-9]*$": {}}, "propertyNames": {}}, {f"a{n}": n for n in range(5000)}),
            ({"not": {"pattern": r"^\S+a\S{3}[cd]$"}}, text),
            ({"not": {"pattern": "[ab]*a[ab]{40}[cd]"}}, text),
        ):
            with self.subTest(part=part):
                schema = _as_often_as_may_be(part)
                start = thread_time()
                schema.is_valid(payload)
                # The documented bound is 0.1 s, on a machine of usual speed.
                self.assertLess(thread_time() - start, 0.25)

    def test_each_keyword_is_weighed(self) -> None:
        """No keyword takes much longer for a step than a comparison of two numbers does on the same machine."""
        self.assertEqual(set(Draft202012Validator.VALIDATORS) - _PAYLOADS.keys(), _WITHOUT_OWN_WORK)
        reference = _ns_a_step({"items": {"not": {"anyOf": [{"const": 0}] * 10}}}, [1] * 32_000)
        for word, cases in _PAYLOADS.items():
            for part, payload in cases:
                with self.subTest(word, part=str(part)[:80]):
                    # Up to twice the reference was measured. Without its weight, a case takes 5 times and more.
                    self.assertLess(_ns_a_step(part, payload), 4 * reference)

    def test_extreme_numbers(self) -> None:
        """A schema with a number that takes long to compare is refused in a line that names the number."""
        for word in ("multipleOf", "minimum", "exclusiveMaximum", "const"):
            for number in (1e-300, 5e-324, 10**309):
                with self.subTest(word, number=number):
                    told = str(self.assertRaises(OperatorError, Schema, {"items": {word: number}}))
                    self.assertRegex(told, r"\A[^\n]* has the number (1e-300|5e-324|1000)[^\n]*use no fraction[^\n]*\Z")
        for document in ({"enum": ["x", {"a": [1e-300]}]}, {"const": {"a": -1e-300}}, {"minimum": -(10**309)}):
            self.assertRaises(OperatorError, Schema, document)
        self.assertIn("as JSON", str(self.assertRaises(OperatorError, Schema, {"minimum": 10**5000})))
        Schema({"items": {"minimum": -1.7976931348623157e308, "maximum": 2**64, "multipleOf": 0.01}})

    def test_an_explanation_has_an_end(self) -> None:
        """An explanation whose steps each take long ends within a bounded time and names the path that it reached."""
        looks = [{"contains": {"const": n}, "minContains": 0} for n in range(8)]
        part: dict[str, Any] = {"allOf": [*looks, {"maxItems": 9}]}
        for _ in range(45):
            part = {"allOf": [part]}
        schema = Schema({"properties": {"a": part}})
        start = thread_time()
        self.assertEqual(schema.explain({"a": [-1] * 32_000}), ("/payload/a", "the value breaks its schema"))
        self.assertLess(thread_time() - start, 1)

    def test_a_schema_is_copied(self) -> None:
        """A later change of the author's document does not change the schema."""
        document: dict[str, Any] = {"properties": {"a": {"type": "integer"}}}
        schema = Schema(document)
        document["properties"]["a"] = {"$ref": "#/nowhere"}
        self.assertEqual(schema.explain({"a": "x"}), ("/payload/a", 'must satisfy type "integer"'))


def _nested(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels):
        document = {"not": document}
    return document


def _behind(levels: int, part: dict[str, Any]) -> dict[str, Any]:
    parts = {f"d{n}": {"$ref": f"#/$defs/d{n - 1}"} for n in range(1, levels)}
    return {"$ref": f"#/$defs/d{levels - 1}", "$defs": {"d0": part, **parts}}


def _as_often_as_may_be(part: dict[str, Any]) -> Schema:
    for times in range(99, 0, -1):
        with contextlib.suppress(OperatorError):
            return Schema({"allOf": [{"$ref": "#/$defs/part"}] * times, "$defs": {"part": part}})
    raise AssertionError("it is not taken once")


def _doubled(levels: int, part: dict[str, Any]) -> dict[str, Any]:
    parts = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n - 1}"}] * 2} for n in range(1, levels)}
    return {"$ref": f"#/$defs/d{levels - 1}", "$defs": {"d0": part, **parts}}


def _unevaluated(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels):
        document = {"allOf": [document], "unevaluatedProperties": {"type": "integer"}}
    return document


def _ns_a_step(part: dict[str, Any], payload: Any) -> float:
    """Return the CPU time of a validation for each step of the estimate: the least of several runs."""
    # Enough copies of a cheap part that the call itself, of some microseconds, does not count.
    copies = max(1, min(1000, 200_000 // _steps(part)))
    document = {"allOf": [{"$ref": "#/$defs/part"}] * copies, "$defs": {"part": part}}
    validate = _compile(document).is_valid
    assert validate(payload), "the validator would stop early"
    times = []
    for _ in range(3):
        start = thread_time()
        validate(payload)
        times.append(thread_time() - start)
    return min(times) / _steps(document) * 1e9


def _steps(document: dict[str, Any]) -> int:
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(document))
    with mock.patch.object(vet_module, "MAX_WORK", 10**15):
        return vet_module._Work(resolver)._count(document, resolver, 1)


_PUSH = {"cmd_type": "a.b", "idem_key": "k", "payload": {}}
_LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # type: (a good payload, members that are good too, members that are not)
    "s2s.health.check": ({}, {}, {"a": [1]}),
    "s2s.engine.shutdown": (
        {"reason": "r"},
        {"grace_ms": [0, 600000], "reason": ["x" * 200, "é" * 200, "😀" * 200]},
        {"grace_ms": [-1, 600001, True, None, "5"], "reason": ["", "x" * 201, "😀" * 201, None, ...]},
    ),
    "s2s.engine.pause": ({"reason": "r"}, {}, {"reason": ["", "x" * 201, ...]}),
    "s2s.engine.resume": ({"reason": "r"}, {}, {"reason": ["", "x" * 201, ...]}),
    "s2s.broadcast.sweep": ({"since_ts": 0}, {"since_ts": [2**53 - 1]}, {"since_ts": [-1, True, "0", None, ...]}),
    "s2s.config.bump": ({"version": 0}, {"version": [2**53 - 1]}, {"version": [-1, True, ...]}),
    "s2s.command.push": (
        _PUSH,
        {
            "cmd_type": ["a", "a" * 64, "z9_."],
            "idem_key": [" ", "~" * 200],
            "priority": [0, 1000],
            "due_at": [0, 4102444800],
        },
        {
            "cmd_type": ["", "a" * 65, "A", "9a", "_a", "a-b", "a\n", "é", 1, ...],
            "idem_key": ["", "x" * 201, "é", "a\n", "\x7f", "\x1f", 1, ...],
            "payload": [[], None, "{}", ...],
            "priority": [-1, 1001, True, None],
            "due_at": [-1, 4102444801, None, False],
        },
    ),
    "admin.engine.force_tick.v1": (
        {"order_id": "o", "job_type": "decay"},
        {"order_id": ["x" * 64]},
        {"order_id": ["", "x" * 65, "a b", "a\n", ...], "job_type": ["", "A", "a" * 65, ...]},
    ),
    "admin.config.set.v1": (
        {"order_id": "o", "key": "k", "value": 1},
        {"value": ["", "text", True, -(2**53) + 1, 2**53 - 1]},
        {"value": [None, [], {}, ...], "key": ["", "k" * 201, ...]},
    ),
    "world.set_sector_status.v1": (
        {"order_id": "o", "sector_id": 1, "status": "neutral"},
        {"status": ["fedspace", "port_closed"], "sector_id": [2**53 - 1]},
        {"status": ["", "closed", None, ...], "sector_id": [0, -1, True, "1", ...]},
    ),
    "admin.player.update_all_ships.v1": (
        {"order_id": "o", "update_field": "turns", "new_value": 1, "reason": "r"},
        {"update_field": ["fuel", "shields", "hold_capacity"], "new_value": [-(2**53) + 1, 2**53 - 1]},
        {"update_field": ["name", None, ...], "new_value": [True, "1", None, ...], "reason": ["", ...]},
    ),
}


class CatalogueTests(SynchronousTestCase):
    """:data:`MESSAGES` against the protocol's table."""

    def test_the_table(self) -> None:
        """Directions, replies, proof, replay cache and window are those of the protocol's catalogue."""
        told = {
            each.name: (each.sent_by, each.reply, each.control, each.entered, each.windowed)
            for each in CATALOGUE.values()
        }
        control = (("server",), "s2s.ack", True, True, True)
        expected = dict.fromkeys(_LIMITS, control)
        expected["s2s.health.check"] = (("engine", "server"), "s2s.health.ack", False, True, False)
        expected["s2s.command.push"] = (("engine",), "s2s.ack", False, False, True)
        self.assertEqual(told, expected)
        self.assertEqual(REPLY_ONLY, {"s2s.ack", "s2s.health.ack", "s2s.error"})

    def test_limits(self) -> None:
        """Every bound of the catalogue is enforced exactly, and a refusal names the member."""
        for name, (good, also, wrong) in _LIMITS.items():
            schema = CATALOGUE[name].request_schema
            schema.check(good)
            for member, values in also.items():
                for value in values:
                    with self.subTest(type=name, member=member, value=value):
                        schema.check({**good, member: value})
            for member, values in wrong.items():
                for value in values:
                    with self.subTest(type=name, member=member, value=value):
                        payload = {**good, member: value}
                        if value is ...:
                            del payload[member]
                        error = self.assertRaises(BadPayload, schema.check, payload)
                        self.assertEqual(error.details["path"], f"/payload/{member}")

    def test_refusals_quote_nothing(self) -> None:
        """The sentence about a refused member contains nothing of its value."""
        error = self.assertRaises(
            BadPayload, CATALOGUE["s2s.command.push"].request_schema.check, {**_PUSH, "idem_key": "§geheim"}
        )
        self.assertNotIn("geheim", error.message)

    def test_nothing_is_quoted_in_full(self) -> None:
        """A long name of an unknown member is truncated."""
        error = self.assertRaises(BadPayload, CATALOGUE["s2s.health.check"].request_schema.check, {"x" * 50000: 1})
        self.assertLess(len(canonical.dumps(error.payload())), 400)
