"""Names of dtypes. Without torch, whose import takes seconds."""

from __future__ import annotations

from polydraft.errors import InvalidRequestError

__all__ = ["DTYPES", "check_dtype"]

DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
"""What ``load(dtype=...)`` takes -> torch's name."""


def check_dtype(name: str) -> None:
    """Refuse an unknown dtype with ``InvalidRequestError``."""
    if name != "auto" and name not in DTYPES:
        raise InvalidRequestError(f"`dtype={name!r}` is unknown.", f"Give auto, {', '.join(DTYPES)}.")
