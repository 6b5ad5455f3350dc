"""Whole engines whose fault lies in what one round, or one request, keeps for the next."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, FEW_CLAIMS, Whole
from polydraft_conformance.defects.making import defective
from polydraft_conformance.defects.whole_places import Other

__all__ = ["DEFECTS"]

_BLOCK = 16


class NoiseOfTheFirstRound(Whole):
    """Each round seeds its generator again."""

    def accept(self, random, rows, drafts, drafter_rows, request, output):
        again = np.random.default_rng([request.seed, request.stream])
        return super().accept(again, rows, drafts, drafter_rows, request, output)


class AcceptsTooOften(Whole):
    """A draft is accepted with the root of its probability."""

    def reject(self, random, p, drafter_row, draft, request):
        if request.settings.temperature and random.random() < p[draft] ** 0.5:
            return draft
        return super().reject(random, p, drafter_row, draft, request)


class PrefixByBlocks(Whole):
    """Of a kept text whole blocks are compared with the prompt that goes on from it; what follows is taken as equal."""

    kept: tuple[int, ...] = ()

    def rounds(self, generation):
        prompt, kept = generation.request.prompt_token_ids, self.kept
        whole = len(kept) // _BLOCK * _BLOCK
        given = generation
        if whole > 0 and len(kept) < len(prompt) and prompt[:whole] == kept[:whole]:
            given = Other(generation, prompt_token_ids=(*kept, *prompt[len(kept) :]))
        try:
            yield from super().rounds(given)
        finally:
            self.kept = (*given.request.prompt_token_ids, *generation.token_ids)[:-1]


class FirstRequests(Whole):
    """From the fourth request on nothing is drafted (llama.cpp#19231: only the first request was)."""

    count = 0

    def rounds(self, generation):
        self.count += 1
        return super().rounds(generation)

    def draft(self, sequence, newest, k, sampler, request, random):
        return super().draft(sequence, newest, k if self.count < 4 else 0, sampler, request, random)


def _defect(name: str, check: str, cause: str, engine: type[Whole], claims: dict[str, Any], **more: Any) -> Defect:
    return Defect(f"whole: {name}", check, cause, partial(defective, whole=engine, **claims), **more)


_FOLLOW = "test_samples_follow_the_distribution"

DEFECTS = (
    _defect("noise that comes again in every round", _FOLLOW, "same in every round", NoiseOfTheFirstRound, FEW_CLAIMS),
    _defect("drafts are accepted too often", _FOLLOW, "Sampling is biased", AcceptsTooOften, FEW_CLAIMS),
    _defect(
        "a kept prefix is compared by whole blocks",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache",
        PrefixByBlocks,
        CLAIMS,
    ),
    _defect(
        "only the first requests are drafted for",
        "test_rounds_draft_k_tokens",
        "Only the first requests",
        FirstRequests,
        CLAIMS,
    ),
)
