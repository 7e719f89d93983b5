"""How a source is named in messages, logs, files and progress bars: without the secrets of its address."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

HIDDEN = "***"

_SCHEME = r"[a-zA-Z][a-zA-Z0-9+.-]*:/+"
_SPACED_LOGIN = rf"{_SCHEME}[^\s:@/]+:(?!\d+(?:[/?#,;.\s]|$))[^@\n'\"]*@\S+"
_INSIDE = re.compile(rf"(?P<quote>['\"]){_SCHEME}(?:(?!(?P=quote)).)*(?P=quote)|{_SPACED_LOGIN}|{_SCHEME}\S+")
_WHOLE = re.compile(rf"\s*{_SCHEME}")
_LOGIN = re.compile(rf"(?P<scheme>{_SCHEME})?(?P<login>.*)@", re.DOTALL)
_HOST_AND_PATH = re.compile(r"([^:/?#@]+|\[[0-9a-fA-F:.]+\])[/?#][^@]*")
_NAME = r"[^/?&;#=\s]*="
_PAIR = re.compile(rf"(?P<name>[/?&;#]{_NAME})(?:\*\*\*(?=\s)|(?:(?![?&#]{_NAME}).)*)", re.DOTALL)
_VALUE = re.compile(r"(?P<name>[?&;#][^=&;#\s]*=)[^&#\s]*")
_UNNAMED = re.compile(r"\?[^=&#\s]+(?=$|[&#\s])")
_STREAM_KEY = re.compile(r"(?P<before>rtmp\w*:/+[^/?#\s]+/(?:[^/?#\s]+/)*)[^/?#\s]+")
_NO_SCHEME = re.compile(r"[^\s:/@]+:(?![/\\\s]|\S+:/).*@[^\s@]+", re.DOTALL)
_NO_SCHEME_INSIDE = re.compile(r"(?<![^\s'\"(])[^\s:/@'\"(]+:(?![/\\])\S+@(?=[\w\[])")


def redacted(text: str | os.PathLike[str], sources: Iterable[str] = ()) -> str:
    """`text` with `***` where an address in it has a user, a password, or a value; also RTMP's stream key.

    All values of `NAME=value` behind the host are hidden, since no list of the names of secrets is complete; in a path
    everything behind the first one, up to the next `&NAME=`. A password may hold `@`, `/`, `?` and spaces that should
    have been percent-encoded, and so may a value: such an address does not work, and is still no reason to show it.
    Text without an address stays as it is, up to `user:password@...` where somebody forgot the scheme.

    Args:
        text: an address, the name of a file, or a message that has addresses in it.
        sources: addresses that a message may hold; they are found in it as they are, whatever they look like.
    """
    text = os.fspath(text)
    for source in sorted({*sources} - {""}, key=len, reverse=True):
        if (shown := redacted(source)) != source:
            text = text.replace(source, shown)
    if _WHOLE.match(text) or _NO_SCHEME.fullmatch(text):
        return _hide(text)
    if _INSIDE.search(text):
        return _INSIDE.sub(_hide_inside, text)
    return _values(_NO_SCHEME_INSIDE.sub(f"{HIDDEN}@", text))


def _hide_inside(found: re.Match[str]) -> str:
    """An address inside of a message; of one in quotes, the quotes stay."""
    quote = found["quote"] or ""
    return f"{quote}{_hide(found[0][len(quote) : len(found[0]) - len(quote)])}{quote}"


def _hide(address: str) -> str:
    """One address without its secrets."""
    login = _LOGIN.match(address)
    if login is not None and not _is_host(login["login"]):
        address = f"{login['scheme'] or ''}{HIDDEN}@{address[login.end() :]}"
    address = _UNNAMED.sub(f"?{HIDDEN}", _PAIR.sub(rf"\g<name>{HIDDEN}", address))
    return _STREAM_KEY.sub(rf"\g<before>{HIDDEN}", address)


def _is_host(before: str) -> bool:
    """Whether what stands before the last @ is a host and a path, such as `10.0.0.5/films/a`.

    With a port it may be a user and the first half of a password that has a slash, so it is none.
    """
    return _HOST_AND_PATH.fullmatch(before) is not None


def _values(text: str) -> str:
    return _UNNAMED.sub(f"?{HIDDEN}", _VALUE.sub(rf"\g<name>{HIDDEN}", text))
