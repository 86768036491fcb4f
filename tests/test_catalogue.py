"""The catalogue: its table, and that the fast and the explaining validator agree on every schema."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from twisted.trial.unittest import SynchronousTestCase

from s2s import canonical
from s2s.catalogue import BY_NAME, ERROR_SCHEMA, MESSAGES, REPLY_ONLY
from s2s.catalogue.schema import Schema, load
from s2s.commands import BUILTIN
from s2s.errors import BadPayload

_FILES = sorted(each.name for each in (resources.files("s2s.catalogue") / "schemas").iterdir())
_SCHEMAS = {name.removesuffix(".json"): load(name.removesuffix(".json")) for name in _FILES}
_COMMANDS = {f"command {kind.cmd_type}": Schema(kind.schema) for kind in BUILTIN}

_odd = st.sampled_from(
    [None, True, False, 0, -1, 1, "", "a", "A", "a\n", "a b", "é", "\x7f", "~", " ", [], {}, [1], {"a": 1}, 2**53 - 1]
)
_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=3)


def _around(rule: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Draw values at the bounds of one rule of a schema, just beyond them, and quite beside the point."""
    values: list[Any] = [rule["const"]] if "const" in rule else []
    values += rule.get("enum", [])
    for bound in ("minimum", "maximum"):
        if bound in rule:
            # Never beyond what canonical JSON can say: the parser has refused that before.
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
    """Draw a payload that is often good, often nearly, and sometimes nothing of the sort."""
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
    """Draw values of the right type; of an object sometimes the required members alone."""
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


#: Look for any example, not for the smallest.
_ANY = settings(max_examples=5000, phases=[Phase.generate], deadline=None, database=None)


class SchemaTests(SynchronousTestCase):
    """Every schema file, and the schemas of our commands."""

    def test_both_validators_agree(self) -> None:
        """On payloads around the bounds of every schema jsonschema-rs and jsonschema give one answer."""
        for name, schema in {**_SCHEMAS, **_COMMANDS}.items():
            with self.subTest(schema=name):
                self.hold_together(schema)

    def hold_together(self, schema: Schema) -> None:
        """Hold both validators of a schema to one answer, where both answers do occur."""
        exact = Draft202012Validator(schema.document)

        @settings(max_examples=60, deadline=None, database=None)
        @given(_payloads(schema))
        def agree(payload: Any) -> None:
            is_valid = schema.is_valid(payload)
            self.assertEqual(is_valid, exact.is_valid(payload))
            self.assertEqual(schema.explain(payload) is None, is_valid)

        agree()
        for wanted in (True, False):
            payload = find(_payloads(schema), lambda drawn: schema.is_valid(drawn) is wanted, settings=_ANY)  # noqa: B023
            self.assertIs(exact.is_valid(payload), wanted)

    def test_what_is_no_schema(self) -> None:
        """What jsonschema calls no schema is none, and in its words."""
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
        self.assertRaises(ValueError, Schema, {"$ref": "#/nowhere"})

    def test_refusals_can_be_sent(self) -> None:
        """Every refusal has a path below /payload and makes an error that canonical JSON can say."""

        @settings(max_examples=200, deadline=None, database=None)
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
        """Every file is 2020-12, has an id of its own name, and uses no reference, format or look-around."""
        for name in _FILES:
            text = (resources.files("s2s.catalogue") / "schemas" / name).read_text("utf-8")
            document = json.loads(text)
            with self.subTest(file=name):
                self.assertEqual(document["$schema"], "https://json-schema.org/draft/2020-12/schema")
                self.assertEqual(document["$id"], f"urn:s2s:schema:{name.removesuffix('.json')}")
                for word in ('"$ref"', '"format"', "(?", '"$dynamicRef"'):
                    self.assertNotIn(word, text)

    def test_integers_have_bounds(self) -> None:
        """Every integer of every schema is bounded within 2^53 - 1, so that the database can hold it."""
        for name, schema in {**_SCHEMAS, **_COMMANDS}.items():
            for member, rule in schema.document.get("properties", {}).items():
                if "integer" in str(rule.get("type", "")):
                    with self.subTest(schema=name, member=member):
                        self.assertLessEqual(abs(rule["minimum"]), canonical.MAX_INTEGER)
                        self.assertLessEqual(abs(rule["maximum"]), canonical.MAX_INTEGER)

    def test_requests_are_strict_and_replies_tolerant(self) -> None:
        """A request with an unknown member is refused by its name; a reply may say more."""
        for message in MESSAGES:
            with self.subTest(message=message.name):
                self.assertIs(message.request_schema.document["additionalProperties"], False)
                self.assertNotIn("additionalProperties", message.reply_schema.document)
        path, _ = BY_NAME["s2s.health.check"].request_schema.explain({"more/of~it": 1}) or ("", "")
        self.assertEqual(path, "/payload/more~1of~0it")

    def test_defaults_are_valid(self) -> None:
        """A default of a schema is a value that the schema takes."""
        push = BY_NAME["s2s.command.push"].request_schema
        self.assertEqual(push.defaults, {"priority": 100})
        self.assertEqual(BY_NAME["s2s.engine.shutdown"].request_schema.defaults, {"grace_ms": 5000})
        for schema in _SCHEMAS.values():
            for name, value in schema.defaults.items():
                rule = Draft202012Validator(schema.document["properties"][name])
                self.assertTrue(rule.is_valid(value))


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
        """Ways, replies, proof, replay cache and window are as the protocol's catalogue has them."""
        told = {each.name: (each.sent_by, each.reply, each.control, each.entered, each.windowed) for each in MESSAGES}
        control = (("server",), "s2s.ack", True, True, True)
        expected = dict.fromkeys(_LIMITS, control)
        expected["s2s.health.check"] = (("engine", "server"), "s2s.health.ack", False, True, False)
        expected["s2s.command.push"] = (("engine",), "s2s.ack", False, False, True)
        self.assertEqual(told, expected)
        self.assertEqual(REPLY_ONLY, {"s2s.ack", "s2s.health.ack", "s2s.error"})

    def test_limits(self) -> None:
        """Every bound of the catalogue is kept exactly, and a refusal names the member."""
        for name, (good, also, wrong) in _LIMITS.items():
            schema = BY_NAME[name].request_schema
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
        """The sentence about a refused member holds nothing of its value."""
        error = self.assertRaises(
            BadPayload, BY_NAME["s2s.command.push"].request_schema.check, {**_PUSH, "idem_key": "§geheim"}
        )
        self.assertNotIn("geheim", error.message)

    def test_nothing_is_quoted_in_full(self) -> None:
        """An unknown member's name is cut where it gets long."""
        error = self.assertRaises(BadPayload, BY_NAME["s2s.health.check"].request_schema.check, {"x" * 50000: 1})
        self.assertLess(len(canonical.dumps(error.payload())), 400)
