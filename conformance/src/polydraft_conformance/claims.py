"""Requirements of checks, and ``expect``, which fails a check with a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from polydraft.contract import Capabilities, DrafterKind

__all__ = [
    "MODEL_KINDS",
    "expect",
    "exposes_logits",
    "has_model_drafter",
    "is_bitwise",
    "is_seed_identical",
    "reuses_prefixes",
    "samples",
]

MODEL_KINDS: frozenset[DrafterKind] = frozenset({"mtp", "draft-model", "eagle3", "dflash"})
"""Drafter kinds whose drafts come from the engine's ``propose``; n-grams are the core's."""


def expect(condition: bool, message: str) -> None:
    """Fail a check unless ``condition`` holds.

    Args:
        condition: What must hold.
        message: What is wrong otherwise; the first line names the cause.
    """
    if not condition:
        raise AssertionError(message)


def exposes_logits(capabilities: Capabilities) -> str | None:
    """Requires the primitives and logits of a stepping engine."""
    return None if capabilities.exposes_logits else "The backend does not claim exposes_logits."


def is_bitwise(capabilities: Capabilities) -> str | None:
    """Requires steps of fixed shape."""
    return None if "bitwise" in capabilities.exactness else "The backend does not claim exactness='bitwise'."


def is_seed_identical(capabilities: Capabilities) -> str | None:
    """Requires the same sample of a seed with and without speculation."""
    return None if capabilities.seed_identical else "The backend does not claim seed_identical."


def reuses_prefixes(capabilities: Capabilities) -> str | None:
    """Requires that prompts reuse the KV of earlier calls."""
    return None if capabilities.reuses_prefixes else "The backend does not claim reuses_prefixes."


def has_model_drafter(capabilities: Capabilities) -> str | None:
    """Requires a model drafter."""
    return None if capabilities.drafter_kinds & MODEL_KINDS else "The backend claims no drafter kind with a model."


def samples(*names: str) -> Callable[[Capabilities], str | None]:
    """Requires all of these sampling settings."""

    def claim(capabilities: Capabilities) -> str | None:
        missing = sorted(set(names) - capabilities.sampling)
        return f"The backend does not claim the sampling settings {', '.join(missing)}." if missing else None

    return claim
