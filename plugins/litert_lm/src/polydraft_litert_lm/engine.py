"""LiteRT-LM as an engine."""

from __future__ import annotations

from collections.abc import Iterator

from polydraft.contract import Generation, GenerationSettings, OffReason, Round, RunningInfo, WholeEngine
from polydraft.errors import UnsupportedError

from polydraft_litert_lm.rounds import Rounds
from polydraft_litert_lm.runtime import Runtime
from polydraft_litert_lm.tokenizer import LitertTokenizer

__all__ = ["LitertLmEngine"]


class LitertLmEngine(WholeEngine):
    """A loaded file.

    Args:
        tokenizer: The target's.
        running: What runs.
        runtime: The engine.
    """

    def __init__(self, tokenizer: LitertTokenizer, running: RunningInfo, runtime: Runtime) -> None:
        self.tokenizer: LitertTokenizer = tokenizer
        self.running = running
        self.runtime = runtime

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Generate with drafts or without."""
        drafts = self.running.num_speculative_tokens if generation.request.speculate else 0
        return iter(Rounds(self.runtime, self.tokenizer, generation, drafts=drafts))

    def check_settings(self, settings: GenerationSettings) -> None:
        """Refuse to go on after an end that cannot be written as text: LiteRT-LM always stops there."""
        if settings.ignore_eos and (token := self.tokenizer.unspoken_stop()) is not None:
            raise UnsupportedError(
                f"LiteRT-LM ends at token {token}, and cannot go on after it: its tokenizer does not read it in text.",
                "Leave out `ignore_eos`.",
            )

    def speculation_conflict(self, settings: GenerationSettings) -> OffReason | None:
        """With drafts LiteRT-LM takes the most likely token, whatever the temperature and the seed."""
        if settings.temperature == 0:
            return None
        return OffReason(
            code="settings",
            message="LiteRT-LM ignores the temperature and the seed when it drafts, and is always greedy.",
        )

    def close(self) -> None:
        """Free the engine."""
        self.runtime.close()
