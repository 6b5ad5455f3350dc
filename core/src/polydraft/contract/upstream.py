"""``Upstream``: an engine's own speculative decoding, which ``polydraft bench --against upstream`` runs beside ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.contract.whole import WholeEngine

__all__ = ["Upstream", "UpstreamCall"]


class UpstreamCall(Protocol):
    """One greedy generation by the engine's own loop."""

    def __call__(
        self,
        prompt_token_ids: Sequence[int],
        k: int,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        emit: Callable[[Sequence[int]], None],
    ) -> None:
        """Generate.

        Args:
            prompt_token_ids: The prompt.
            k: Tokens drafted in a round, the bonus token excluded; 0: the engine's own plain decoding.
            max_new_tokens: The output's limit.
            eos_token_ids: They end the output; empty: nothing else than its limit does.
            emit: Called once in each round with its new tokens, as soon as they are known. It may raise to end the
                generation.
        """


@dataclass(frozen=True, slots=True)
class Upstream:
    """The engine's own way to decode a pair."""

    name: str
    """What a user would call, such as ``generate(assistant_model=)``."""
    open: Callable[[SteppingEngine | WholeEngine], UpstreamCall]
    """Called once with the loaded engine, whose models may be used: nothing else runs on them meanwhile."""
