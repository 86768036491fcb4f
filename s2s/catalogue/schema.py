"""JSON Schemas, compiled once: a fast yes or no, and an explanation of the no.

``jsonschema-rs`` judges every payload and every schema; ``jsonschema`` says what is wrong with one that was refused.
``tests/test_catalogue.py`` holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Final, cast

import jsonschema_rs
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match

from s2s.errors import BadPayload

_LONGEST_BOUND: Final = 120


class Schema:
    """One JSON Schema (2020-12).

    :param document: the schema as parsed JSON.
    :raises jsonschema.exceptions.SchemaError: the document is no schema.
    :raises ValueError: it refers to what there is not.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._explains = Draft202012Validator(document)
        try:
            self.is_valid = jsonschema_rs.Draft202012Validator(dict(document)).is_valid
        except ValueError:
            Draft202012Validator.check_schema(document)
            raise
        #: What an absent optional member stands for.
        self.defaults: dict[str, Any] = {
            name: rule["default"]
            for name, rule in document.get("properties", {}).items()
            if isinstance(rule, Mapping) and "default" in rule
        }

    def explain(self, value: Any, at: str = "/payload") -> tuple[str, str] | None:
        """Say what is wrong with a value.

        :param at: where the value stands, a JSON pointer (RFC 6901).
        :returns: the pointer to the fault and a sentence about it, or ``None``. The sentence quotes no value.
        """
        error = best_match(self._explains.iter_errors(value))
        return None if error is None else _told(error, at)

    def check(self, value: Any, at: str = "/payload") -> None:
        """Refuse what the schema refuses.

        :param at: where the value stands, a JSON pointer (RFC 6901).
        :raises BadPayload: with ``details.path``.
        """
        if not self.is_valid(value):
            path, text = self.explain(value, at) or (at, "the schema refuses it")
            raise BadPayload(f"at {path}: {text}", path=path)


_FILES: Final = resources.files(__name__.rpartition(".")[0]).joinpath("schemas")


def load(stem: str) -> Schema:
    """Read one schema file of the package."""
    return Schema(json.loads(_FILES.joinpath(f"{stem}.json").read_text("utf-8")))


def requests() -> list[str]:
    """Name every type whose request has a schema file."""
    suffix = ".request.json"
    return sorted(file.name.removesuffix(suffix) for file in _FILES.iterdir() if file.name.endswith(suffix))


def _told(error: ValidationError, at: str) -> tuple[str, str]:
    path = at + _pointer(error.absolute_path)
    rule, bound = str(error.validator), cast(Any, error.validator_value)
    if rule in ("additionalProperties", "unevaluatedProperties") and isinstance(error.instance, Mapping):
        known = error.schema.get("properties", {}) if isinstance(error.schema, Mapping) else {}
        unknown = sorted(name for name in error.instance if name not in known)
        return path + _pointer(unknown[:1]), "the member is unknown"
    if rule == "required" and isinstance(error.instance, Mapping):
        missing = [name for name in bound if name not in error.instance]
        return path + _pointer(missing[:1]), "the member is required"
    said = json.dumps(bound, ensure_ascii=True, sort_keys=True)
    return path, f"must satisfy {rule} {said if len(said) <= _LONGEST_BOUND else 'of its schema'}"


def _pointer(parts: Iterable[str | int]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1")[:64] for part in parts)
