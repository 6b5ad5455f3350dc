"""An honest whole engine: its own loop over the reference model, with its own noise and rejection sampling.

It honours every setting but ``logits_processor``, and claims no seeds that mean the same with and without speculation,
as engines with their own samplers do. Defective ones are subclasses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from polydraft.contract import Generation, Round, TokenLogprobs, TokenRequest, WholeEngine
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import array_ops_of
from polydraft_reference.engine import ReferenceEngine

from polydraft_conformance.ngram_rule import ngram_drafts
from polydraft_conformance.oracle import next_token

__all__ = ["CLAIMS", "FEW_CLAIMS", "Whole", "softmax"]

Array = npt.NDArray[Any]

CLAIMS: dict[str, Any] = {
    "seed_identical": False,
    "exposes_logits": False,
    "reuses_prefixes": False,
    "exactness": frozenset({"standard"}),
    "sampling": frozenset(
        {
            *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "logprobs", "min_new_tokens"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
            *("banned_token_ids", "forced_token_ids"),
        }
    ),
}
"""What a whole engine with all settings claims."""
FEW_CLAIMS: dict[str, Any] = {**CLAIMS, "sampling": frozenset({"temperature", "seed"})}
"""What one with few settings claims, which shows no log-probabilities either."""


def softmax(logits: Array, temperature: float) -> Array:
    """Probabilities, float64."""
    shifted = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    shares: Array = shifted / shifted.sum()
    return shares


class Whole(WholeEngine):
    """Drafts are drawn from the drafter, accepted with probability min(1, p/q) (Leviathan et al. 2023)."""

    def __init__(self, engine: ReferenceEngine) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.running = engine.running

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Prefill; then draft, verify, accept until the output ends."""
        request = generation.request
        random = self.noise(request)
        sampler = RuleSampler(array_ops_of(self.engine), request)
        sequence = self.engine.open_sequence()
        try:
            step = sequence.prefill(request.prompt_token_ids, sampler, keep_logits=True)
            assert step.logits is not None
            rows = step.logits.numpy()
            newest = self.draw(random, self.probabilities(request, rows[0], ()))
            logprobs = self.scored(request, rows, [newest])
            yield generation.emit([newest], num_draft_tokens=0, num_accepted_tokens=0, logprobs=logprobs)
            while not self.ended(generation) and not generation.cancelled():
                k = min(request.num_speculative_tokens, self.running.context_length - sequence.length - 1)
                drafts, drafter_rows = self.draft(sequence, newest, k, sampler, request, random)
                base = sequence.length
                step = sequence.verify([newest, *drafts], sampler, keep_logits=True)
                assert step.logits is not None
                rows = step.logits.numpy()
                tokens, accepted = self.accept(random, rows, drafts, drafter_rows, request, generation.token_ids)
                logprobs = self.scored(request, rows, tokens)
                tokens, logprobs = self.emitted(tokens, logprobs, accepted)
                emitted = generation.emit(
                    tokens, num_draft_tokens=len(drafts), num_accepted_tokens=accepted, logprobs=logprobs
                )
                assert emitted.num_accepted_tokens is not None
                sequence.rollback(base + 1 + emitted.num_accepted_tokens)
                newest = emitted.token_ids[-1]
                if self.ended(generation):  # nothing is read after the last round
                    self.report(generation)
                yield emitted
        finally:
            sequence.close()

    def noise(self, request: TokenRequest) -> np.random.Generator:
        """Random numbers of one request."""
        return np.random.default_rng([request.seed, request.stream])

    def ended(self, generation: Generation) -> bool:
        """Whether the output has ended."""
        return generation.finish_reason is not None

    def draft(
        self, sequence: Any, newest: int, k: int, sampler: Any, request: TokenRequest, random: np.random.Generator
    ) -> tuple[Sequence[int], Any]:
        """k drafts, and the drafter's logits of each."""
        if k < 1 or not request.speculate:
            return [], []
        if self.running.method == "ngram":
            drafts = ngram_drafts([*sequence.token_ids, newest], k)
            return drafts, [None] * len(drafts)
        proposal = sequence.propose(newest, k, sampler, keep_logits=True)
        return proposal.token_ids, proposal.logits.numpy() if proposal.logits else []

    def accept(
        self,
        random: np.random.Generator,
        rows: Array,
        drafts: Sequence[int],
        drafter_rows: Any,
        request: TokenRequest,
        output: Sequence[int],
    ) -> tuple[list[int], int]:
        """The tokens of a round, and how many of them are accepted drafts."""
        tokens: list[int] = []
        for index, draft in enumerate(drafts):
            p = self.probabilities(request, rows[index], (*output, *tokens))
            tokens.append(self.reject(random, p, drafter_rows[index], draft, request))
            if tokens[-1] != draft:
                return tokens, index
        p = self.probabilities(request, rows[len(drafts)], (*output, *tokens))
        return [*tokens, self.draw(random, p)], len(drafts)

    def probabilities(self, request: TokenRequest, row: Array, output: Sequence[int]) -> Array:
        """The target's probabilities of the next token under the settings."""
        return next_token(row, request.settings, request.prompt_token_ids, output, request.eos_token_ids)

    def reject(
        self, random: np.random.Generator, p: Array, drafter_row: Array, draft: int, request: TokenRequest
    ) -> int:
        """A sample of the target: the draft was chosen for certain, so q is 1 there."""
        if random.random() < p[draft]:
            return draft
        rest = p.copy()
        rest[draft] = 0.0
        return self.draw(random, rest / rest.sum())

    def draw(self, random: np.random.Generator, p: Array) -> int:
        """A sample."""
        return int(random.choice(len(p), p=p))

    def scored(self, request: TokenRequest, rows: Array, tokens: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
        """Log-probabilities of the tokens, as the core would give them."""
        if request.settings.logprobs is None:
            return None
        return token_logprobs(rows[: len(tokens)], tokens, request.settings.logprobs)

    def emitted(self, tokens: list[int], logprobs: Any, accepted: int) -> tuple[list[int], Any]:
        """What is emitted of a round: everything."""
        return tokens, logprobs

    def report(self, generation: Generation) -> None:
        """Report nothing: the counts of rounds are right."""
