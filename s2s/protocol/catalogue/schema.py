"""JSON Schemas, compiled once: a fast validity check, and an explanation of each refusal.

``jsonschema`` checks the schemas themselves (:mod:`s2s.protocol.catalogue.vet`). ``jsonschema-rs`` validates every
payload. The explanation validates the value against single parts of the schema with ``jsonschema-rs``, because the
library's own list of errors may grow exponentially with ``anyOf``, and because ``jsonschema`` has no bound at all.
``tests/protocol/test_catalogue.py`` compares the two libraries.
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
#: Maximum size of a compiled pattern, in bytes. :mod:`s2s.protocol.catalogue.pattern` bounds its running time.
_PATTERN_SIZE: Final = 50_000
#: Options of the regex engine. It never backtracks: the time grows only with the length of the text.
_PATTERNS: Final = jsonschema_rs.RegexOptions(size_limit=_PATTERN_SIZE)
#: Maximum number of times that an explanation validates the whole value of one level. Each costs at most as much as one
#: validity check.
_MOST_TRIES: Final = 64
#: Seconds of CPU time after which an explanation starts no further step. A step takes at most as long as one validity
#: check.
_MOST_TIME: Final = 0.03
_BROKEN: Final = "the value breaks its schema"
#: Keywords whose result does not depend on other parts of the schema.
_ALONE: Final = frozenset(
    ("type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength",
     "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxProperties", "minProperties", "required",
     "dependentRequired")
)  # fmt: skip
#: Keywords whose refusal may come from any of several schemas. The explanation ends at them.
_COMBINED: Final = (
    "anyOf", "oneOf", "not", "contains", "dependentSchemas", "patternProperties", "propertyNames",
    "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "$ref", "$dynamicRef",
)  # fmt: skip


class Schema:
    """One JSON Schema (2020-12).

    :param document: the schema as parsed JSON.
    :raises jsonschema.exceptions.SchemaError: the document is not a JSON Schema.
    :raises OperatorError: the schema breaks a rule of :func:`~s2s.protocol.catalogue.vet.vet`.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = vet(document)
        try:
            self.is_valid = _compile(self.document).is_valid
        except jsonschema_rs.ValidationError as error:
            check_words(self.document, is_compiled=False)
            raise _bad_pattern(error) from None
        self._parts = jsonschema_rs.validator_map_for(self.document, pattern_options=_PATTERNS, offline=True)
        #: The default of each optional member, by name.
        self.defaults: dict[str, Any] = {
            name: rule["default"]
            for name, rule in self.document.get("properties", {}).items()
            if isinstance(rule, Mapping) and "default" in rule
        }

    def explain(self, value: Any, at: str = "/payload") -> tuple[str, str] | None:
        """Return the fault of a value, found in a bounded number of steps and a bounded time.

        :param at: the JSON pointer to the value (RFC 6901).
        :returns: the pointer to the fault and a sentence about it, or ``None`` if the value is valid. The sentence
            quotes no value.
        """
        return None if self.is_valid(value) else self._reason(value, at)

    def check(self, value: Any, at: str = "/payload") -> None:
        """Raise an error if the value breaks the schema.

        :param at: the JSON pointer to the value (RFC 6901).
        :raises BadPayload: the value breaks the schema; ``details.path`` is the pointer to the fault.
        """
        if not self.is_valid(value):
            path, text = self._reason(value, at)
            raise BadPayload(f"at {path}: {text}", path=path)

    def _reason(self, value: Any, at: str) -> tuple[str, str]:
        try:
            return _Explanation(self._parts, self.document, value, at).find()
        except Exception:
            # The value is refused even if the explanation fails: an exception here would turn a final refusal into an
            # internal error, which the peer would retry for ever.
            return at, _BROKEN


class _Explanation:
    """The search for the part of the schema that refuses a value.

    :param parts: a validator for each part of the schema, by the part's pointer.
    """

    def __init__(self, parts: jsonschema_rs.ValidatorMap, document: Mapping[str, Any], value: Any, at: str) -> None:
        self._parts = parts
        self._document = document
        self._tries = 0
        self._end = thread_time() + _MOST_TIME
        self._is_apart = False
        #: The refusing part of the schema, its pointer, the value that it refuses, and the pointer to that value.
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
        """Check the keywords that need no other part of the schema, and the names of the members."""
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
        """Go to the first inner part that refuses the value, a member or an item; stay if the time is over.

        :returns: ``False`` if no inner part refuses.
        """
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
        """Yield each inner part as its pointer, its rules, the value that it validates, and the pointer step to it."""
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
        # The parts below validate the whole value, so each of them counts as a try.
        for index, rule in enumerate(rules.get("allOf", ())[: _MOST_TRIES - self._tries]):
            self._tries += 1
            yield f"{here}/allOf/{index}", rule, value, ""
        if "if" in rules:
            self._tries += 1
            branch = "then" if self._is_met(f"{here}/if", value) else "else"
            yield f"{here}/{branch}", rules.get(branch, True), value, ""
        # Below a part with its own $id, references resolve against that part. The explanation does not follow them.
        self._is_apart |= "$id" in rules and here != "#"
        reference = rules.get("$ref", "")
        if not self._is_apart and (reference == "#" or reference.startswith("#/")):
            pointer = unquote(reference)
            yield pointer, _at(self._document, pointer), value, ""

    def _other_fault(self, rules: Mapping[str, Any]) -> str:
        """Return a sentence that names the one remaining keyword, or a general one if several remain."""
        left = [word for word in _COMBINED if word in rules]
        return _must_satisfy(left[0], rules[left[0]]) if len(left) == 1 and "allOf" not in rules else _BROKEN


_FILES: Final = resources.files(__name__.rpartition(".")[0]).joinpath("schemas")


def load(stem: str) -> Schema:
    """Read one schema file of the package."""
    return Schema(json.loads(_FILES.joinpath(f"{stem}.json").read_text("utf-8")))


def _compile(rules: Mapping[str, Any]) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(dict(rules), pattern_options=_PATTERNS, offline=True)


def _bad_pattern(error: jsonschema_rs.ValidationError) -> OperatorError:
    """Return an error that names the refused pattern; the rest of the schema has already been checked."""
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
