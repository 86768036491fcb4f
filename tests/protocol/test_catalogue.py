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

from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BadPayload, OperatorError
from s2s.handlers.commands import BUILTIN
from s2s.protocol import canonical
from s2s.protocol.catalogue import ERROR_SCHEMA, REPLY_ONLY
from s2s.protocol.catalogue.schema import Schema, load
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


def _unevaluated(levels: int) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(levels):
        document = {"allOf": [document], "unevaluatedProperties": {"type": "integer"}}
    return document


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
