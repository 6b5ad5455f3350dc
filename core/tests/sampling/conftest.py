"""Sessions of the reference engine, and plain decoding by hand that applies settings as their definitions say."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens

settings.register_profile(
    "sampling", max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("sampling")


class Toys:
    """Sessions by drafter and k; the engine is the pure-numpy one."""

    def __init__(self):
        from polydraft_reference.backend import ReferenceBackend
        from polydraft_reference.toys import toy_request

        self.backend = ReferenceBackend()
        self.toy_request = toy_request
        self.session = functools.lru_cache(maxsize=256)(self._session)
        self.engine = self.backend.load_engine(toy_request(None))

    def _session(self, kind="mtp", k=4, agreement=None):
        from polydraft._session.session import Session

        request = self.toy_request(kind, k, agreement=agreement)
        engine = self.backend.load_engine(request)
        return Session(engine, engine.running, self.backend.capabilities())

    def request(self, prompt, **given):
        """A plain request of the engine."""
        values = GenerationSettings(**given)
        return TokenRequest(
            prompt_token_ids=tuple(prompt),
            settings=values,
            seed=values.seed or 0,
            speculate=False,
            num_speculative_tokens=0,
            eos_token_ids=frozenset() if values.ignore_eos else self.engine.tokenizer.eos_token_ids,
            max_total_tokens=self.engine.running.context_length,
        )

    def by_definition(self, prompt, **given):
        """Plain decoding without the sampler: settings are applied to whole rows as they are defined."""
        settings = GenerationSettings(**given)
        prompt, output = list(prompt), []
        raw = RuleSampler(NumpyOps(), self.request(prompt))  # the engine needs one; its choices are not used
        sequence = self.engine.open_sequence()
        step = sequence.prefill(prompt, raw, keep_logits=True)
        ends = set(settings.stop_token_ids) | (set() if settings.ignore_eos else self.engine.tokenizer.eos_token_ids)
        while True:
            row = step.logits.numpy()[-1]
            row = defined(row, prompt, output, settings, ends)
            token_id = int(
                choose_tokens(NumpyOps(), row[None], settings, settings.seed or 0, 0, len(prompt) + len(output))[0]
            )
            output.append(settings.forced_token_ids.get(len(output), token_id))
            if output[-1] in ends or len(output) == settings.max_new_tokens:
                return tuple(output)
            step = sequence.verify(output[-1:], raw, keep_logits=True)


def defined(logits, prompt, output, settings, ends):
    """One row as the settings' definitions change it, in float32."""
    row = logits.astype(np.float32).copy()
    for token_id, bias in settings.logit_bias.items():
        row[token_id] += np.float32(bias)
    if settings.repetition_penalty != 1.0:
        for token_id in {*prompt, *output}:
            factor = settings.repetition_penalty if row[token_id] <= 0 else 1 / settings.repetition_penalty
            row[token_id] *= np.float32(factor)
    for token_id in set(output):
        count = np.float32(output.count(token_id))
        frequency, presence = np.float32(settings.frequency_penalty), np.float32(settings.presence_penalty)
        row[token_id] -= frequency * count + presence
    processor = settings.logits_processor
    if processor is not None:
        row = processor((*prompt, *output), row.copy())
    row = row.copy()
    row[list(settings.banned_token_ids)] = -math.inf
    if len(output) < settings.min_new_tokens:
        row[list(ends)] = -math.inf
    return row


@pytest.fixture(scope="session")
def toys():
    pytest.importorskip(
        "polydraft_reference", reason="settings are tested on the reference engine: polydraft-reference"
    )
    return Toys()
