"""Whole engines that apply a setting wrongly."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from polydraft.contract import GenerationSettings

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, FEW_CLAIMS, Whole
from polydraft_conformance.defects.making import defective
from polydraft_conformance.oracle import next_token

__all__ = ["DEFECTS"]

_SILENT_CLAIMS: dict[str, Any] = {**CLAIMS, "sampling": CLAIMS["sampling"] - {"logprobs"}}
"""All settings, but no log-probabilities."""


class Deaf(Whole):
    """Honours the temperature, and none of the other settings that it claims."""

    def probabilities(self, request, row, output):
        settings = GenerationSettings(temperature=request.settings.temperature)
        return next_token(row, settings, request.prompt_token_ids, output)


class RowByRow(Whole):
    """Honest: it knows a row's place in its round."""

    def rounds(self, generation):
        self.generation = generation
        yield from super().rounds(generation)

    def probabilities(self, request, row, output):
        place = len(output) - len(self.generation.token_ids)
        return self.shares(request, row, output, place if self.generation.token_ids else 0)

    def shares(self, request, row, output, place):
        """The probabilities of the row at a place of its round."""
        settings = self.settings(request, place)
        return next_token(row, settings, request.prompt_token_ids, output, request.eos_token_ids)

    def settings(self, request, place):
        """The settings of a row."""
        return request.settings


class Without(RowByRow):
    """Some rows ignore a setting."""

    name = ""
    rows = "drafted"

    def settings(self, request, place):
        ignored = {
            "drafted": place > 0,
            "speculating": request.speculate,
            "plain": not request.speculate,
        }[self.rows]
        neutral = GenerationSettings().model_dump()[self.name]
        return request.settings.model_copy(update={self.name: neutral}) if ignored else request.settings


def without(name: str, rows: str, claims: dict[str, Any]) -> Any:
    """A backend some rows of which ignore a setting."""
    return partial(defective, whole=type("Without", (Without,), {"name": name, "rows": rows}), **claims)


class OncePerRound(RowByRow):
    """Penalties miss the drafts before a row."""

    def shares(self, request, row, output, place):
        seen = output[: len(output) - place]
        if request.settings.forced_token_ids or request.settings.min_new_tokens:
            seen = output
        return next_token(row, request.settings, request.prompt_token_ids, seen, request.eos_token_ids)


class PromptCounts(RowByRow):
    """The prompt's tokens count for all penalties."""

    def shares(self, request, row, output, place):
        if not request.settings.presence_penalty:
            return super().shares(request, row, output, place)
        return next_token(row, request.settings, (), (*request.prompt_token_ids, *output), request.eos_token_ids)


class Clamped(RowByRow):
    """Temperatures above 1 are taken as 1."""

    def settings(self, request, place):
        return request.settings.model_copy(update={"temperature": min(1.0, request.settings.temperature)})


class StopIdsTooEarly(RowByRow):
    """``min_new_tokens`` suppresses EOS only."""

    def settings(self, request, place):
        return request.settings.model_copy(update={"stop_token_ids": ()})


class ScoredAfterTemperature(Whole):
    """Log-probabilities are taken after the temperature."""

    def scored(self, request, rows, tokens):
        return super().scored(request, rows / (request.settings.temperature or 1.0), tokens)


class ScoredOneLate(Whole):
    """Log-probabilities of drafted rows are those of the row before."""

    def scored(self, request, rows, tokens):
        return super().scored(request, np.concatenate([rows[:1], rows[:-1]]), tokens)


class SharedNoise(Whole):
    """All prompts of a batch are drawn with the same noise."""

    def noise(self, request):
        return np.random.default_rng(request.seed)


class SeedOfTheFirstToken(Whole):
    """The seed decides the first token only."""

    drawn = 0

    def draw(self, random, p):
        self.drawn += 1
        return super().draw(random if self.drawn == 1 else self.fixed, p)

    def rounds(self, generation):
        self.drawn, self.fixed = 0, np.random.default_rng(7)
        yield from super().rounds(generation)

    def reject(self, random, p, drafter_row, draft, request):
        return super().reject(self.fixed, p, drafter_row, draft, request)


class ScoredByDrafter(Whole):
    """Log-probabilities of drafted rows are the drafter's."""

    drafter_rows: Any = ()

    def accept(self, random, rows, drafts, drafter_rows, request, output):
        self.drafter_rows = drafter_rows
        return super().accept(random, rows, drafts, drafter_rows, request, output)

    def scored(self, request, rows, tokens):
        own = np.array(rows)
        if request.speculate and len(rows) > 1:  # the bonus row has no draft
            own[:-1] = self.drafter_rows[: len(rows) - 1]
        return super().scored(request, own, tokens)


_FOLLOW = "test_samples_follow_the_settings"

DEFECTS = (
    Defect(
        "whole: settings claimed, none honoured",
        _FOLLOW,
        "is ignored",
        partial(defective, whole=Deaf, **_SILENT_CLAIMS),
    ),
    Defect(
        "whole: top_p ignored while speculating",
        _FOLLOW,
        "`top_p` is ignored",
        without("top_p", "speculating", CLAIMS),
    ),
    Defect("whole: top_k in first rows only", _FOLLOW, "in drafted rows", without("top_k", "drafted", CLAIMS)),
    Defect(
        "whole: biases in first rows only", _FOLLOW, "`logit_bias`", without("logit_bias", "drafted", _SILENT_CLAIMS)
    ),
    Defect(
        "whole: bans in speculation only",
        _FOLLOW,
        "`banned_token_ids` is ignored",
        without("banned_token_ids", "plain", _SILENT_CLAIMS),
    ),
    Defect(
        "whole: forced ids forgotten in drafts",
        _FOLLOW,
        "`forced_token_ids` is ignored, in drafted rows",
        without("forced_token_ids", "drafted", CLAIMS),
    ),
    Defect(
        "whole: penalties once a round",
        _FOLLOW,
        "Penalties are counted once a round",
        partial(defective, whole=OncePerRound, **CLAIMS),
    ),
    Defect(
        "whole: presence of the prompt",
        _FOLLOW,
        "The prompt's tokens count for `presence_penalty`",
        partial(defective, whole=PromptCounts, **_SILENT_CLAIMS),
    ),
    Defect(
        "whole: temperature at most 1",
        _FOLLOW,
        "A temperature above 1 is taken as 1",
        partial(defective, whole=Clamped, **FEW_CLAIMS),
    ),
    Defect(
        "whole: stop ids before min_new_tokens",
        _FOLLOW,
        "`min_new_tokens` is ignored for stop ids",
        partial(defective, whole=StopIdsTooEarly, **CLAIMS),
    ),
    Defect(
        "whole: noise shared by a batch",
        "test_prompts_of_a_batch_have_their_own_noise",
        "Seed stream reused between prompts",
        partial(defective, whole=SharedNoise, **FEW_CLAIMS),
    ),
    Defect(
        "whole: seed of the first token",
        "test_seed_decides_every_token",
        "The seed decides the first token only",
        partial(defective, whole=SeedOfTheFirstToken, **FEW_CLAIMS),
        met_by=frozenset({"test_requests_at_once_are_their_single_runs"}),
    ),
    Defect(
        "whole: log-probabilities of the drafter",
        "test_logprobs_are_the_targets",
        "the drafter's, or another row's",
        partial(defective, whole=ScoredByDrafter, **CLAIMS),
    ),
    Defect(
        "whole: log-probabilities after temperature",
        "test_logprobs_are_the_targets",
        "Log-probabilities are taken after the temperature",
        partial(defective, whole=ScoredAfterTemperature, **CLAIMS),
    ),
    Defect(
        "whole: log-probabilities one row late",
        "test_logprobs_are_the_targets",
        "those of the token before, in drafted rows",
        partial(defective, whole=ScoredOneLate, **CLAIMS),
    ),
    Defect(
        "whole: `guided` claimed and ignored",
        "test_outputs_match",
        "does not match what `guided` asks for",
        partial(defective, whole=Whole, **{**CLAIMS, "sampling": CLAIMS["sampling"] | {"guided"}}),
    ),
)
