"""The OpenAPI 3.1 document, generated from the declarations of the operations (docs/api.rst)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec

from s2s import __version__
from s2s.admin.http import problems
from s2s.admin.http.api import Plain
from s2s.admin.http.problems import STATUS
from s2s.admin.operations.operation import IDEM_KEY, Operation
from s2s.errors import BY_CODE
from s2s.store.access import ACCESS

_SCHEMAS: Final = "#/components/schemas/"
_TOKEN: Final[dict[str, list[str]]] = {"token": []}
#: The statuses with which any request may be refused, and those that a request with a body has in addition.
_ANY: Final = (400, 401, 421, 429, 500, 503, 504)
_WITH_BODY: Final = (413, 415)

_PROBLEM: Final = {
    "type": "object",
    "description": "Problem details (RFC 9457), with the link's own codes. There may be further members.",
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence about the error."},
        "code": {"enum": sorted(BY_CODE)},
        "retryable": {"type": "boolean", "description": "The same request may succeed later."},
        "retry_after_ms": {"type": "integer", "minimum": 0},
        "path": {"type": "string", "description": "A JSON pointer to the member at fault, below /query or /body."},
    },
    "required": ["type", "title", "status", "detail", "code", "retryable"],
}


def document(operations: Collection[Operation[Any]], plain: Iterable[Plain]) -> dict[str, Any]:
    """Return the OpenAPI document of the whole API."""
    types = list({id(each.reply): each.reply for each in operations if each.reply_schema is None}.values())
    refs, components = msgspec.json.schema_components(types, ref_template=f"{_SCHEMAS}{{name}}")
    replies = {id(kind): ref for kind, ref in zip(types, refs, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for each in plain:
        paths.setdefault(each.path, {})["get"] = _plain(each)
    for operation in operations:
        reply = operation.reply if operation.reply_schema is not None else replies[id(operation.reply)]
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, reply)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "s2s",
            "version": __version__,
            "description": "Control of a server, its engines and their work; docs/api.rst describes the API.",
        },
        "paths": paths,
        "components": {
            "schemas": {**{name: _described(schema) for name, schema in components.items()}, "Problem": _PROBLEM},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "Of s2s tokens add."}},
        },
    }


def _described(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with only the first line of its docstring; the further lines are for readers of the code."""
    said = dict(schema)
    if "description" in said:
        said["description"] = said["description"].partition("\n")[0]
    return said


def _plain(plain: Plain) -> dict[str, Any]:
    return {
        "operationId": plain.name,
        "summary": f"{plain.summary}.",
        "security": [{}] if plain.is_open else [_TOKEN],
        "responses": {
            "200": _json("Success.", plain.reply),
            **_refusals({400, 503} if plain.is_open else {*_ANY, 422}),
        },
    }


def _operation(operation: Operation[Any], reply: Mapping[str, Any]) -> dict[str, Any]:
    takes_body = operation.method != "GET"
    statuses = {*_ANY, 422, *(STATUS[error.code] for error in operation.refusals)}
    if takes_body:
        statuses.update(_WITH_BODY)
    if operation.access != ACCESS[0]:
        statuses.add(403)
    if operation.path_params:
        statuses.add(404)
    if operation.path.startswith("/v1/engines/"):
        statuses.add(502)
    parameters = [
        *(_parameter("path", name, rule, required=True) for name, rule in operation.path_params.items()),
        *(_parameter("query", name, rule) for name, rule in operation.query.items()),
    ]
    if operation.takes_key:
        key = {**IDEM_KEY.document, "description": "A request with the same key names the same order."}
        parameters.append(_parameter("header", "Idempotency-Key", key))
    return {
        "operationId": operation.name,
        "summary": f"{operation.summary}.",
        "description": f"For tokens of role {', '.join(ACCESS[ACCESS.index(operation.access) :])}.",
        "security": [_TOKEN],
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": _body(operation)} if takes_body else {}),
        "responses": {
            **{str(status): _json(said, reply) for status, said in operation.statuses.items()},
            **_refusals(statuses),
        },
    }


def _parameter(place: str, name: str, rule: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    schema = {member: said for member, said in rule.items() if member != "description"}
    said = {"description": rule["description"]} if "description" in rule else {}
    return {"name": name, "in": place, "required": required, **said, "schema": schema}


def _body(operation: Operation[Any]) -> dict[str, Any]:
    schema = _whole(operation.body_schema.document)
    return {
        "description": f"{operation.body_bytes} bytes at most.",
        "required": bool(schema.get("required")),
        "content": {"application/json": {"schema": schema}},
    }


def _whole(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the references of a schema to its own ``$defs``, which do not resolve within the OpenAPI document."""
    pieces = {f"#/$defs/{name}": piece for name, piece in schema.get("$defs", {}).items()}

    def written(node: Any) -> Any:
        if isinstance(node, Mapping):
            rest = {name: written(each) for name, each in node.items() if name not in ("$ref", "$defs")}
            return {**written(pieces[node["$ref"]]), **rest} if "$ref" in node else rest
        return [written(each) for each in node] if isinstance(node, list) else node

    found: dict[str, Any] = written(schema)
    return found


def _json(said: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": said, "content": {"application/json": {"schema": schema}}}


def _refusals(statuses: Iterable[int]) -> dict[str, Any]:
    schema = {"$ref": f"{_SCHEMAS}Problem"}
    return {
        str(status): {
            "description": f"{HTTPStatus(status).phrase}.",
            "content": {problems.CONTENT_TYPE: {"schema": schema}},
        }
        for status in sorted(statuses)
    }
