"""A stepping engine: polydraft runs the speculative loop, samples, stops and counts; here are the few primitives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from polydraft.contract import (
    Backend,
    Capabilities,
    Diagnosis,
    EngineSequence,
    LoadRequest,
    Proposal,
    RunningInfo,
    Sampler,
    Step,
    SteppingEngine,
)

from polydraft_markov import loading
from polydraft_markov.markov import Logits
from polydraft_markov.tokenizer import ByteTokenizer


class SteppingMarkov(Backend):
    """The backend ``markov``."""

    def capabilities(self) -> Capabilities:
        """What is claimed here, the conformance suite tests."""
        return Capabilities(
            drafter_kinds=frozenset({"draft-model", "ngram"}),
            seed_identical=True,
            exposes_logits=True,
            concurrent_calls=True,
        )

    def diagnose(self) -> Diagnosis:
        """See ``loading``."""
        return loading.diagnose()

    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """See ``loading``."""
        return MarkovEngine(loading.load(request, "markov"))


class MarkovEngine(SteppingEngine):
    """A loaded pair."""

    tokenizer = ByteTokenizer()

    def __init__(self, loaded: loading.Loaded) -> None:
        self.loaded = loaded

    @property
    def max_draft_tokens(self) -> int:
        """The session's k."""
        return self.loaded.running.num_speculative_tokens

    def running(self, request: LoadRequest) -> RunningInfo:
        """What really runs."""
        return self.loaded.running

    def open_sequence(self) -> EngineSequence:
        """A new, empty sequence."""
        return MarkovSequence(self.loaded)

    def close(self) -> None:
        """Nothing to free."""


class MarkovSequence(EngineSequence):
    """One sequence. Its state is the tokens so far; in a transformer it is their keys and values."""

    def __init__(self, loaded: loading.Loaded) -> None:
        self.loaded = loaded
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Tokens stored."""
        return len(self.tokens)

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt; only its last token's row is wanted."""
        self.tokens += token_ids[:-1]
        return self.verify(token_ids[-1:], sampler, keep_logits=keep_logits)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts; row i holds the logits after the i-th of them."""
        rows = []
        for token_id in token_ids:
            self.tokens.append(token_id)
            rows.append(self.loaded.target.logits(self.tokens))
        logits = np.stack(rows)
        chosen, logprobs = sampler.choose(logits, self.length - len(rows) + 1, token_ids)
        return Step(chosen, Rows(logits) if keep_logits else None, logprobs)

    def rollback(self, length: int) -> None:
        """Forget the tokens that were not accepted."""
        del self.tokens[length:]

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Run the drafter on its own choices, which use the noise that the target's choices will use."""
        drafts: list[int] = []
        rows: list[Logits] = []
        while self.loaded.drafter is not None and len(drafts) < k:
            run = [newest, *drafts]
            rows.append(self.loaded.drafter.logits([*self.tokens, *run]))
            drafts.append(int(sampler.choose_draft(rows[-1][None], self.length + len(run), run)[0]))
        return Proposal(drafts, Rows(np.stack(rows)) if keep_logits and rows else None)

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True)
class Rows:
    """Logits of one step, of shape (rows, vocab): implements ``polydraft.contract.LogitsHandle``."""

    array: Logits

    def numpy(self) -> Logits:
        """A copy on the host."""
        return self.array.copy()
