"""Find the operation for a path and a method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

from s2s.admin.http.problems import Problem
from s2s.admin.operations.operation import Operation, Rule
from s2s.errors import BadPayload, NotFound, UnsupportedType, harmless

_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?")
_MOST_MEMBERS: Final = 32


@dataclass
class _Path:
    """One path. A segment is a word, or the name of a path parameter in braces."""

    segments: list[str]
    methods: dict[str, Operation[Any]] = field(default_factory=dict)

    def path_params(self, segments: Sequence[str]) -> dict[str, Any] | None:
        """Return the path parameters; ``None``: the segments do not match this path."""
        operation = next(iter(self.methods.values()))
        path_params: dict[str, Any] = {}
        for ours, theirs in zip(self.segments, segments, strict=True):
            if ours.startswith("{"):
                path_params[ours[1:-1]] = _typed(operation.path_params[ours[1:-1]], theirs)
            elif ours != theirs:
                return None
        return path_params if operation.path_params_schema.is_valid(path_params) else None


class Routes:
    """Finds operations."""

    def __init__(self, operations: Iterable[Operation[Any]]) -> None:
        paths: dict[str, _Path] = {}
        for operation in operations:
            path = paths.setdefault(operation.path, _Path(operation.path.split("/")[1:]))
            assert operation.method not in path.methods, operation
            path.methods[operation.method] = operation
        # A path without parameters has precedence over one with parameters.
        self._paths = sorted(paths.values(), key=lambda path: sum(each.startswith("{") for each in path.segments))

    def find(self, method: str, path: bytes) -> tuple[Operation[Any], dict[str, Any]]:
        """Return the operation and the path parameters.

        :param path: the path of the request, still percent-encoded.
        :raises NotFound: there is nothing at this path.
        :raises Problem: the path does not take this method.
        """
        try:
            segments = [unquote(segment.decode("ascii"), errors="strict") for segment in path.split(b"/")[1:]]
        except UnicodeDecodeError:
            segments = []
        for each in self._paths:
            if len(each.segments) == len(segments) and "\0" not in "".join(segments):
                path_params = each.path_params(segments)
                if path_params is not None:
                    return self._by_method(each, method), path_params
        raise NotFound("there is nothing at this path: see /openapi.json")

    def _by_method(self, path: _Path, method: str) -> Operation[Any]:
        if method in path.methods:
            return path.methods[method]
        takes = allowed(path.methods)
        raise wrong_method(method, takes)


def allowed(methods: Iterable[str]) -> list[str]:
    """Return the methods that a path takes; a path that takes GET takes HEAD too."""
    return sorted({*methods, *(["HEAD"] if "GET" in methods else [])})


def wrong_method(method: str, takes: Sequence[str]) -> Problem:
    """Return the problem for a method that a path does not take."""
    said = f"this path does not take {harmless(method)}, but {' and '.join(takes)}"
    return Problem(UnsupportedType(said, supported=list(takes)), headers={"Allow": ", ".join(takes)})


def read_query(rules: Mapping[str, Rule], query: bytes) -> dict[str, Any]:
    """Parse a query. Its values are validated later, by the schema.

    :raises BadPayload: the query cannot be parsed.
    """
    if query.count(b"&") >= _MOST_MEMBERS:
        raise BadPayload(f"the query has more than {_MOST_MEMBERS} members", path="/query")
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:  # a UnicodeDecodeError too
        raise BadPayload("the query cannot be read: escape it as UTF-8", path="/query") from None
    found: dict[str, Any] = {}
    for name, text in pairs:
        if name in found or "\0" in name + text:
            path = f"/query/{name.replace('~', '~0').replace('/', '~1')[:64]}"
            raise BadPayload("a member of the query occurs twice, or contains U+0000", path=path)
        found[name] = _typed(rules.get(name, {}), text)
    return found


def _typed(rule: Rule, text: str) -> Any:
    """Convert a text to the type that the rule wants. A text of another form stays a string; the schema refuses it."""
    kind = rule.get("type")
    if kind == "integer" and _INTEGER.fullmatch(text):
        return int(text)
    if kind == "number" and _NUMBER.fullmatch(text):
        return float(text)
    return text
