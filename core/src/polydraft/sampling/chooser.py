"""The chooser that the core hands to engines: the rule with one generation's settings, seed and history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polydraft.contract.results import TokenLogprobs
from polydraft.sampling.logprobs import token_logprobs
from polydraft.sampling.rule import choose_tokens

if TYPE_CHECKING:
    from polydraft.contract.requests import TokenRequest
    from polydraft.sampling.ops import ArrayOps

__all__ = ["RuleChooser"]


class RuleChooser:
    """Implements ``polydraft.contract.Chooser`` for one generation.

    Args:
        ops: The engine's array operations.
        request: Settings, seed and stream are read, and the prompt's length for ``min_new_tokens``.
    """

    def __init__(self, ops: ArrayOps[Any], request: TokenRequest) -> None:
        self._ops = ops
        self._settings = request.settings
        self._seed = request.seed
        self._stream = request.stream
        self._free_from = len(request.prompt_token_ids) + request.settings.min_new_tokens
        self._ends = sorted(request.eos_token_ids | set(request.settings.stop_token_ids))

    @property
    def needs_prefix(self) -> bool:
        """False: no processor that looks at earlier tokens is in use."""
        return False

    def choose(
        self, logits: Any, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> tuple[list[int], tuple[TokenLogprobs, ...] | None]:
        """See ``polydraft.contract.Chooser.choose``."""
        allowed = self._allowed(logits, first_position, len(run_token_ids))
        chosen = choose_tokens(self._ops, allowed, self._settings, self._seed, self._stream, first_position)
        token_ids: list[int] = self._ops.tolist(chosen)
        if self._settings.logprobs is None or not keep_logprobs:
            return token_ids, None
        return token_ids, token_logprobs(self._ops.numpy(logits), token_ids, self._settings.logprobs)

    def choose_draft(self, logits: Any, position: int, run_token_ids: Sequence[int] | None = None) -> Any:
        """See ``polydraft.contract.Chooser.choose_draft``."""
        allowed = self._allowed(logits, position, 1)
        return choose_tokens(self._ops, allowed, self._settings, self._seed, self._stream, position)

    def _allowed(self, logits: Any, first_position: int, rows: int) -> Any:
        """Forbid tokens that would end the output where ``min_new_tokens`` is not reached."""
        early = min(self._free_from - first_position, rows)
        if early <= 0 or not self._ends:
            return logits
        row_indices = [row for row in range(early) for _ in self._ends]
        return self._ops.with_entries(self._ops.float32(logits), row_indices, self._ends * early, -math.inf)
