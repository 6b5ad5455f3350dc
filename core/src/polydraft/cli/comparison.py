"""The same prompt decoded plainly: identical or not, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft.contract import GenerationResult, Prompt
    from polydraft.session.base import Session

__all__ = ["Comparison", "compare_with_plain", "warm_up"]

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """A speculative result beside the plain one."""

    plain: GenerationResult
    first_difference: int | None
    """Index of the first token that differs, or that only one of them has; None: identical."""
    speed_up: float | None
    """Tokens/s of the speculative decoding over those of the plain one; None if one is unknown."""

    @property
    def identical(self) -> bool:
        """Whether both have the same tokens."""
        return self.first_difference is None


def warm_up(session: Session, prompt: Prompt, settings: dict[str, Any]) -> None:
    """A few tokens both ways, so that what an engine does once is in neither measurement."""
    few = {**settings, "max_new_tokens": min(_WARM_UP_TOKENS, settings.get("max_new_tokens", _WARM_UP_TOKENS))}
    for name in ("min_new_tokens", "forced_token_ids"):  # may reach beyond those few
        few.pop(name, None)
    session.generate(prompt, **few)
    session.generate(prompt, **few, speculate="off")


def compare_with_plain(
    session: Session, prompt: Prompt, settings: dict[str, Any], result: GenerationResult
) -> Comparison:
    """Decode the prompt once more without speculation, with the seed that the result used."""
    plain = session.generate(prompt, **{**settings, "seed": result.settings.seed}, speculate="off")
    return compare(result, plain)


def compare(result: GenerationResult, plain: GenerationResult) -> Comparison:
    """Put two results side by side."""
    a, b = result.token_ids, plain.token_ids
    differing = (index for index, (mine, theirs) in enumerate(zip(a, b, strict=False)) if mine != theirs)
    first = next(differing, None if len(a) == len(b) else min(len(a), len(b)))
    fast, slow = result.stats.tokens_per_second, plain.stats.tokens_per_second
    return Comparison(plain, first, fast / slow if fast and slow else None)
