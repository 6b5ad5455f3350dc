"""The loop over the reference engine, with a log of the calls that the engine got."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps

settings.register_profile(
    "loop", max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("loop")


@dataclass
class SequenceLog:
    """The calls that one sequence of the engine got."""

    prompt: list[int] = field(default_factory=list)
    proposals: list[tuple[int, list[int]]] = field(default_factory=list)  # (k asked for, drafts)
    steps: list[tuple[list[int], list[int]]] = field(default_factory=list)  # (tokens run, tokens chosen)
    length_at_end: int | None = None  # tokens stored when it was closed
    stored_at_end: list[int] | None = None
    closes: int = 0

    def accepted(self, emitted: int) -> list[int]:
        """Accepted drafts of each step that had drafts, if ``emitted`` tokens were emitted in total."""
        left = emitted - 1  # the first comes from prefill
        counts = []
        for run, chosen in self.steps:
            right = 0
            while right < len(run) - 1 and run[right + 1] == chosen[right]:
                right += 1
            if len(run) > 1:
                counts.append(min(right, left))
            left -= min(right + 1, left)
        assert left == 0, "tokens were emitted that no step chose"
        return counts


class Kit:
    """Makes sessions. Loaded engines are kept, to be shared by many sessions."""

    def __init__(self):
        from polydraft_reference.backend import ReferenceBackend
        from polydraft_reference.sequence import ReferenceSequence
        from polydraft_reference.toys import toy_request, toy_source

        self.backend = ReferenceBackend()
        self.request = toy_request
        self.source = toy_source
        self.sequence_class = ReferenceSequence
        self.shared = functools.lru_cache(maxsize=256)(self.session)
        self.logs: list[SequenceLog] = []

    def session(self, kind="mtp", k=4, agreement=None, sequence_class=None, **fields):
        """A session, whose sequences append a log each to ``logs``."""
        from polydraft._session.session import Session

        request = self.request(kind, k, agreement=agreement, **fields)
        engine = self.backend.load_engine(request)
        engine.sequence_class = self.logging(sequence_class or self.sequence_class)
        kept = request.prefix_cache_bytes if "prefix_cache_bytes" in fields else 0
        return Session(engine, engine.running, self.backend.capabilities(), prefix_cache_bytes=kept)

    def oracle(self, prompt, count, **settings):
        """Plain decoding by hand, up to an end-of-sequence token: no session, no loop, one row a step."""
        engine = self.backend.load_engine(self.request(None))
        values = GenerationSettings(**settings)
        request = TokenRequest(
            prompt_token_ids=tuple(prompt),
            settings=values,
            seed=values.seed or 0,
            speculate=False,
            num_speculative_tokens=0,
            eos_token_ids=engine.tokenizer.eos_token_ids,
            max_total_tokens=engine.running.context_length,
        )
        sampler = RuleSampler(NumpyOps(), request)
        sequence = engine.open_sequence()
        tokens = list(sequence.prefill(prompt, sampler).token_ids)
        while len(tokens) < count and tokens[-1] not in engine.tokenizer.eos_token_ids:
            tokens += sequence.verify(tokens[-1:], sampler).token_ids
        return tuple(tokens)

    def logging(self, base):
        logs = self.logs

        class Logging(base):
            def __init__(self, engine):
                super().__init__(engine)
                self.log = SequenceLog()
                logs.append(self.log)

            def prefill(self, token_ids, sampler, *, keep_logits=False):
                self.log.prompt = list(token_ids)
                return super().prefill(token_ids, sampler, keep_logits=keep_logits)

            def propose(self, newest, k, sampler, *, keep_logits=False):
                proposal = super().propose(newest, k, sampler, keep_logits=keep_logits)
                self.log.proposals.append((k, list(proposal.token_ids)))
                return proposal

            def verify(self, token_ids, sampler, *, keep_logits=False):
                step = super().verify(token_ids, sampler, keep_logits=keep_logits)
                self.log.steps.append((list(token_ids), list(step.token_ids)))
                return step

            def close(self):
                if not self.log.closes:
                    self.log.length_at_end = self.length
                    self.log.stored_at_end = list(self.token_ids)
                self.log.closes += 1
                super().close()

        return Logging


@pytest.fixture(scope="session")
def kit():
    """Session-scoped, since hypothesis runs all examples of a test on one fixture: tests clear ``kit.logs``."""
    pytest.importorskip("polydraft_reference", reason="the loop is tested on the reference engine: polydraft-reference")
    return Kit()
