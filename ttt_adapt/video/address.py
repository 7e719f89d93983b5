"""How a source is named in messages, logs, files and progress bars: without the secrets of its address."""

from __future__ import annotations

import os
import re

HIDDEN = "***"

_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*:/+"
_ADDRESS = re.compile(rf"{_SCHEME}\S+")
_WHOLE = re.compile(rf"\s*{_SCHEME}")
_LOGIN = re.compile(rf"(?P<scheme>{_SCHEME})?(?P<login>.*)@", re.DOTALL)
_HOST_AND_PATH = re.compile(r"([^:/?#@]+|\[[0-9a-fA-F:.]+\])[/?#][^@]*")
_VALUE = re.compile(r"(?P<name>[?&;#][^=&;#\s]*=)[^&#\s]*")
_UNNAMED = re.compile(r"\?[^=&#\s]+(?=$|[&#\s])")
_STREAM_KEY = re.compile(r"(?P<before>rtmp\w*:/+[^/?#\s]+/(?:[^/?#\s]+/)*)[^/?#\s]+")


def redacted(text: str | os.PathLike[str]) -> str:
    """`text` with `***` where an address in it has a user, a password, or a value of its query; also RTMP's stream key.

    All values of a query are hidden, since no list of the names of secrets is complete. A password may hold `@`, `/`,
    `?` and spaces that should have been percent-encoded: such an address does not work, and is still no reason to show
    it. Text without an address stays as it is, up to `user:password@...` where somebody forgot the scheme.

    Args:
        text: an address, the name of a file, or a message that has addresses in it.
    """
    text = os.fspath(text)
    if _WHOLE.match(text):
        return _hide(text)
    if _ADDRESS.search(text):
        return _ADDRESS.sub(lambda found: _hide(found[0]), text)
    return _hide(text) if "@" in text and ":" in text.split("@")[0] and " " not in text else _values(text)


def _hide(address: str) -> str:
    """One address without its secrets."""
    login = _LOGIN.match(address)
    if login is not None and not _is_host(login["login"]):
        address = f"{login['scheme'] or ''}{HIDDEN}@{address[login.end() :]}"
    return _STREAM_KEY.sub(rf"\g<before>{HIDDEN}", _values(address))


def _is_host(before: str) -> bool:
    """Whether what stands before the last @ is a host and a path, such as `10.0.0.5/films/a`.

    With a port it may be a user and the first half of a password that has a slash, so it is none.
    """
    return _HOST_AND_PATH.fullmatch(before) is not None


def _values(address: str) -> str:
    return _UNNAMED.sub(f"?{HIDDEN}", _VALUE.sub(rf"\g<name>{HIDDEN}", address))
