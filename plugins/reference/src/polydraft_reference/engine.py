"""The stepping engine: a loaded pair, and the sequences that the core's speculative loop runs on."""

from __future__ import annotations

from polydraft.contract import EngineSequence, RunningInfo, SteppingEngine
from polydraft.engine_parts.draft_model import DraftModelSequence

from polydraft_reference.drafters.mtp import AssistantDrafter
from polydraft_reference.model import ReferenceModel
from polydraft_reference.sequence import ReferenceSequence
from polydraft_reference.tokenizer import ByteTokenizer

__all__ = ["ReferenceEngine"]


class ReferenceEngine(SteppingEngine):
    """A toy target with its drafter.

    Args:
        target: The target.
        drafter: An assistant, a draft model, or None (n-grams, plain decoding).
        running: What runs: k and the context's length are read from it.
    """

    sequence_class: type[ReferenceSequence] = ReferenceSequence
    """The target's sequences; tests put a subclass with a defect here."""

    def __init__(
        self, target: ReferenceModel, drafter: AssistantDrafter | ReferenceModel | None, running: RunningInfo
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.target = target
        self.drafter = drafter
        self.running = running

    @property
    def max_draft_tokens(self) -> int:
        """The session's largest k."""
        return self.running.max_draft_tokens

    def open_sequence(self) -> EngineSequence:
        """A new, empty sequence. Several may be used at once, each by one thread."""
        target = self.sequence_class(self)
        if not isinstance(self.drafter, ReferenceModel):
            return target
        # A reference sequence runs and rolls back at most k + 1 tokens at a time.
        return DraftModelSequence(target, ReferenceSequence(self, self.drafter), step_rows=self.max_draft_tokens + 1)

    def close(self) -> None:
        """Nothing to free: memory goes with the last reference."""
