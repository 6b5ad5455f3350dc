"""Whole engines with a defect."""

from __future__ import annotations

from functools import partial

import numpy as np
from polydraft.contract import GenerationSettings, GenerationStats
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import array_ops_of

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, FEW_CLAIMS, Whole, softmax
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


class BonusDropped(Whole):
    """The target's own token at the end of a round is lost where drafts were accepted."""

    def emitted(self, tokens, logprobs, accepted):
        return (tokens[:-1], logprobs and logprobs[:-1]) if accepted else (tokens, logprobs)


class Biased(Whole):
    """Transformers 5.22: drafts by argmax, accepts by the drafter's own probability of them."""

    def draft(self, sequence, newest, k, sampler, request, random):
        settings = GenerationSettings()  # greedy, and nothing else
        greedy = RuleSampler(array_ops_of(self.engine), request.model_copy(update={"settings": settings}))
        return super().draft(sequence, newest, k, greedy, request, random)

    def reject(self, random, p, drafter_row, draft, request):
        if request.settings.temperature == 0.0:
            return super().reject(random, p, drafter_row, draft, request)
        q = softmax(drafter_row, request.settings.temperature)
        if random.random() < p[draft] / q[draft]:
            return draft
        rest = np.maximum(p - q, 0.0)
        rest = rest if rest.sum() > 0 else p
        return self.draw(random, rest / rest.sum())


class WholeStatisticsMadeUp(Whole):
    """Says that every draft was accepted."""

    def report(self, generation):
        if not generation.request.speculate:
            return
        rounds = len(generation.token_ids) - 1
        generation.report(
            GenerationStats(
                num_tokens=rounds + 1,
                num_target_steps=rounds,
                num_drafts=rounds,
                num_draft_tokens=4 * rounds,
                num_accepted_tokens=4 * rounds,
                accepted_per_position=(rounds,) * 4,
            )
        )


class WholeSilent(Whole):
    """Speculation is silently off."""

    def draft(self, sequence, newest, k, sampler, request, random):
        return [], []


class WholeUnverified(Whole):
    """Every draft is accepted."""

    def accept(self, random, rows, drafts, drafter_rows, request, output):
        p = self.probabilities(request, rows[len(drafts)], (*output, *drafts))
        return [*drafts, self.draw(random, p)], len(drafts)


DEFECTS = (
    Defect(
        "whole: verification skipped",
        "test_greedy_equals_plain",
        "Speculation changed the greedy output",
        partial(defective, whole=WholeUnverified, **FEW_CLAIMS),
    ),
    Defect(
        "whole: bonus token dropped",
        "test_rounds_end_with_a_bonus_token",
        "The bonus token is missing",
        partial(defective, whole=BonusDropped, **FEW_CLAIMS),
    ),
    Defect(
        "whole: sampling biased",
        "test_samples_follow_the_distribution",
        "Sampling is biased while speculating",
        partial(defective, whole=Biased, **CLAIMS),
    ),
    Defect(
        "whole: statistics made up",
        "test_statistics_equal_counts",
        "Statistics are wrong",
        partial(defective, whole=WholeStatisticsMadeUp, **FEW_CLAIMS),
    ),
    Defect(
        "whole: drafter off",
        "test_drafts_are_made",
        "The drafter is silent",
        partial(defective, whole=WholeSilent, **FEW_CLAIMS),
    ),
)
