"""A stepping engine: polydraft runs the speculative loop, samples, stops and counts; the plugin runs the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from polydraft import contract
from polydraft.checkpoints.fetch import fetch
from polydraft.contract import Sampler, Step
from polydraft.engine_parts import context_length
from polydraft.engine_parts.draft_model import DraftModelSequence
from polydraft.errors import ModelFormatError, UnsupportedError
from polydraft.sampling.numpy_ops import NumpyLogits

from polydraft_markov.markov import VERSION, Markov
from polydraft_markov.tokenizer import ByteTokenizer


class SteppingMarkov(contract.Backend):
    """The backend ``markov``."""

    def capabilities(self) -> contract.Capabilities:
        """Claims that the conformance suite tests."""
        return contract.Capabilities(
            drafter_kinds=frozenset({"draft-model", "ngram"}),
            seed_identical=True,
            exposes_logits=True,
            concurrent_calls=True,
        )

    def diagnose(self) -> contract.Diagnosis:
        """Always usable. An engine that may be missing gives a reason, and the command that installs it."""
        return contract.Diagnosis(usable=True, engine_version=VERSION, devices=(contract.DeviceRecord(name="cpu"),))

    def load_engine(self, request: contract.LoadRequest) -> contract.SteppingEngine:
        """Refuse what the engine cannot do, then read the models."""
        if request.dtype not in {"auto", "float32"} or request.device not in {"auto", "cpu"}:
            raise UnsupportedError("Markov models run in float32 on the CPU.", "Leave out dtype and device.")
        sources = filter(None, [request.target, request.plan.drafter])
        try:
            models = [Markov.read(fetch(source), source.config) for source in sources]
        except (OSError, KeyError, ValueError) as error:
            raise ModelFormatError(f"{request.target.id} cannot be read: {error!r}.", "Install it again.") from error
        return MarkovEngine(request, *models)


class MarkovEngine(contract.SteppingEngine):
    """A loaded pair."""

    tokenizer = ByteTokenizer()

    def __init__(self, request: contract.LoadRequest, target: Markov, drafter: Markov | None = None) -> None:
        self.target, self.drafter = target, drafter
        self.running = contract.RunningInfo.of(
            request,
            engine="polydraft-markov",
            engine_version=VERSION,
            dtype="float32",
            device="cpu",
            context_length=context_length(request),
            concurrency="concurrent",
        )

    @property
    def max_draft_tokens(self) -> int:
        """The session's largest k."""
        return self.running.max_draft_tokens

    def open_sequence(self) -> contract.EngineSequence:
        """A sequence of the target; with a draft model, a second one that drafts for it."""
        target = MarkovSequence(self.target)
        if self.drafter is None:
            return target
        return DraftModelSequence(target, MarkovSequence(self.drafter), self.max_draft_tokens + 1)

    def close(self) -> None:
        """Nothing to free."""


class MarkovSequence(contract.EngineSequence):
    """One sequence. Its state is the tokens so far; a transformer stores their keys and values."""

    def __init__(self, model: Markov) -> None:
        self.model = model
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Tokens stored."""
        return len(self.tokens)

    def prefill(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the prompt, and choose the token after it: one row, that of the prompt's last token."""
        self.tokens += token_ids
        logits = self.model.logits(self.tokens)[None]  # shape (1, vocab)
        chosen, logprobs = sampler.choose(logits, self.length, token_ids[-1:])
        return Step(chosen, NumpyLogits(logits) if keep_logits else None, logprobs)

    def verify(self, token_ids: Sequence[int], sampler: Sampler, *, keep_logits: bool = False) -> Step:
        """Run the newest token and the drafts; row i holds the logits after the i-th of them."""
        first_position = self.length + 1  # of the token that row 0 chooses; before the step
        rows = []
        for token_id in token_ids:
            self.tokens.append(token_id)
            rows.append(self.model.logits(self.tokens))
        logits = np.stack(rows)  # shape (len(token_ids), vocab)
        chosen, logprobs = sampler.choose(logits, first_position, token_ids)  # all of them, not the last one alone
        return Step(chosen, NumpyLogits(logits) if keep_logits else None, logprobs)

    def rollback(self, length: int) -> None:
        """Forget the tokens that were not accepted."""
        del self.tokens[length:]

    def close(self) -> None:
        """Nothing to free."""
