"""Who may come in: the token, the hosts that need one, and the door that every request goes through."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from ttt_adapt.errors import ConfigError
from ttt_adapt.serve.limits import Limits
from ttt_adapt.serve.metrics import Metrics
from ttt_adapt.serve.refusal import Refusal

_logger = logging.getLogger("ttt_adapt.serve")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/ready")
"""What needs no token: those that watch the process have none."""
SHORTEST_TOKEN = 16


def check_access(host: str, token: str | None) -> None:
    """Refuse a server that strangers could use.

    Raises:
        ConfigError: the host is not this machine alone and there is no token, or the token is too short or no text that
            a header can hold.
    """
    if token is None:
        if not is_loopback(host):
            raise ConfigError(
                f"host is {host!r}, which others can reach, and there is no token: write one into a file and name it "
                "with `token_file`, or use 127.0.0.1"
            )
        return
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the token is shorter than {SHORTEST_TOKEN} characters, or has others than letters, digits and signs of "
            "ASCII: make one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Door:
    """Lets a request in, or answers it at once; counts both. An ASGI middleware.

    With a token, a request must bring it. Without one, the server is for this machine alone, and a page that a browser
    on it shows is a stranger: the request must be to a name of this machine, and come from no other page.

    Args:
        app: what is behind it.
        token: of the clients; None: no token.
        limits: how many requests are inside at most.
        metrics: counts.
    """

    def __init__(self, app: App, token: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else token.encode()
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._inside += 1
        try:
            self._check(scope)
            await self._app(scope, receive, counted)
        except Refusal as refusal:
            await _answer(refusal, counted)
        except Exception:
            _logger.exception("%s %s failed", scope["method"], scope["path"])
            if status:  # the answer has begun: the server cuts it off
                raise
            await _answer(Refusal(500, "failed", "the server failed; its log says why"), counted)
        finally:
            self._inside -= 1
            self._metrics.request(scope["method"], getattr(scope.get("route"), "path", ""), status)

    def _check(self, scope: Scope) -> None:
        """Refuse who may not come in."""
        if scope["path"] in OPEN_PATHS:
            return
        headers = dict(reversed(scope["headers"]))  # of several, the first one
        if self._token is None:
            _check_is_local(headers)
        else:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(token.strip(), self._token) or kind.lower() != b"bearer":
                raise Refusal(401, "no_token", "the token is missing or wrong; expected Authorization: Bearer TOKEN")
        if self._inside > self._limits.requests:
            raise Refusal(
                429, "too_many_requests", f"{self._limits.requests} requests are in work, as many as may be", 1
            )


def _check_is_local(headers: dict[bytes, bytes]) -> None:
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin", b"").decode("latin-1")
    try:
        local = is_loopback(urlsplit(f"//{host}").hostname or "")
        own = not origin or urlsplit(origin).netloc == host
    except ValueError:
        local = own = False
    if not local or not own:
        raise Refusal(
            403, "not_local",
            "this server has no token and answers programs of its own machine only: ask 127.0.0.1 or localhost, or "
            "start it with a token",
        )  # fmt: skip


async def _answer(refusal: Refusal, send: Send) -> None:
    content = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
