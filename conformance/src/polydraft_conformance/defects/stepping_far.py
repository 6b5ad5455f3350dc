"""Stepping engines that are right at the start of an output, for usual seeds, or in their own eyes only."""

from __future__ import annotations

import numpy as np
from polydraft.contract import DEFAULT_SETTINGS, Step
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling.numpy_ops import NumpyLogits
from polydraft_reference.sequence import ReferenceSequence

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


class Choosing(ReferenceSequence):
    """``before`` changes the logits that the sampler sees."""

    prompt = 0

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prompt = len(token_ids)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    def before(self, logits, settings, row, output): ...

    def choose(self, logits, token_ids, sampler, keep_logits):
        settings, seen = getattr(sampler, "_settings", DEFAULT_SETTINGS), logits.copy()
        first = self.length - len(token_ids) + 1
        for row in range(len(token_ids)):
            self.before(seen[row], settings, row, self.token_ids[self.prompt : first + row])
        step = super().choose(seen, token_ids, sampler, keep_logits)
        logprobs = step.logprobs and token_logprobs(logits, step.token_ids, settings.logprobs or 0)
        return Step(step.token_ids, NumpyLogits(logits) if keep_logits else None, logprobs)


class RepeatLast64(Choosing):
    """Penalties look at the last 64 tokens, as llama.cpp's do by default."""

    def before(self, logits, settings, row, output):
        recent = output[-64:]
        for token in set(output):
            logits[token] += settings.frequency_penalty * (output.count(token) - recent.count(token))
            logits[token] += settings.presence_penalty * (token not in recent)


class PeriodicNoise(ReferenceSequence):
    """The noise repeats itself every 256 positions."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        if "_pick" not in vars(sampler) and hasattr(sampler, "_pick"):
            honest = sampler._pick
            sampler._pick = lambda ops, rows, position: honest(ops, rows, position % 256)
        return super().choose(logits, token_ids, sampler, keep_logits)


class NegativeDivided(Choosing):
    """In drafted rows, the repetition penalty divides negative logits, too."""

    def before(self, logits, settings, row, output):
        if row and settings.repetition_penalty != 1.0:
            for token in {*self.token_ids[: self.prompt], *output}:
                logits[token] /= settings.repetition_penalty**2 if logits[token] < 0 else 1


class TemperatureTwice(ReferenceSequence):
    """Logits of a sampled request leave the model divided by the temperature; the sampler divides them again."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        temperature = getattr(sampler, "_settings", DEFAULT_SETTINGS).temperature
        return super().choose(logits / np.float32(temperature or 1.0), token_ids, sampler, keep_logits)


class FiveBest(ReferenceSequence):
    """At most five best tokens are listed."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        step = super().choose(logits, token_ids, sampler, keep_logits)
        if step.logprobs is None:
            return step
        fewer = tuple(entry.model_copy(update={"top": entry.top[:5]}) for entry in step.logprobs)
        return Step(step.token_ids, step.logits, fewer)


class SeedZero(ReferenceSequence):
    """Seed 0 means that a seed is drawn."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        if getattr(sampler, "_seed", 1) == 0:
            sampler._seed = int(np.random.default_rng().integers(1, 2**31))
        return super().choose(logits, token_ids, sampler, keep_logits)


class RoundedSeed(ReferenceSequence):
    """Seeds pass through a float."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        if hasattr(sampler, "_seed"):
            sampler._seed = int(float(sampler._seed))
        return super().choose(logits, token_ids, sampler, keep_logits)


class StopsWhileSampling(ReferenceSequence):
    """Beyond 60 output tokens, sampled requests are not drafted for."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        output = self.length - getattr(self, "prompt", self.length)
        if getattr(sampler, "_settings", DEFAULT_SETTINGS).temperature and output > 60:
            k = 0
        return super().propose(newest, k, sampler, keep_logits=keep_logits)

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prompt = len(token_ids)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)


def far(
    name: str,
    sequence: type[ReferenceSequence],
    cause: str,
    check: str = "test_settings_hold_in_long_outputs",
    met_by: frozenset[str] = frozenset(),
) -> Defect:
    """A defect that the check of long outputs finds, unless another is named."""
    return Defect(f"far: {name}", check, cause, lambda: defective(sequence), met_by=met_by)


DEFECTS: tuple[Defect, ...] = (
    far(
        "penalties forget",
        RepeatLast64,
        "Penalties look at the last 64 tokens only",
        met_by=frozenset({"test_settings_decide_every_choice"}),
    ),
    far("noise repeats itself", PeriodicNoise, "that of position p is that of p mod 256"),
    far("temperature twice", TemperatureTwice, "The temperature is applied twice", "test_settings_decide_every_choice"),
    far("five best tokens", FiveBest, "The best tokens are not all listed: 5 instead of"),
    far("drafting stops while sampling", StopsWhileSampling, "Drafting stops"),
    far("negative logits divided", NegativeDivided, "divides negative logits", "test_settings_decide_every_choice"),
    far("seed 0 is none", SeedZero, "Seed 0 is taken as no seed", "test_seed_decides_the_output"),
    far("seed rounded", RoundedSeed, "Large seeds are rounded", "test_seed_decides_the_output"),
)
