"""Stepping engines that choose tokens by themselves, and apply a setting wrongly."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from polydraft.contract import GenerationSettings, Step
from polydraft.sampling._logprobs import token_logprobs
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.noise import row_keys
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft_reference.sequence import ReferenceSequence

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.making import defective
from polydraft_conformance.oracle import next_token

__all__ = ["DEFECTS", "OwnSampler"]

Array = npt.NDArray[Any]
_OPS = NumpyOps()


class OwnSampler(ReferenceSequence):
    """Honest: chooses tokens by the rule, but not with the sampler that it is given."""

    prompt_length = 0

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prompt_length = len(token_ids)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    def choose(self, logits, token_ids, sampler, keep_logits):
        step = super().choose(logits, token_ids, sampler, keep_logits)
        if type(sampler) is not RuleSampler or sampler._settings.logits_processor is not None:
            return step
        if sampler._settings.guided is not None:
            return step
        settings, chosen = sampler._settings, []
        for row, line in enumerate(logits):
            text = self.token_ids[: len(self.token_ids) - len(logits) + row + 1]
            prompt, output = text[: self.prompt_length], text[self.prompt_length :]
            ends = set() if sampler._bans is None else set(map(int, sampler._bans._early))
            shares = self.shares(line, settings, prompt, output, ends - set(settings.stop_token_ids), row)
            position = self.position(len(text), row)
            low, high = row_keys(self.seed(sampler._seed, row, output), sampler._stream, range(position, position + 1))
            noise = _OPS.gumbel(np.arange(len(line))[None], np.array([low]), np.array([high]))[0]
            scores = np.where(shares > 0, np.log(np.maximum(shares, 1e-300)) + noise, -np.inf)
            chosen.append(int(scores.argmax()))
        top = settings.logprobs
        scored = self.scored(logits, settings)
        logprobs = None if top is None else token_logprobs(scored, chosen, top)
        return Step(chosen, step.logits, logprobs)

    def shares(self, line, settings, prompt, output, ends, row):
        """The probabilities of a row's token; ``ends``: EOS, where it is suppressed."""
        return next_token(line, self.settings(settings, row), prompt, output, ends)

    def settings(self, settings: GenerationSettings, row: int) -> GenerationSettings:
        """The settings of a row."""
        return settings

    def position(self, position: int, row: int) -> int:
        """The position that a row's noise is drawn for."""
        return position

    def seed(self, seed: int, row: int, output: list[int]) -> int:
        """The seed of a row."""
        return seed

    def scored(self, logits: Array, settings: GenerationSettings) -> Array:
        """The logits that log-probabilities are taken from."""
        return logits


class Without(OwnSampler):
    """Some rows ignore a setting."""

    name = ""
    rows = "drafted"

    def settings(self, settings, row):
        ignored = {"drafted": row > 0, "first": row == 0, "all": True}[self.rows]
        neutral = GenerationSettings().model_dump()[self.name]
        return settings.model_copy(update={self.name: neutral}) if ignored else settings


def without(name: str, rows: str = "drafted") -> Any:
    """A class of sequences some rows of which ignore a setting."""
    return partial(defective, type("Without", (Without,), {"name": name, "rows": rows}))


class OncePerRound(OwnSampler):
    """Penalties miss the drafts before a row."""

    def shares(self, line, settings, prompt, output, ends, row):
        if settings.forced_token_ids or settings.min_new_tokens:
            return super().shares(line, settings, prompt, output, ends, row)
        return next_token(line, settings, prompt, output[: len(output) - row], ends)


class PromptCounts(OwnSampler):
    """The presence penalty counts the prompt's tokens."""

    def shares(self, line, settings, prompt, output, ends, row):
        if not settings.presence_penalty:
            return super().shares(line, settings, prompt, output, ends, row)
        return next_token(line, settings, (), [*prompt, *output], ends)


class TemperatureLast(OwnSampler):
    """Filters see the probabilities at temperature 1."""

    def shares(self, line, settings, prompt, output, ends, row):
        if not settings.temperature or not (settings.top_p < 1 or settings.min_p):
            return super().shares(line, settings, prompt, output, ends, row)
        shares = next_token(line, settings.model_copy(update={"temperature": 1.0}), prompt, output, ends)
        shares = np.where(shares > 0, shares ** (1 / settings.temperature), 0.0)
        return shares / shares.sum()


class NegativeIgnored(OwnSampler):
    """Penalties below 0 are taken as 0."""

    def settings(self, settings, row):
        names = ("presence_penalty", "frequency_penalty")
        return settings.model_copy(update={name: max(0.0, getattr(settings, name)) for name in names})


class StopIdsTooEarly(OwnSampler):
    """``min_new_tokens`` suppresses EOS only."""

    def settings(self, settings, row):
        return settings.model_copy(update={"stop_token_ids": ()})


class NoiseOfTheFirstRow(OwnSampler):
    """Drafted rows are drawn with the noise of their round's first row."""

    def position(self, position, row):
        return position - row


class SeedOfTheFirstToken(OwnSampler):
    """The seed decides the first token only."""

    def seed(self, seed, row, output):
        return 0 if output else seed


class SharedNoise(OwnSampler):
    """All prompts of a batch are drawn with the same noise."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        sampler._stream = 0
        return super().choose(logits, token_ids, sampler, keep_logits)


class ScoredAfterTemperature(OwnSampler):
    """Log-probabilities are taken after the temperature."""

    def scored(self, logits, settings):
        return logits / settings.temperature if settings.temperature else logits


class ScoredOneRowLate(OwnSampler):
    """Log-probabilities of drafted rows are those of the row before."""

    def scored(self, logits, settings):
        return np.concatenate([logits[:1], logits[:-1]])


class UnmatchedDrafts(ReferenceSequence):
    """Drafted rows choose whatever the target likes best, be it allowed or not."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        step = super().choose(logits, token_ids, sampler, keep_logits)
        if type(sampler) is not RuleSampler or sampler._settings.guided is None:
            return step
        return Step([step.token_ids[0], *logits[1:].argmax(axis=-1).tolist()], step.logits, step.logprobs)


_EVERY = "test_settings_decide_every_choice"

DEFECTS = (
    Defect("stepping: top_k in first rows only", _EVERY, "`top_k` is ignored, in drafted rows", without("top_k")),
    Defect("stepping: top_p ignored in drafts", _EVERY, "`top_p` is ignored, in drafted rows", without("top_p")),
    Defect("stepping: min_p ignored", _EVERY, "`min_p` is ignored, in", without("min_p", "all")),
    Defect("stepping: typical_p ignored", _EVERY, "`typical_p` is ignored", without("typical_p", "all")),
    Defect("stepping: biases in first rows only", _EVERY, "`logit_bias` is ignored, in drafted", without("logit_bias")),
    Defect("stepping: forced ids forgotten in drafts", _EVERY, "`forced_token_ids` is", without("forced_token_ids")),
    Defect(
        "stepping: penalties once a round",
        _EVERY,
        "Penalties are counted once a round",
        partial(defective, OncePerRound),
    ),
    Defect(
        "stepping: presence of the prompt",
        _EVERY,
        "The prompt's tokens count for `presence_penalty`",
        partial(defective, PromptCounts),
    ),
    Defect(
        "stepping: temperature after filters",
        _EVERY,
        "The temperature is applied after",
        partial(defective, TemperatureLast),
    ),
    Defect(
        "stepping: negative penalties ignored",
        _EVERY,
        "which favours earlier tokens",
        partial(defective, NegativeIgnored),
    ),
    Defect(
        "stepping: stop ids before min_new_tokens",
        _EVERY,
        "`min_new_tokens` is ignored for stop ids",
        partial(defective, StopIdsTooEarly),
    ),
    Defect(
        "stepping: noise of the first row",
        _EVERY,
        "The noise is that of the round's first row",
        partial(defective, NoiseOfTheFirstRow),
    ),
    Defect(
        "stepping: seed of the first token",
        "test_seed_decides_the_output",
        "a seed decides the first token only",
        partial(defective, SeedOfTheFirstToken),
    ),
    Defect(
        "stepping: noise shared by a batch",
        "test_prompts_of_a_batch_have_their_own_noise",
        "Seed stream reused between prompts",
        partial(defective, SharedNoise),
    ),
    Defect(
        "stepping: log-probabilities after temperature",
        "test_logprobs_are_the_targets",
        "Log-probabilities are taken after the temperature",
        partial(defective, ScoredAfterTemperature),
    ),
    Defect(
        "stepping: log-probabilities one row late",
        "test_logprobs_are_the_targets",
        "those of the token before, in drafted rows",
        partial(defective, ScoredOneRowLate),
    ),
    Defect(
        "stepping: what must match forgotten in drafts",
        "test_outputs_match",
        "does not match what `guided` asks for",
        partial(defective, UnmatchedDrafts),
    ),
)
