"""Engines that do not draft as they should: sometimes, somewhere, or from the wrong context."""

from __future__ import annotations

from functools import partial

from polydraft.contract import Proposal
from polydraft.sampling._sampler import RuleSampler
from polydraft_reference.sequence import ReferenceSequence

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, FEW_CLAIMS, Whole
from polydraft_conformance.defects.making import defective
from polydraft_conformance.ngram_rule import ngram_drafts

__all__ = ["DEFECTS"]


class Counting(ReferenceSequence):
    """Knows where it is; ``k_of`` says how many tokens it drafts."""

    def __init__(self, engine, model=None):
        super().__init__(engine, model)
        self.rounds = 0
        self.rejected = False
        self.prompt_length = 0

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prompt_length = len(token_ids)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    def rollback(self, length):
        self.rejected = length < self.length
        super().rollback(length)

    def propose(self, newest, k, sampler, *, keep_logits=False):
        self.rounds += 1
        k = self.k_of(k, sampler)
        return super().propose(newest, k, sampler, keep_logits=keep_logits) if k else Proposal([])

    def k_of(self, k, sampler):
        """How many tokens are drafted."""
        return k


class StopsAfterTokens(Counting):
    """The drafter's buffer holds 40 tokens of output."""

    def k_of(self, k, sampler):
        return k if self.length - self.prompt_length < 40 else 0


class StopsAboveContext(Counting):
    """The drafter's context ends at 200 tokens."""

    def k_of(self, k, sampler):
        return k if self.length < 200 else 0


class SometimesFewer(Counting):
    """k - 1 tokens in each fifth round."""

    def k_of(self, k, sampler):
        return k - 1 if self.rounds % 5 == 0 else k


class FewerAfterRejection(Counting):
    """A heuristic that halves k after a rejected draft."""

    def k_of(self, k, sampler):
        return (k + 1) // 2 if self.rejected else k


class OffWhenSampling(Counting):
    """Drafts for greedy requests only."""

    def k_of(self, k, sampler):
        sampled = isinstance(sampler, RuleSampler) and sampler._settings.temperature > 0
        return 0 if sampled else k


class NgramsInstead(ReferenceSequence):
    """N-grams of the text in place of the drafter, padded to k."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return Proposal(ngram_drafts([*self.token_ids, newest], k) or [newest] * k)


class ShiftedContext(ReferenceSequence):
    """Beyond 128 tokens the drafter does not see the last one."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        if self.length <= 128:
            return super().propose(newest, k, sampler, keep_logits=keep_logits)
        kept, self.cache = self.cache, self.cache.copy()
        self.cache.truncate(self.length - 1)
        try:
            return super().propose(newest, k, sampler, keep_logits=keep_logits)
        finally:
            self.cache = kept


class StaleAfterRejection(Counting):
    """Beyond 100 tokens, after a rejection the drafter starts from the token before the newest one."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        stale = self.rejected and self.length > 100
        token = self.token_ids[-1] if stale else newest
        return super().propose(token, k, sampler, keep_logits=keep_logits)


class LastTokensOnly(ReferenceSequence):
    """The drafter's attention sees the last 48 tokens."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        kept, self.cache = self.cache, self.cache.copy()
        for layer in self.cache.layers:
            if layer.window is None:
                layer.values[: max(0, layer.length - 48)] = 0
        try:
            return super().propose(newest, k, sampler, keep_logits=keep_logits)
        finally:
            self.cache = kept


class OffWithLogprobs(Whole):
    """Log-probabilities of drafted rows are not computed, so nothing is drafted."""

    def draft(self, sequence, newest, k, sampler, request, random):
        if request.settings.logprobs is not None:
            return [], []
        return super().draft(sequence, newest, k, sampler, request, random)


class OffAfterCancel(Whole):
    """A cancelled request leaves its drafter's slot taken."""

    taken = False

    def rounds(self, generation):
        try:
            yield from super().rounds(generation)
        finally:
            self.taken = self.taken or generation.finish_reason is None

    def draft(self, sequence, newest, k, sampler, request, random):
        return ([], []) if self.taken else super().draft(sequence, newest, k, sampler, request, random)


_LONG = "test_long_outputs_draft_k_tokens"
_ROUNDS = "test_rounds_draft_k_tokens"
_REQUESTS = "test_every_request_drafts_k_tokens"

DEFECTS = (
    Defect("drafting stops after 40 tokens", _LONG, "Drafting stops after 4", partial(defective, StopsAfterTokens)),
    Defect(
        "drafting stops above a context of 200",
        _LONG,
        "Drafting stops above a context of 20",
        partial(defective, StopsAboveContext),
    ),
    Defect("k - 1 in some rounds", _ROUNDS, "k is used only sometimes", partial(defective, SometimesFewer)),
    Defect(
        "fewer drafts after a rejection",
        _ROUNDS,
        "Fewer tokens are drafted after a rejected draft",
        partial(defective, FewerAfterRejection),
    ),
    Defect(
        "no drafts when sampling",
        _REQUESTS,
        "The drafter is silent: none of",
        partial(defective, OffWhenSampling),
        also=frozenset({"test_sampled_drafts_are_accepted", "test_sample_equals_plain"}),
    ),
    Defect(
        "n-grams in place of the drafter",
        "test_right_drafts_are_accepted",
        "N-grams are drafted in place of the model",
        partial(defective, NgramsInstead),
    ),
    Defect(
        "the drafter's context is shifted",
        "test_right_drafts_are_accepted",
        "`choose_draft` was given the position",  # the core's own error
        partial(defective, ShiftedContext),
        met_by=frozenset({"test_usual_requests_equal_the_suites"}),
    ),
    Defect(
        "a stale token after a rejection",
        "test_far_drafts_equal_fresh_ones",
        "The drafter's context is wrong at a context of",
        partial(defective, StaleAfterRejection),
    ),
    Defect(
        "the drafter sees the last tokens only",
        "test_right_drafts_are_accepted",
        "A drafter that is always right is wrong from a context of",
        partial(defective, LastTokensOnly),
    ),
    Defect(
        "whole: drafting stops above a context of 200",
        _LONG,
        "Drafting stops above a context of 20",
        partial(defective, StopsAboveContext, whole=Whole, **FEW_CLAIMS),
    ),
    Defect(
        "whole: the drafter's context is shifted",
        "test_right_drafts_are_accepted",
        "A drafter that is always right is wrong from a context of 1",
        partial(defective, ShiftedContext, whole=Whole, **FEW_CLAIMS),
    ),
    Defect(
        "whole: no drafts with log-probabilities",
        _REQUESTS,
        "The drafter is silent: none of",
        partial(defective, whole=OffWithLogprobs, **CLAIMS),
    ),
    Defect(
        "whole: no drafts after a cancelled request",
        _REQUESTS,
        "The drafter is silent: none of",
        partial(defective, whole=OffAfterCancel, **FEW_CLAIMS),
        also=frozenset({"test_long_outputs_draft_k_tokens", "test_statistics_of_outputs_cut_short"}),
        met_by=frozenset({"test_long_outputs_draft_k_tokens"}),
    ),
)
