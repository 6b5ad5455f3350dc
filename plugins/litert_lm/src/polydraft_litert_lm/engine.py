"""LiteRT-LM as an engine: one of its engines, or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from polydraft.contract import Generation, GenerationSettings, OffReason, Round, RunningInfo, WholeEngine
from polydraft.errors import UnsupportedError

from polydraft_litert_lm.rounds import Rounds
from polydraft_litert_lm.runtime import Runtime
from polydraft_litert_lm.tokenizer import LitertTokenizer

__all__ = ["LitertLmEngine"]


class LitertLmEngine(WholeEngine):
    """One engine of LiteRT-LM. With versions that cannot switch drafts off for a call, plain calls go to a second one.

    Args:
        tokenizer: The target's.
        running: What runs.
        runtime: The engine, with the drafter, if there is one.
        make: Makes an engine of the same file: ``make(speculates=False)``.
        by_session: Whether drafts can be switched off for a call.
    """

    def __init__(
        self,
        tokenizer: LitertTokenizer,
        running: RunningInfo,
        runtime: Runtime,
        make: Callable[..., Runtime],
        *,
        by_session: bool,
    ) -> None:
        self.tokenizer: LitertTokenizer = tokenizer
        self.running = running
        self._runtime = runtime
        self._make = make
        self._by_session = by_session
        self._plain = runtime if by_session or not running.num_speculative_tokens else None

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Generate in the engine with or without drafts."""
        drafts = self.running.num_speculative_tokens if generation.request.speculate else 0
        if not drafts and self._plain is None:
            self._plain = self._make(speculates=False)
        runtime = self._runtime if drafts or self._plain is None else self._plain
        return iter(Rounds(runtime, self.tokenizer, generation, drafts=drafts, by_session=self._by_session))

    def check_settings(self, settings: GenerationSettings) -> None:
        """Refuse to go on after an end that cannot be written as text: LiteRT-LM always stops there."""
        if settings.ignore_eos and (token := self.tokenizer.unspoken_stop()) is not None:
            raise UnsupportedError(
                f"LiteRT-LM ends at token {token}, and cannot go on after it: its tokenizer does not read it in a text.",
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
        """Free the engines."""
        for runtime in {self._runtime, self._plain} - {None}:
            runtime.close()
