"""JSON Schemas, compiled once: a fast yes or no, and an explanation of the no.

``jsonschema`` checks the schemas themselves (:mod:`s2s.protocol.catalogue.vet`). ``jsonschema-rs`` judges every
payload, and the explanation asks it about the parts of the schema: its own list of errors may grow exponentially
with ``anyOf``, and ``jsonschema`` has no bound at all. ``tests/protocol/test_catalogue.py`` holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from time import thread_time
from typing import Any, Final
from urllib.parse import unquote

import jsonschema_rs
from jsonschema_rs import ValidationErrorKind as Kind

from s2s.errors import BadPayload, OperatorError
from s2s.protocol.catalogue.vet import check_words, vet

_LONGEST_BOUND: Final = 120
#: Bytes of a compiled pattern. :mod:`s2s.protocol.catalogue.pattern` bounds its time.
_PATTERN_SIZE: Final = 50_000
#: This engine never backtracks: the time grows with the text alone.
_PATTERNS: Final = jsonschema_rs.RegexOptions(size_limit=_PATTERN_SIZE)
#: Times that an explanation may judge a whole value of one level. Each costs at most one yes or no.
_MOST_TRIES: Final = 64
#: Seconds of CPU time after which an explanation begins no further step. A step takes at most as long as a yes or no.
_MOST_TIME: Final = 0.03
_BROKEN: Final = "the value breaks its schema"
#: Keywords of a part that other parts do not matter to.
_ALONE: Final = frozenset(
    ("type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength",
     "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxProperties", "minProperties", "required",
     "dependentRequired")
)  # fmt: skip
#: Keywords whose refusal may come from any of several schemas: the explanation ends there.
_COMBINED: Final = (
    "anyOf", "oneOf", "not", "contains", "dependentSchemas", "patternProperties", "propertyNames",
    "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "$ref", "$dynamicRef",
)  # fmt: skip


class Schema:
    """One JSON Schema (2020-12).

    :param document: the schema as parsed JSON.
    :raises jsonschema.exceptions.SchemaError: the document is no schema.
    :raises OperatorError: it is one that we do not take (:func:`~s2s.protocol.catalogue.vet.vet`).
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = vet(document)
        try:
            self.is_valid = _compile(self.document).is_valid
        except jsonschema_rs.ValidationError as error:
            check_words(self.document, is_compiled=False)
            raise _bad_pattern(error) from None
        self._parts = jsonschema_rs.validator_map_for(self.document, pattern_options=_PATTERNS, offline=True)
        #: What an absent optional member stands for.
        self.defaults: dict[str, Any] = {
            name: rule["default"]
            for name, rule in self.document.get("properties", {}).items()
            if isinstance(rule, Mapping) and "default" in rule
        }

    def explain(self, value: Any, at: str = "/payload") -> tuple[str, str] | None:
        """Say what is wrong with a value, in a bounded number of steps and a bounded time.

        :param at: where the value stands, a JSON pointer (RFC 6901).
        :returns: the pointer to the fault and a sentence about it, or ``None``. The sentence quotes no value.
        """
        return None if self.is_valid(value) else self._reason(value, at)

    def check(self, value: Any, at: str = "/payload") -> None:
        """Refuse what the schema refuses.

        :param at: where the value stands, a JSON pointer (RFC 6901).
        :raises BadPayload: with ``details.path``.
        """
        if not self.is_valid(value):
            path, text = self._reason(value, at)
            raise BadPayload(f"at {path}: {text}", path=path)

    def _reason(self, value: Any, at: str) -> tuple[str, str]:
        try:
            return _Explanation(self._parts, self.document, value, at).find()
        except Exception:
            # The value is refused all the same: an explanation that fails must not turn a final refusal into an error
            # of ours, which the peer would retry for ever.
            return at, _BROKEN


class _Explanation:
    """The way from a refused value to the part of the schema that refuses it.

    :param parts: a validator for each part of the schema, by its pointer.
    """

    def __init__(self, parts: jsonschema_rs.ValidatorMap, document: Mapping[str, Any], value: Any, at: str) -> None:
        self._parts = parts
        self._document = document
        self._tries = 0
        self._end = thread_time() + _MOST_TIME
        self._is_apart = False
        #: The part that refuses, its pointer, the value that it refuses, and where that stands.
        self._rules: Any = document
        self._part = "#"
        self._value = value
        self._path = at

    def find(self) -> tuple[str, str]:
        """Return the path and the sentence."""
        while self._tries < _MOST_TRIES and thread_time() < self._end:
            if not isinstance(self._rules, Mapping):
                return self._path, "nothing is allowed here"
            said = self._own_fault(self._rules)
            if said is not None:
                return self._path + said[0], said[1]
            if not self._go_in(self._rules):
                return self._path, self._other_fault(self._rules)
        return self._path, _BROKEN

    def _own_fault(self, rules: Mapping[str, Any]) -> tuple[str, str] | None:
        """Judge by the keywords that need no other schema, and by the names of the members alone."""
        self._tries += 1
        flat = {word: bound for word, bound in rules.items() if word in _ALONE}
        if rules.get("additionalProperties") is False:
            flat["additionalProperties"] = False
            flat |= {word: dict.fromkeys(rules.get(word, ()), True) for word in ("properties", "patternProperties")}
        try:
            _compile(flat).validate(self._value)
        except jsonschema_rs.ValidationError as error:
            if isinstance(error.kind, Kind.AdditionalProperties):
                return _pointer([min(error.kind.unexpected)]), "the member is unknown"
            if isinstance(error.kind, Kind.Required):
                return _pointer([error.kind.property]), "the member is required"
            word = str(error.schema_path[0])
            return "", _must_satisfy(word, flat[word])
        return None

    def _go_in(self, rules: Mapping[str, Any]) -> bool:
        """Go to the first part that refuses the value, a member or an item of it, or stay where the time is up."""
        for part, inner, value, step in self._inner(rules):
            if thread_time() >= self._end:
                return True
            if not self._is_met(part, value):
                self._part, self._rules, self._value = part, inner, value
                self._path += step
                return True
        return False

    def _is_met(self, part: str, value: Any) -> bool:
        validator = self._parts.get(part)
        return validator is None or validator.is_valid(value)

    def _inner(self, rules: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, str]]:
        """Yield parts with their pointers, the value that each is about, and the step to it."""
        value, here = self._value, self._part
        if isinstance(value, Mapping):
            for name, rule in rules.get("properties", {}).items():
                if name in value:
                    yield f"{here}/properties/{_escaped(name)}", rule, value[name], _pointer([name])
        if isinstance(value, list):
            first = rules.get("prefixItems", [])
            for index, (rule, item) in enumerate(zip(first, value, strict=False)):
                yield f"{here}/prefixItems/{index}", rule, item, f"/{index}"
            if "items" in rules:
                for index, item in enumerate(value[len(first) :], len(first)):
                    yield f"{here}/items", rules["items"], item, f"/{index}"
        # These judge the value itself, so that each is a try.
        for index, rule in enumerate(rules.get("allOf", ())[: _MOST_TRIES - self._tries]):
            self._tries += 1
            yield f"{here}/allOf/{index}", rule, value, ""
        if "if" in rules:
            self._tries += 1
            branch = "then" if self._is_met(f"{here}/if", value) else "else"
            yield f"{here}/{branch}", rules.get(branch, True), value, ""
        # Below a part with an $id of its own a reference starts at that part: the explanation ends there.
        self._is_apart |= "$id" in rules and here != "#"
        reference = rules.get("$ref", "")
        if not self._is_apart and (reference == "#" or reference.startswith("#/")):
            pointer = unquote(reference)
            yield pointer, _at(self._document, pointer), value, ""

    def _other_fault(self, rules: Mapping[str, Any]) -> str:
        """Name the one keyword that is left."""
        left = [word for word in _COMBINED if word in rules]
        return _must_satisfy(left[0], rules[left[0]]) if len(left) == 1 and "allOf" not in rules else _BROKEN


_FILES: Final = resources.files(__name__.rpartition(".")[0]).joinpath("schemas")


def load(stem: str) -> Schema:
    """Read one schema file of the package."""
    return Schema(json.loads(_FILES.joinpath(f"{stem}.json").read_text("utf-8")))


def requests() -> list[str]:
    """Name every type whose request has a schema file."""
    suffix = ".request.json"
    return sorted(file.name.removesuffix(suffix) for file in _FILES.iterdir() if file.name.endswith(suffix))


def _compile(rules: Mapping[str, Any]) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(dict(rules), pattern_options=_PATTERNS, offline=True)


def _bad_pattern(error: jsonschema_rs.ValidationError) -> OperatorError:
    """Say which pattern was refused; the rest of the schema has been checked before."""
    return OperatorError(
        f"the pattern at {_pointer(error.instance_path)[:80]} of its schema is too long when compiled, or needs "
        "look-around or a back-reference: write it without, and bound lengths by maxLength, not by {n,m}"
    )


def _must_satisfy(word: str, bound: Any) -> str:
    said = json.dumps(bound, ensure_ascii=True, sort_keys=True)
    return f"must satisfy {word} {said if len(said) <= _LONGEST_BOUND else 'of its schema'}"


def _at(document: Any, pointer: str) -> Any:
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        document = document[int(name)] if isinstance(document, list) else document[name]
    return document


def _escaped(part: str | int) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def _pointer(parts: Iterable[str | int]) -> str:
    return "".join("/" + _escaped(part)[:64] for part in parts)
