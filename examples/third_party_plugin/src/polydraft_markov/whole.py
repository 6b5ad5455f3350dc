"""A whole engine: it keeps its own loop and sampler; the plugin translates requests and reports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from polydraft import Session
from polydraft._session import Generation
from polydraft.contract import Backend, Capabilities, Diagnosis, LoadRequest, Round

from polydraft_markov import loading
from polydraft_markov.markov import VOCAB_SIZE, Logits, generate
from polydraft_markov.tokenizer import ByteTokenizer


class WholeMarkov(Backend):
    """The backend ``markov-whole``."""

    def capabilities(self) -> Capabilities:
        """What is not claimed here, polydraft refuses: top_p, say, and log-probabilities."""
        return Capabilities(
            drafter_kinds=frozenset({"draft-model"}),
            sampling=frozenset({"temperature", "seed"}),
            seed_identical=True,
            concurrent_calls=True,
        )

    def diagnose(self) -> Diagnosis:
        """See ``loading``."""
        return loading.diagnose()

    def load(self, request: LoadRequest) -> Session:
        """See ``loading``."""
        loaded = loading.load(request, "markov-whole")
        return WholeSession(loaded, self.capabilities())


class WholeSession(Session):
    """A loaded pair."""

    def __init__(self, loaded: loading.Loaded, capabilities: Capabilities) -> None:
        super().__init__(ByteTokenizer(), loaded.running, capabilities)
        self.loaded = loaded

    def rounds(self, generation: Generation) -> Iterator[Round]:
        """Pass on what the engine emits, cut at the token that ends the output."""
        request = generation.request
        temperature = request.settings.temperature

        def choose(logits: Logits, position: int) -> int:
            if temperature == 0:
                return int(logits.argmax())
            noise = np.random.default_rng([request.seed, request.stream, position]).gumbel(size=VOCAB_SIZE)
            return int((logits / temperature + noise).argmax())

        prompt = request.prompt_token_ids
        drafter = self.loaded.drafter if request.speculate else None
        limit = min(request.settings.max_new_tokens, request.max_total_tokens - len(prompt))
        for output in generate(self.loaded.target, drafter, prompt, request.num_speculative_tokens, limit, choose):
            if generation.cancelled.is_set():
                return
            accepted, finished, emitted = len(output.tokens) - 1, None, 0
            while finished is None and emitted < len(output.tokens):
                finished = generation.tracker.push(output.tokens[emitted], is_draft=emitted < accepted)
                emitted += 1
            yield Round(
                token_ids=tuple(output.tokens[:emitted]),
                num_draft_tokens=output.drafted,
                num_accepted_tokens=min(accepted, emitted),
            )
            if finished is not None:
                return

    def close_engine(self) -> None:
        """Nothing to free."""
