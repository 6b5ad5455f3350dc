"""Text from files, servers and users, made fit to be shown: it controls no terminal and holds no password of a URL."""

from __future__ import annotations

import re

__all__ = ["holds_credentials", "presentable"]

_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
"""Characters that reorder what a terminal shows."""
_CONTROLS = {0x0B, 0x0C, *range(0x20), *range(0x7F, 0xA0), *_BIDI, 0x2028, 0x2029} - {0x09, 0x0A}
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS}
# Up to the last @ before the path, as browsers and HTTP libraries read it: a password may hold an @ itself.
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]*@")


def holds_credentials(text: str) -> bool:
    """Whether a URL in a text has a user or a password.

    >>> holds_credentials("name @ https://token@host/name.whl"), holds_credentials("https://host/simple")
    (True, False)
    """
    return _CREDENTIALS.search(text) is not None


def presentable(text: str) -> str:
    r"""The text with control characters as escapes (tabs and line ends stay), and URLs without user and password.

    >>> presentable("a\x1b[31mb"), presentable("http://user:password@host:1/v1")
    ('a\\x1b[31mb', 'http://***@host:1/v1')
    """
    if "@" in text:
        text = _CREDENTIALS.sub("***@", text)
    return text if text.isascii() and text.isprintable() else text.translate(_ESCAPES)
