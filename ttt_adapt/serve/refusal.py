"""Why a request is refused: its status, a word for programs, and a sentence for people."""

from __future__ import annotations

import math
from typing import Any

from ttt_adapt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FrameError,
    FrameTypeError,
    MemoryLimitError,
    StateError,
    TTTAdaptError,
)
from ttt_adapt.video.address import redacted


class Refusal(TTTAdaptError):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        code: a word that stays the same, for programs.
        retry_after: whole seconds after which it may go through; None: it will not.

    Args:
        status: as above.
        code: as above.
        message: what came, what was expected, what to do.
        retry_after: seconds.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.retry_after = None if retry_after is None else max(math.ceil(retry_after), 1)

    @property
    def body(self) -> dict[str, Any]:
        """The one shape of all errors."""
        return {"error": {"code": self.code, "message": str(self)}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


_STATUS: list[tuple[type[TTTAdaptError], int, str]] = [
    (MemoryLimitError, 503, "out_of_memory"),
    (FrameError, 422, "bad_frame"),
    (FrameTypeError, 422, "bad_frame"),
    (DataError, 422, "bad_picture"),
    (CheckpointError, 422, "bad_state"),
    (ConfigError, 422, "bad_request"),
    (StateError, 409, "wrong_state"),
]


def refusal_of(error: TTTAdaptError) -> Refusal:
    """The refusal that an error of the library means."""
    if isinstance(error, Refusal):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Refusal(status, code, redacted(str(error)), retry_after=5 if status == 503 else None)
    return Refusal(500, "failed", redacted(str(error)))
