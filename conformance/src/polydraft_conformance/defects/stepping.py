"""Stepping engines with a defect in a primitive or in the drafter."""

from __future__ import annotations

import itertools
import time
import zlib
from functools import partial
from typing import Any

import numpy as np
from polydraft.contract import Proposal, Step
from polydraft.sampling._sampler import RuleSampler
from polydraft_reference.model import ReferenceModel
from polydraft_reference.sequence import ReferenceSequence

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


class Unverified(ReferenceSequence):
    """Every draft is accepted."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        step = super().choose(logits, token_ids, sampler, keep_logits)
        return Step([*token_ids[1:], step.token_ids[-1]], step.logits, step.logprobs)


class OneDraftTooFew(ReferenceSequence):
    """k counts the bonus token."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return super().propose(newest, max(1, k - 1), sampler, keep_logits=keep_logits)


class Silent(ReferenceSequence):
    """The drafter is off."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return Proposal([])


class AlwaysWrong(ReferenceSequence):
    """The output is right, but no draft is."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        proposal = super().propose(newest, k, sampler, keep_logits=keep_logits)
        vocab_size = self.engine.target.config.vocab_size
        # Bytes of text become others, which never come: one token further may be right.
        return Proposal([(token + vocab_size // 2) % vocab_size for token in proposal.token_ids])


class TemperatureIgnored(ReferenceSequence):
    """Tokens are chosen greedily, whatever was asked for."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        if isinstance(sampler, RuleSampler):
            sampler._settings = sampler._settings.model_copy(update={"temperature": 0.0})
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)


class SeedIgnored(ReferenceSequence):
    """Tokens are drawn with a seed of its own, another one in each generation."""

    seeds = itertools.count(1)

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        if isinstance(sampler, RuleSampler):
            sampler._seed = next(self.seeds)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)


class StaleRow(ReferenceSequence):
    """The first row that was rolled back replaces the last kept one in the KV cache."""

    def rollback(self, length):
        kept = self.cache.copy() if self.length > length else None
        super().rollback(length)
        if kept is not None:
            kept.truncate(length + 1)
            for layer, other in zip(self.cache.layers, kept.layers, strict=True):
                keys, values = other.visible()
                slot = (layer.length - 1) % layer.capacity
                layer.keys[slot], layer.values[slot] = keys[-1], values[-1]


class WindowCorrupted(ReferenceSequence):
    """Steps past the sliding window damage the oldest row that is still visible."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        step = super().verify(token_ids, sampler, keep_logits=keep_logits)
        for layer in self.cache.layers:
            if layer.window is not None and layer.length > layer.window:
                layer.keys[(layer.length - layer.window + 1) % layer.capacity] *= -1.0
        return step


class Raising(ReferenceSequence):
    """Fails after some tokens."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        if self.length > 30:
            raise ValueError("no more")
        return super().verify(token_ids, sampler, keep_logits=keep_logits)


class Hanging(ReferenceSequence):
    """Never ends a step of two rows."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        if len(token_ids) == 2:
            time.sleep(1000)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)


class Crashing(ReferenceSequence):
    """Ends the process in steps of two rows."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        if len(token_ids) == 2:
            import os

            os._exit(3)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)


def perturbed(model, share):
    """A model whose weights are off by about ``share`` of themselves."""
    other = ReferenceModel(model.config, model.dtype)
    random = np.random.default_rng(5)
    for layer in other.layers:
        for name in ("projections", "output", "up", "down"):
            weight = getattr(layer, name)
            changed = (weight * (1 + share * random.standard_normal(weight.shape))).astype(weight.dtype)
            object.__setattr__(layer, name, changed)
    return other


class PerturbedWhileSpeculating(ReferenceSequence):
    """Once it has drafted, the target's weights are slightly different."""

    share = 0.02

    def __init__(self, engine):
        super().__init__(engine)
        self.drafted = False
        if not hasattr(engine, "perturbed"):
            engine.perturbed = perturbed(engine.target, self.share)
        self.perturbed = engine.perturbed

    def propose(self, newest, k, sampler, *, keep_logits=False):
        self.drafted = True
        return super().propose(newest, k, sampler, keep_logits=keep_logits)

    def run_row(self, token_id):
        model = self.perturbed if self.drafted else self.engine.target
        return model.logits(model.run(token_id, self.cache), token_id)


class LowPrecision(ReferenceSequence):
    """Logits are rounded to eighths, and rows of larger steps are off by up to one of them: near ties flip.

    Not a defect: this is what bfloat16 does. How a row is off depends on its position and its place in the step.
    """

    grid = 0.125

    def choose(self, logits, token_ids, sampler, keep_logits):
        return super().choose(self.rounded(logits), token_ids, sampler, keep_logits)

    def rounded(self, logits):
        rounded = np.round(logits / self.grid)
        if len(logits) > 1:
            first = self.length - len(logits)
            rounded = np.stack([self.off(line, first + row, row) for row, line in enumerate(rounded)])
        return (rounded * self.grid).astype(np.float32)

    def off(self, line, position, row):
        """A rounded row as it comes out in row ``row`` of a larger step."""
        key = zlib.crc32(f"{position} {row}".encode())
        return line + np.random.default_rng(key).integers(-1, 2, size=len(line))


class LowPrecisionPerturbed(LowPrecision, PerturbedWhileSpeculating):
    """Low precision, and slightly different weights while speculating."""

    share = 0.1


class TieSeeker(LowPrecision):
    """Once it has drafted, it takes, of all the ways a row can be off, one that flips the choice, if there is one."""

    grid = 0.5
    drafted = False

    def propose(self, newest, k, sampler, *, keep_logits=False):
        self.drafted = True
        return super().propose(newest, k, sampler, keep_logits=keep_logits)

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prompt_length = len(token_ids)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    def off(self, line, position, row):
        reachable = min(self.engine.running.num_speculative_tokens, position - self.prompt_length)
        places = [row, *range(reachable + 1)] if self.drafted else [row]
        lines = [super(TieSeeker, self).off(line, position, place) for place in places]
        return next((other for other in lines if other.argmax() != line.argmax()), lines[0])


class OtherBits(ReferenceSequence):
    """Rows of larger steps are off in the last bits: no token changes."""

    off = True

    def choose(self, logits, token_ids, sampler, keep_logits):
        if self.off and len(logits) > 1:
            logits = logits * np.float32(1 + 2.0**-22)
        return super().choose(logits, token_ids, sampler, keep_logits)


class OtherBitsLater(OtherBits):
    """The same, but an engine's first sequences are honest, so that the measurement at loading misses it."""

    def __init__(self, engine):
        super().__init__(engine)
        engine.opened = getattr(engine, "opened", 0) + 1
        self.off = engine.opened > 12


LOW_PRECISION: dict[str, Any] = {"dtype": "bfloat16", "exactness": frozenset({"standard"})}

DEFECTS = (
    Defect(
        "verification skipped",
        "test_greedy_equals_plain",
        "Speculation changed the greedy output",
        partial(defective, Unverified),
    ),
    Defect("k is off by one", "test_rounds_draft_k_tokens", "k is off", partial(defective, OneDraftTooFew)),
    Defect(
        "a stale row after rollback",
        "test_rollback_is_exact",
        "rows are left that were rolled back",
        partial(defective, StaleRow),
    ),
    Defect(
        "KV corrupted past the window",
        "test_steps_equal_prefill",
        "after plain steps to a context of",
        partial(defective, WindowCorrupted),
    ),
    Defect("drafter off", "test_drafts_are_made", "The drafter is silent", partial(defective, Silent)),
    Defect(
        "temperature ignored",
        "test_temperature_changes_the_output",
        "The temperature is ignored",
        partial(defective, TemperatureIgnored),
    ),
    Defect(
        "seed ignored",
        "test_seed_decides_the_output",
        "The seed is ignored",
        partial(defective, SeedIgnored),
    ),
    Defect("no draft is right", "test_drafts_are_accepted", "Acceptance is 0", partial(defective, AlwaysWrong)),
    Defect("it raises", "test_generates", "ValueError: no more", partial(defective, Raising)),
    Defect(
        "weights perturbed while speculating",
        "test_greedy_equals_plain",
        "DIVERGED",
        partial(defective, PerturbedWhileSpeculating),
    ),
    Defect(
        "weights perturbed in low precision",
        "test_greedy_equals_plain",
        "DIVERGED",
        partial(defective, LowPrecisionPerturbed, **LOW_PRECISION),
    ),
    Defect(
        "other bits, bitwise claimed",
        "test_bitwise_output_equals_plain",
        "`exactness='bitwise'` does not hold on cpu in float32",
        partial(defective, OtherBits),
    ),
    Defect(
        "other bits later, bitwise claimed",
        "test_bitwise_logits_equal_plain",
        "Bitwise exactness is broken in float32",
        partial(defective, OtherBitsLater),
    ),
    Defect(
        "near ties are sought out",
        "test_near_ties_as_rare_as_in_control",
        "Near ties are too frequent",
        partial(defective, TieSeeker, **LOW_PRECISION),
        quick=False,
    ),
)
