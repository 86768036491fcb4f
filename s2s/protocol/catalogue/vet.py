"""Judging a JSON Schema before it judges payloads: it stands alone, and its answer costs little on any payload.

A payload is judged in the reactor's thread, so the work of one answer is bounded here, when the schema is loaded. The
unit of work is a step: one keyword of one part of the schema meets one value. A part counts as often as references and
alternatives lead to it. The bound holds for the worst payload of 64 KiB.
"""

from __future__ import annotations

import json
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
#: Characters of a schema as JSON. A larger one takes seconds to check and compile.
MAX_SIZE: Final = 65_536
#: Levels of nesting, in the JSON and along references. The compiler of jsonschema-rs refuses about 250.
MAX_DEPTH: Final = 100
#: Values in a payload of 64 KiB, each of which takes two bytes at least, and its characters.
_VALUES: Final = 32_768
_CHARACTERS: Final = 65_536
#: Steps for one payload: 300 for each of its values. They take less than 100 ms in the worst schemas and payloads that
#: random search found, at 9 ns a step, and 5 ms in most.
MAX_WORK: Final = 300 * _VALUES
#: Steps to compare two numbers: 150 to 220 ns.
_NUMBER: Final = 20
#: Steps per value to find one twice.
_UNIQUE: Final = 10
#: Bytes of a member beside its name, in the object that it stands in.
_MEMBER: Final = 5

_IN_PLACE: Final = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
_OF_ITEMS: Final = ("items", "contains", "unevaluatedItems")
_OF_MEMBERS: Final = ("patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties")
_Resolver = Any


def vet(document: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a schema that is none, that needs another document, or whose answer may take long.

    :returns: a copy that no other code can change, of plain JSON.
    :raises jsonschema.exceptions.SchemaError: it is no schema.
    :raises OperatorError: it is one that we do not take; the text names the place and the cure.
    """
    deep = OperatorError(f"its schema is nested deeper than {MAX_DEPTH} levels: make it flatter")
    try:
        text = json.dumps(document)
    except RecursionError:
        raise deep from None
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
    """Refuse what is no JSON Schema, in the words of ``jsonschema``.

    :param is_compiled: whether ``jsonschema-rs``, which is ten times as fast, is asked first.
    :raises jsonschema.exceptions.SchemaError: with a sentence about the first fault.
    """
    # Without $schema: the dialect that it names would be fetched.
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
    """Resolve every reference without any retrieval, so that nothing is ever fetched for it."""
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
    except (Unresolvable, ValueError):  # ValueError: no URI
        said = json.dumps(reference)[:80]
        raise OperatorError(
            f"its schema refers to {said}, which is not in it, and nothing is fetched: put that part under $defs and "
            "write #/$defs/NAME"
        ) from None


def _pointer(document: Any, part: Any) -> str:
    """Return the pointer to a part of a document, which is the same object."""
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
    """A part of the schema that takes too much work by itself, and none inside it does."""

    def __init__(self, part: Any) -> None:
        self.part = part


class _Work:
    """Counts the steps that a schema may need for one payload.

    A recursive schema counts once for every value: jsonschema-rs remembers the answer of a recursive part for a value.
    """

    def __init__(self, root: _Resolver) -> None:
        self._root = root
        self._known: dict[tuple[int, int], int] = {}
        #: The parts that are being counted, with the number of members or items entered on the way to each.
        self._open: dict[int, int] = {}
        self._recursive: set[int] = set()
        self._entered = 0
        #: Counts that are going on for more values than there may be.
        self._supposed = 0

    def too_much(self, schema: Any) -> Any:
        """Return the part that takes more than :data:`MAX_WORK` for the worst payload, or ``None``."""
        try:
            self._count(schema, self._root, 1)
            if self._recursive:
                # A part that recurs meets every value, also where the first way to it meets one.
                self._known.clear()
                self._count(schema, self._root, 1)
        except _TooMuch as found:
            return found.part
        return None

    def _count(self, schema: Any, resolver: _Resolver, values: int) -> int:
        """Count for one part.

        :param values: how many values it may meet.
        """
        if not isinstance(schema, Mapping):
            return values
        part = id(schema)
        if part in self._open:
            if self._open[part] == self._entered:
                raise OperatorError("its schema refers to itself for the same value: refer to it from a member or item")
            self._recursive.add(part)
            return 0
        # Up to a power of two, so that a part is counted for few different numbers.
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
        options = schema.get("enum", ())
        if len(options) == 1 or {type(each) for each in options} not in ({str}, {int}):
            # Several strings alone, or integers alone, are hashed; other values are compared one by one.
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
            # For each member the parts beside are asked again whether they know it.
            work += sum(self._count(part, base, _VALUES) for part, base in in_place)
        return work + max(of_items, of_members)

    def _named(self, parts: Mapping[str, Any], resolver: _Resolver, objects: int) -> int:
        """Count for the members that have names of their own: they share the payload, and the dearest come first."""
        counted = []
        for name, part in parts.items():
            self._supposed += 1
            all_of_it = self._count(part, resolver, _VALUES)
            self._supposed -= 1
            # One of each name in an object.
            counted.append((all_of_it, self._count(part, resolver, min(objects, _CHARACTERS // (len(name) + _MEMBER)))))
        work, left = 0.0, 1.0
        for all_of_it, most in sorted(counted, reverse=True):
            if all_of_it:
                share = min(left, most / all_of_it)
                work += share * all_of_it
                left -= share
        return int(work)


def _bounded(schema: Mapping[str, Any], word: str, values: int, most: int) -> int:
    # A bound may be written as 10.0.
    return min(most, values * int(schema.get(word, most)))


def _comparison(value: Any, values: int) -> int:
    """Return the steps to compare some values with one of the schema."""
    return min(values * _weight(value), _VALUES * _NUMBER)


def _weight(value: Any) -> int:
    if isinstance(value, (dict, list)):
        return 1 + sum(map(_weight, value.values() if isinstance(value, dict) else value))
    return _NUMBER if type(value) in (int, float) else 1


def _inner(schema: Mapping[str, Any], words: tuple[str, ...], resolver: _Resolver) -> Iterator[tuple[Any, _Resolver]]:
    """Yield the parts under some keywords, each with the resolver of its place."""
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
