"""One generation on a stepping engine: a sequence, a sampler and a source of drafts, and the loop over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from polydraft._loop.drafting import EngineDrafts, NgramDrafts
from polydraft._loop.rounds import run_rounds
from polydraft.sampling._rejection import make_sampler
from polydraft.sampling.numpy_ops import array_ops_of

if TYPE_CHECKING:
    from polydraft._loop.drafting import DraftSource
    from polydraft.contract.results import Round
    from polydraft.contract.stepping import SteppingEngine
    from polydraft.contract.whole import Generation

__all__ = ["stepping_rounds"]


def stepping_rounds(engine: SteppingEngine, generation: Generation) -> Iterator[Round]:
    """Run the loop of rounds on a new sequence. Errors are those of the engine's primitives."""
    request = generation.request
    sampler = make_sampler(array_ops_of(engine), request)
    try:
        with closing(engine.open_sequence()) as sequence:
            drafts: DraftSource | None = None
            if request.speculate:
                drafts = NgramDrafts() if engine.running.method == "ngram" else EngineDrafts(sequence, sampler)
            yield from run_rounds(sequence, generation, sampler, drafts)
    finally:
        sampler.close(generation.token_ids)
