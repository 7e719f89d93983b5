"""The bodies of requests: read within limits, before anything is done with them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ttt_adapt.serve.refusal import Refusal

MOST_JSON = 2**16
"""Bytes of a body in JSON."""


async def chunks(request: Any, most: int, seconds: float) -> AsyncIterator[bytes]:
    """The body of a request, part by part.

    Args:
        request: of Starlette.
        most: how many bytes it has at most.
        seconds: within which all of it comes.

    Raises:
        Refusal: it is too large, or does not come.
    """
    from starlette.requests import ClientDisconnect

    told = request.headers.get("content-length", "")
    size, parts = (int(told) if told.isdigit() else 0), request.stream()
    deadline = asyncio.get_running_loop().time() + seconds
    if size > most:
        raise _too_large(most)
    size = 0
    while True:
        try:
            left = deadline - asyncio.get_running_loop().time()
            part = await asyncio.wait_for(anext(parts, None), max(left, 0))
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise Refusal(408, "too_slow", f"the body did not come within {seconds:g} s: send it again") from error
        except ClientDisconnect as error:
            raise Refusal(400, "cut_short", "the body was cut short: send it again") from error
        if part is None:
            return
        size += len(part)
        if size > most:
            raise _too_large(most)
        yield part


async def body(request: Any, most: int, seconds: float) -> bytes:
    """All of the body; arguments and errors as for `chunks`."""
    return b"".join([part async for part in chunks(request, most, seconds)])


async def text_field(request: Any, name: str, pattern: str, seconds: float) -> str:
    """The one field of a body in JSON.

    Args:
        request: of Starlette.
        name: of the field.
        pattern: that all of its text fits.
        seconds: as for `chunks`.

    Raises:
        Refusal: the body is something else.
    """
    check_media_type(request, ["application/json"])
    content = await body(request, MOST_JSON, seconds)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refusal(422, "bad_request", f"the body is no JSON ({error})") from error
    value = found.get(name) if isinstance(found, dict) and set(found) == {name} else None
    if not isinstance(value, str) or not re.fullmatch(pattern, value) or re.search("[\ud800-\udfff]", value):
        raise Refusal(422, "bad_request", f'expected a body {{"{name}": TEXT}}, and TEXT like {pattern}')
    return value


def check_media_type(request: Any, known: Sequence[str]) -> None:
    """Refuse a body of another kind.

    Raises:
        Refusal: the header Content-Type is missing, or another one.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in known:
        came = repr(kind) if kind else "of no kind"
        raise Refusal(415, "wrong_media_type", f"the body is {came}; expected Content-Type {' or '.join(known)}")


def _too_large(most: int) -> Refusal:
    return Refusal(413, "too_large", f"the body is too large; expected {most} bytes at most")
