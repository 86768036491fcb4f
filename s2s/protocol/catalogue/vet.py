"""Checks on a JSON Schema before use: it needs no other document, and validates any payload at a bounded cost.

Payloads are validated in the reactor's thread, so the work for one payload is bounded here, when the schema is loaded.
The unit of work is a step: one keyword of one part of the schema is applied to one value. A part counts once for each
reference or alternative that leads to it. The bound holds for the most expensive payload of 64 KiB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jsonschema_rs
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from s2s.errors import OperatorError
from s2s.protocol.catalogue import pattern

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
#: Maximum characters of a schema as JSON. A larger schema takes seconds to check and compile.
MAX_SIZE: Final = 65_536
#: Maximum levels of nesting, in the JSON and along references. The compiler of jsonschema-rs refuses about 250.
MAX_DEPTH: Final = 100
#: Maximum values in a payload of 64 KiB, at two bytes or more for each value, and maximum characters in the payload.
_VALUES: Final = 32_768
_CHARACTERS: Final = 65_536
#: Maximum steps for one payload: 300 for each of its values. They take less than 100 ms (9 ns a step) with the worst
#: schemas and payloads that a random search found, and 5 ms with most.
MAX_WORK: Final = 300 * _VALUES
#: Steps to compare a value with one number of the schema (``const``, ``enum``): a number of 64 bits, and any other
#: number. A payload contains only integers, of at most 53 bits.
_NUMBER: Final = 20
_OTHER_NUMBER: Final = 100
#: Steps to compare a value with a bound (``minimum`` and so on): an integer of 64 bits, another integer, a fraction.
_BOUND: Final = 5
_LARGE_BOUND: Final = 30
_FRACTION: Final = 40
#: Steps to divide a value by a fraction (``multipleOf``).
_DIVISION: Final = 200
#: A long integer needs up to this many times the steps of a short one, of which a payload can hold more.
_LONG: Final = 10
#: The smallest fraction. jsonschema-rs computes with exact fractions: one of 1e-300 takes 10 times as long.
_LEAST: Final = 1e-20
#: The largest integer, which is also the largest of a double. To compare an integer with more digits takes longer.
_MOST: Final = int(sys.float_info.max)
#: Steps to look up one name in an object, and to compare one member of two objects.
_LOOKUP: Final = 2
_MEMBER_COMPARED: Final = 12
#: Characters that are compared or hashed in one step.
_CHARACTERS_A_STEP: Final = 100
#: Steps per value to find duplicates (``uniqueItems``). Up to 15 items are compared pair by pair.
_UNIQUE: Final = 35
#: Minimum bytes of a member of an object, not counting its name.
_MEMBER: Final = 5

_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_IN_PLACE: Final = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
_OF_ITEMS: Final = ("items", "contains", "unevaluatedItems")
_OF_MEMBERS: Final = ("patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties")
_Resolver = Any


def vet(document: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a document that is not a JSON Schema, needs another document, or may take too long to validate a payload.

    :returns: a copy as plain JSON, to which no other code has a reference.
    :raises jsonschema.exceptions.SchemaError: the document is not a JSON Schema.
    :raises OperatorError: the schema is refused for another reason; the text names the place and the remedy.
    """
    deep = OperatorError(f"its schema is nested deeper than {MAX_DEPTH} levels: make it flatter")
    try:
        text = json.dumps(document)
    except RecursionError:
        raise deep from None
    except ValueError as error:  # above all an integer of more than 4300 digits
        raise OperatorError(f"its schema cannot be written as JSON: {error}") from None
    if len(text) > MAX_SIZE:
        raise OperatorError(f"its schema has {len(text)} characters, and {MAX_SIZE} are allowed: make it smaller")
    if _depth(document) > MAX_DEPTH:
        raise deep
    copy: dict[str, Any] = json.loads(text)
    check_words(copy)
    root = DRAFT202012.create_resource(copy)
    resolver = Registry().resolver_with_root(root)
    _check_references(root, resolver)
    dear = _Work(resolver).too_much(copy)
    if dear is not None:
        raise OperatorError(
            f"its schema may take too long for one payload, because of its part #{_pointer(copy, dear)[:120]}: bound "
            "its arrays with maxItems, its objects with maxProperties, its strings with maxLength, or use fewer "
            "alternatives, and patterns that are shorter and begin with ^"
        )
    return copy


def check_words(document: Mapping[str, Any], is_compiled: bool = True) -> None:
    """Refuse a document that is not a JSON Schema, with the error of ``jsonschema``.

    :param is_compiled: whether to check with ``jsonschema-rs`` first, which is ten times as fast.
    :raises jsonschema.exceptions.SchemaError: the document is not a JSON Schema; the text describes the first fault.
    """
    # The document's own $schema is replaced, because the dialect that it names would be fetched.
    if not is_compiled or not jsonschema_rs.meta.is_valid({**document, "$schema": DIALECT}):
        Draft202012Validator.check_schema(document)


def _depth(document: Any) -> int:
    depth, level = 0, [document]
    while level:
        depth += 1
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(inner, (Mapping, list, tuple))
        ]
    return depth


def _check_references(schema: Resource[Any], resolver: _Resolver) -> None:
    """Refuse a reference that leads outside the document, so that nothing is ever fetched for it."""
    rules = schema.contents
    if not isinstance(rules, Mapping):
        return
    dialect = rules.get("$schema", DIALECT)
    if dialect not in (DIALECT, DIALECT + "#"):
        raise OperatorError(f'its schema has "$schema": {json.dumps(dialect)[:80]}: write {DIALECT}')
    for word in ("$ref", "$dynamicRef"):
        if word in rules:
            _resolve(rules[word], resolver)
    for each in schema.subresources():
        inner = DRAFT202012.create_resource(each.contents)
        _check_references(inner, resolver.in_subresource(inner))


def _resolve(reference: str, resolver: _Resolver) -> Any:
    try:
        return resolver.lookup(reference)
    except (Unresolvable, ValueError):  # ValueError: the reference is not a URI
        said = json.dumps(reference)[:80]
        raise OperatorError(
            f"its schema refers to {said}, which is not in it, and nothing is fetched: put that part under $defs and "
            "write #/$defs/NAME"
        ) from None


def _pointer(document: Any, part: Any) -> str:
    """Return the pointer to a part of a document, which is found by object identity."""
    level = [("", document)]
    while level:
        for at, value in level:
            if value is part:
                return at
        level = [
            (f"{at}/{str(name).replace('~', '~0').replace('/', '~1')}", inner)
            for at, value in level
            for name, inner in (value.items() if isinstance(value, Mapping) else enumerate(value))
            if isinstance(inner, (Mapping, list))
        ]
    return ""


class _TooMuch(Exception):
    """A part of the schema takes too much work, and no part inside it does."""

    def __init__(self, part: Any) -> None:
        self.part = part


class _Work:
    """A counter of the steps that a schema may need for one payload.

    A recursive part counts once for every value, because jsonschema-rs caches the result of a recursive part for a
    value.
    """

    def __init__(self, root: _Resolver) -> None:
        self._root = root
        self._known: dict[tuple[int, int], int] = {}
        #: The parts that are being counted, each with the number of members or items entered on the path to it.
        self._open: dict[int, int] = {}
        self._recursive: set[int] = set()
        self._entered = 0
        #: The number of running counts that assume more values than a payload can have.
        self._supposed = 0

    def too_much(self, schema: Any) -> Any:
        """Return the part that takes more than :data:`MAX_WORK` for the most expensive payload, or ``None``."""
        try:
            self._count(schema, self._root, 1)
            if self._recursive:
                # A recursive part may be applied to every value, even if the first path to it leads to one value only.
                self._known.clear()
                self._count(schema, self._root, 1)
        except _TooMuch as found:
            return found.part
        return None

    def _count(self, schema: Any, resolver: _Resolver, values: int) -> int:
        """Count the steps of one part.

        :param values: the maximum number of values that the part is applied to.
        """
        if not isinstance(schema, Mapping):
            return values
        part = id(schema)
        if part in self._open:
            if self._open[part] == self._entered:
                raise OperatorError("its schema refers to itself for the same value: refer to it from a member or item")
            self._recursive.add(part)
            return 0
        # The number is rounded up to a power of two, so that a part is counted for few different numbers.
        values = _VALUES if part in self._recursive else 1 << (values - 1).bit_length() if values else 0
        if (part, values) not in self._known:
            if len(self._open) > MAX_DEPTH:
                raise OperatorError(f"its references lead deeper than {MAX_DEPTH} levels: make its schema flatter")
            self._open[part] = self._entered
            inside = resolver.in_subresource(DRAFT202012.create_resource(schema))
            self._known[part, values] = self._own(schema, values) + self._parts(schema, inside, values)
            del self._open[part]
        if self._known[part, values] > MAX_WORK and not self._supposed:
            raise _TooMuch(schema)
        return self._known[part, values]

    def _own(self, schema: Mapping[str, Any], values: int) -> int:
        dependents = len(schema.get("dependentRequired", ())) + len(schema.get("dependentSchemas", ()))
        work = values * (1 + len(schema) + 2 * dependents)
        # An object has at most the names of the payload; the first name is counted with its keyword.
        for word in ("required", "properties"):
            work += _LOOKUP * min(values * max(0, len(schema.get(word, ())) - 1), _VALUES)
        for names in schema.get("dependentRequired", {}).values():
            work += _LOOKUP * min(values * len(names), _VALUES)
        work += sum(_bound(word, schema[word], values) for word in _BOUNDS if word in schema)
        options = schema.get("enum", ())
        if len(options) > 1 and ({*map(type, options)} == {str} or all(_is_of_64_bits(each) for each in options)):
            # An enum of only strings or only integers, with several options, is a hash lookup. The options of any other
            # enum are compared one by one.
            work += _CHARACTERS // _CHARACTERS_A_STEP
        else:
            work += sum(_comparison(each, values) for each in options)
        if "const" in schema:
            work += _comparison(schema["const"], values)
        if schema.get("uniqueItems"):
            work += _VALUES * _UNIQUE
        if "pattern" in schema:
            work += pattern.steps(schema["pattern"], values, _bounded(schema, "maxLength", values, _CHARACTERS))
        members = _bounded(schema, "maxProperties", values, _VALUES)
        return work + sum(pattern.steps(each, members, _CHARACTERS) for each in schema.get("patternProperties", ()))

    def _parts(self, schema: Mapping[str, Any], resolver: _Resolver, values: int) -> int:
        in_place = list(_inner(schema, _IN_PLACE, resolver))
        work = sum(self._count(part, base, values) for part, base in in_place)
        self._entered += 1
        items = _bounded(schema, "maxItems", values, _VALUES)
        members = _bounded(schema, "maxProperties", values, _VALUES)
        of_items = sum(self._count(part, base, items) for part, base in _inner(schema, _OF_ITEMS, resolver))
        of_items += sum(self._count(part, resolver, values) for part in schema.get("prefixItems", ()))
        of_members = sum(self._count(part, base, members) for part, base in _inner(schema, _OF_MEMBERS, resolver))
        of_members += self._named(schema.get("properties", {}), resolver, values)
        self._entered -= 1
        if "unevaluatedItems" in schema or "unevaluatedProperties" in schema:
            # For each member or item, jsonschema-rs evaluates the adjacent parts again to learn whether they cover it.
            work += sum(self._count(part, base, _VALUES) for part, base in in_place)
        return work + max(of_items, of_members)

    def _named(self, parts: Mapping[str, Any], resolver: _Resolver, objects: int) -> int:
        """Count the steps of ``properties``: its members share the payload; the most expensive count first."""
        counted = []
        for name, part in parts.items():
            self._supposed += 1
            all_of_it = self._count(part, resolver, _VALUES)
            self._supposed -= 1
            # An object has at most one member of each name.
            counted.append((all_of_it, self._count(part, resolver, min(objects, _CHARACTERS // (len(name) + _MEMBER)))))
        work, left = 0.0, 1.0
        for all_of_it, most in sorted(counted, reverse=True):
            if all_of_it:
                share = min(left, most / all_of_it)
                work += share * all_of_it
                left -= share
        return int(work)


def _bounded(schema: Mapping[str, Any], word: str, values: int, most: int) -> int:
    # int(), because a bound may be written as 10.0.
    return min(most, values * int(schema.get(word, most)))


def _bound(word: str, number: float, values: int) -> int:
    """Return the steps to compare a number of values with a bound, or to divide them by it."""
    _check_size(number)
    if number % 1:
        return min(values * _LONG, _VALUES) * (_DIVISION if word == "multipleOf" else _FRACTION)
    return values * (_BOUND if _is_of_64_bits(number) else _LARGE_BOUND)


def _comparison(value: Any, values: int) -> int:
    """Return the steps to compare a number of values with one value of the schema."""
    weight, is_other = _weight(value)
    # Each value of the payload is compared with one value of the schema at most.
    return min(values * weight, _VALUES * (_OTHER_NUMBER if is_other else _NUMBER))


def _weight(value: Any) -> tuple[int, bool]:
    """Return the steps to compare a value, and whether it contains a number that is not of 64 bits."""
    if isinstance(value, dict):
        members = [_weight(each) for each in value.values()]
        weight = sum(_MEMBER_COMPARED + len(name) // _CHARACTERS_A_STEP for name in value)
    elif isinstance(value, list):
        members, weight = [_weight(each) for each in value], 0
    elif isinstance(value, str):
        return 1 + len(value) // _CHARACTERS_A_STEP, False
    elif isinstance(value, bool) or value is None:
        return 1, False
    else:
        _check_size(value)
        return (_NUMBER, False) if _is_of_64_bits(value) else (_LONG * _OTHER_NUMBER, True)
    return 1 + weight + sum(each for each, _ in members), any(is_other for _, is_other in members)


def _is_of_64_bits(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**64


def _check_size(number: float) -> None:
    """Refuse a number with which a comparison takes long.

    :raises OperatorError: it is a fraction that is too small, or an integer with too many digits.
    """
    if 0 < abs(number) < _LEAST or abs(number) > _MOST:
        raise OperatorError(
            f"its schema has the number {str(number)[:40]}: payloads have only integers of 53 bits, so use no fraction "
            f"below {_LEAST:g} and no number above {_MOST:.1e}"
        )


def _inner(schema: Mapping[str, Any], words: tuple[str, ...], resolver: _Resolver) -> Iterator[tuple[Any, _Resolver]]:
    """Yield the parts under the given keywords, each with the resolver for its references."""
    for word in words:
        if word not in schema:
            continue
        value = schema[word]
        if word in ("$ref", "$dynamicRef"):
            found = _resolve(value, resolver)
            yield found.contents, found.resolver
        elif word in ("patternProperties", "dependentSchemas"):
            yield from ((part, resolver) for part in value.values())
        else:
            yield from ((part, resolver) for part in (value if isinstance(value, list) else [value]))
