"""What the server's description (OpenAPI) says of requests and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Names of streams that can be opened: they stand in paths and in labels of metrics."""
SOURCE = r"[^\x00-\x1f\x7f]{1,2048}"
"""What clients may name as a source."""
BINARY = {"type": "string", "format": "binary"}
STATE_TYPE = "application/octet-stream"


def fields(**each: dict[str, Any]) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": each, "required": list(each), "additionalProperties": False}


def text(**more: Any) -> dict[str, Any]:
    """A text."""
    return {"type": "string", **more}


_COUNT = {"type": "integer", "minimum": 0}
_SOURCE_STATS = fields(
    source=text(),
    state=text(enum=["opening", "reading", "ended", "failed", "stopped"]),
    error=text(),
    frames={"type": ["object", "null"]},
)
STATS = fields(
    name=text(),
    frames=fields(adapted=_COUNT, skipped=_COUNT, predicted=_COUNT, refused=_COUNT),
    skipped={"type": "object", "additionalProperties": _COUNT},
    ms={"type": ["number", "null"]},
    source={"anyOf": [_SOURCE_STATS, {"type": "null"}]},
)
NAMES = fields(streams={"type": "array", "items": text()})
STATUS = fields(status=text())
ERROR = fields(error=fields(code=text(), message=text()))

_REASONS = {
    400: "the body was cut short",
    401: "the token is missing or wrong",
    403: "not allowed",
    404: "no such stream",
    405: "no such method",
    408: "the body did not come in time",
    409: "it does not go together with what is there",
    413: "the body is too large",
    415: "the body is of another kind",
    422: "what came cannot be used; nothing has changed",
    429: "too much at once",
    503: "not now",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers with these statuses; all errors have one shape."""
    content = {"application/json": {"schema": ERROR}}
    return {status: {"description": _REASONS[status], "content": content} for status in sorted(statuses)}


def answer(status: int, description: str, **kinds: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """An answer that is no error; a schema for each media type, `_` for `/` in their names."""
    content = {name.replace("__", "/").replace("_", "-"): {"schema": schema} for name, schema in kinds.items()}
    return {status: {"description": description, **({"content": content} if content else {})}}


def takes(kinds: Sequence[str], schema: dict[str, Any]) -> dict[str, Any]:
    """A body that a request must have, of any of these media types."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}
