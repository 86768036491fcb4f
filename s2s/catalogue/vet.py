"""Judging a JSON Schema before it judges payloads: it stands alone, and its answer costs little on any payload.

A payload is judged in the reactor's thread, so the work of one answer is bounded here, when the schema is loaded. The
unit of work is one comparison of a value; the bound holds for the worst payload of 64 KiB.
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

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
#: Characters of a schema as JSON. A larger one takes seconds to check and compile.
MAX_SIZE: Final = 65_536
#: Levels of nesting, in the JSON and along references. The compiler of jsonschema-rs refuses about 250.
MAX_DEPTH: Final = 100
#: Values in a payload of 64 KiB, each of which takes two bytes at least, and its characters.
_VALUES: Final = 32_768
_CHARACTERS: Final = 65_536
#: Comparisons for one payload: 50 for each of its values. They take a third of a second at 0.2 microseconds each.
MAX_WORK: Final = 50 * _VALUES

_IN_PLACE: Final = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
_OF_ITEMS: Final = ("prefixItems", "items", "contains", "unevaluatedItems")
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
    if _Work(resolver).of(copy) > MAX_WORK:
        raise OperatorError(
            "its schema may compare the values of one payload too often: bound its arrays with maxItems, its objects "
            "with maxProperties, its strings with maxLength, or use fewer alternatives"
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


class _Work:
    """Counts the comparisons that a schema may need for one payload.

    A recursive schema counts once for every value: jsonschema-rs remembers the answer of a recursive part for a value.
    """

    def __init__(self, root: _Resolver) -> None:
        self._root = root
        self._known: dict[tuple[int, int], int] = {}
        #: The parts that are being counted, with the number of members or items entered on the way to each.
        self._open: dict[int, int] = {}
        self._recursive: set[int] = set()
        self._entered = 0

    def of(self, schema: Any) -> int:
        """Return the comparisons for the worst payload."""
        work = self._count(schema, self._root, 1)
        if self._recursive:
            # A part that recurs meets every value, also where the first way to it meets one.
            self._known.clear()
            work = self._count(schema, self._root, 1)
        return work

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
        if part in self._recursive:
            values = _VALUES
        if (part, values) not in self._known:
            if len(self._open) > MAX_DEPTH:
                raise OperatorError(f"its references lead deeper than {MAX_DEPTH} levels: make its schema flatter")
            self._open[part] = self._entered
            inside = resolver.in_subresource(DRAFT202012.create_resource(schema))
            self._known[part, values] = self._own(schema, values) + self._parts(schema, inside, values)
            del self._open[part]
        return self._known[part, values]

    def _own(self, schema: Mapping[str, Any], values: int) -> int:
        work = values * (1 + len(schema.get("dependentRequired", ())) + len(schema.get("dependentSchemas", ())))
        options = schema.get("enum", ())
        if len({type(each) for each in options} | {str, int}) > 2:
            # Strings alone and integers alone are hashed; other values are compared one by one.
            work += values * len(options)
        if "pattern" in schema:
            work += min(_CHARACTERS, values * schema.get("maxLength", _CHARACTERS))
        return work + _CHARACTERS * len(schema.get("patternProperties", ()))

    def _parts(self, schema: Mapping[str, Any], resolver: _Resolver, values: int) -> int:
        in_place = list(_inner(schema, _IN_PLACE, resolver))
        work = sum(self._count(part, base, values) for part, base in in_place)
        self._entered += 1
        items = min(_VALUES, values * schema.get("maxItems", _VALUES))
        members = min(_VALUES, values * schema.get("maxProperties", _VALUES))
        of_items = sum(self._count(part, base, items) for part, base in _inner(schema, _OF_ITEMS, resolver))
        of_members = sum(self._count(part, base, members) for part, base in _inner(schema, _OF_MEMBERS, resolver))
        # One value stands under one name.
        named = (self._count(part, resolver, values) for part in schema.get("properties", {}).values())
        of_members += max(named, default=0)
        self._entered -= 1
        if "unevaluatedItems" in schema or "unevaluatedProperties" in schema:
            # For each member the parts beside are asked again whether they know it.
            work += sum(self._count(part, base, _VALUES) for part, base in in_place)
        return work + max(of_items, of_members)


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
