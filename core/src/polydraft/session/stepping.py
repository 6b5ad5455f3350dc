"""A session that runs the core's loop over a stepping engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from polydraft.loop.drafting import EngineDrafts, NgramDrafts
from polydraft.loop.rounds import run_rounds
from polydraft.sampling.rejection import make_chooser
from polydraft.session.base import Session

if TYPE_CHECKING:
    from polydraft.contract.records import Capabilities
    from polydraft.contract.requests import LoadRequest
    from polydraft.contract.results import Round
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.loop.drafting import DraftSource
    from polydraft.sampling.chooser import RuleChooser
    from polydraft.session.stream import Generation

__all__ = ["SteppingSession"]


class SteppingSession(Session):
    """See ``Session``. ``engine`` is the stepping engine; each generation opens a sequence of its own.

    Args:
        engine: The loaded engine; the session closes it.
        request: What was loaded.
        capabilities: The backend's.
        notes: What the user should know beyond the engine's own notes.
    """

    def __init__(
        self, engine: SteppingEngine, request: LoadRequest, capabilities: Capabilities, notes: tuple[str, ...] = ()
    ) -> None:
        self.engine = engine
        running = engine.running(request)
        super().__init__(engine.tokenizer, running.model_copy(update={"notes": (*running.notes, *notes)}), capabilities)

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Run the loop on a new sequence."""
        request = generation.request
        chooser = make_chooser(self.engine.array_ops, request)
        try:
            yield from self._rounds(generation, chooser)
        finally:
            chooser.close(generation.tracker.token_ids)

    def _rounds(self, generation: Generation, chooser: RuleChooser) -> Iterator[Round]:
        request = generation.request
        sequence = self.engine.open_sequence()
        try:
            drafts: DraftSource | None = None
            if request.speculate:
                drafts = NgramDrafts() if self.running.method == "ngram" else EngineDrafts(sequence, chooser)
            yield from run_rounds(sequence, request, chooser, generation.tracker, drafts, generation.cancelled.is_set)
        finally:
            sequence.close()

    def close_engine(self) -> None:
        """Close the engine."""
        self.engine.close()
