"""The page at ``/``: one file that needs nothing else, and may load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

__all__ = ["HEADERS", "PAGE"]

PAGE = files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _hash_of(tag: str) -> str:
    """The source that allows the page's own ``tag``, and no other."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script')}",
            f"style-src {_hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",  # its icon, which is empty
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
