"""The messages, commands and errors of a link, with all their schemas (docs/protocol.rst, "Catalogue")."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from s2s.admin.operations.operation import Operation, OperationRequest, members, once
from s2s.errors import BY_CODE
from s2s.handlers.discovery import Found
from s2s.protocol.catalogue import ERROR_SCHEMA
from s2s.store.driver import Cursor

_OBJECT: Final = {"type": "object"}
_TEXT: Final = {"type": "string"}
_MESSAGE: Final = members(
    {
        "sent_by": {"type": "array", "items": _TEXT},
        "reply_type": _TEXT,
        "is_order": {"type": "boolean"},
        "request": _OBJECT,
        "reply": _OBJECT,
    },
    "sent_by",
    "reply_type",
    "is_order",
    "request",
    "reply",
)
_ERROR: Final = members({"retryable": {"type": "boolean"}, "closes": {"type": "boolean"}}, "retryable", "closes")
_DOCUMENT: Final = members(
    {
        "messages": {"type": "object", "additionalProperties": _MESSAGE},
        "commands": {"type": "object", "additionalProperties": _OBJECT},
        "errors": {"type": "object", "additionalProperties": _ERROR},
        "error": _OBJECT,
    },
    "messages",
    "commands",
    "errors",
    "error",
)


def _catalogue(found: Found) -> dict[str, Any]:
    return {
        "messages": {
            message.name: {
                "sent_by": list(message.sent_by),
                "reply_type": message.reply,
                "is_order": message.is_order,
                "request": message.request_schema.document,
                "reply": message.reply_schema.document,
            }
            for message in found.catalogue.values()
        },
        "commands": {cmd_type: dict(kind.schema) for cmd_type, kind in found.commands.items()},
        "errors": {code: {"retryable": error.retryable, "closes": error.closes} for code, error in BY_CODE.items()},
        "error": ERROR_SCHEMA.document,
    }


def _show(document: dict[str, Any], txn: Cursor, _: OperationRequest) -> dict[str, Any]:
    return document


def operation(found: Found) -> Operation[dict[str, Any]]:
    """Return the operation that shows the catalogue of a server with these plug-ins."""
    return Operation(
        "show_catalogue",
        "GET",
        "/v1/catalogue",
        "observer",
        "Show the message types, the command types that this server runs, and the errors, with all schemas",
        _DOCUMENT,
        once(partial(_show, _catalogue(found))),
    )
