"""Stepping engines that are wrong at some lengths, positions, k, in one dtype, or with several sequences open."""

from __future__ import annotations

from functools import partial

import numpy as np
from polydraft.contract import LoadRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.engine import ReferenceEngine
from polydraft_reference.sequence import ReferenceSequence

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.making import defective
from polydraft_conformance.defects.stepping import AlwaysWrong, LowPrecision, LowPrecisionPerturbed, Unverified

__all__ = ["DEFECTS", "in_sixteen_bits"]


def in_sixteen_bits(sequence: type[ReferenceSequence]) -> type[ReferenceBackend]:
    """A backend that takes bfloat16 as well, and runs these sequences in it; in float32 it is honest."""

    class SixteenBits(ReferenceBackend):
        def capabilities(self):
            return super().capabilities().model_copy(update={"exactness": frozenset({"standard"})})

        def load_engine(self, request: LoadRequest) -> ReferenceEngine:
            if request.dtype != "bfloat16":
                return super().load_engine(request)
            engine = super().load_engine(request.model_copy(update={"dtype": "float32"}))
            engine.sequence_class = sequence
            engine.running = engine.running.model_copy(update={"dtype": "bfloat16"})
            return engine

    return SixteenBits


class LastTokenOfAChunk(ReferenceSequence):
    """Where the prompt fills its last chunk of 256, another token replaces the last one."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        if len(token_ids) % 256 == 0:
            token_ids = [*token_ids[:-1], token_ids[-1] ^ 1]
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)


class ChunkOfOne(ReferenceSequence):
    """The KV of a chunk of one token, the rest of a prompt cut into chunks of 64, is not stored."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        step = super().prefill(token_ids, sampler, keep_logits=keep_logits)
        if len(token_ids) > 64 and len(token_ids) % 64 == 1:
            forget_last_row(self)
        return step


class PromptOfOne(ReferenceSequence):
    """The KV of a prompt of one token is not stored."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        step = super().prefill(token_ids, sampler, keep_logits=keep_logits)
        if len(token_ids) == 1:
            forget_last_row(self)
        return step


def forget_last_row(sequence):
    """Overwrite the newest row of every layer with zeros."""
    for layer in sequence.cache.layers:
        slot = (layer.length - 1) % layer.capacity
        layer.keys[slot] = layer.values[slot] = 0.0


class StepsDrift(ReferenceSequence):
    """Steps (not prefills) take every position past 300 for 300."""

    stepping = False

    def verify(self, token_ids, sampler, *, keep_logits=False):
        self.stepping = True
        return super().verify(token_ids, sampler, keep_logits=keep_logits)

    def run_row(self, token_id):
        position = self.cache.length
        if not self.stepping or position <= 300:
            return super().run_row(token_id)
        model = self.model
        positions, model.positions = model.positions, np.broadcast_to(model.positions[300], model.positions.shape)
        try:
            return super().run_row(token_id)
        finally:
            model.positions = positions


class DraftedRowsDrift(ReferenceSequence):
    """Past 300 tokens of context, rows of the drafter's own drafts are those of other tokens."""

    drafted = False

    def propose(self, newest, k, sampler, *, keep_logits=False):
        self.drafted = True
        return super().propose(newest, k, sampler, keep_logits=keep_logits)

    def choose(self, logits, token_ids, sampler, keep_logits):
        if self.drafted and self.length > 300 and len(logits) > 1:
            logits = np.concatenate([logits[:1], np.roll(logits[1:], 1, axis=1)])
        return super().choose(logits, token_ids, sampler, keep_logits)


class AtMostEight(ReferenceSequence):
    """Buffers hold 8 drafts: a larger k is taken for 8."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return super().propose(newest, min(k, 8), sampler, keep_logits=keep_logits)


class SameLength(ReferenceSequence):
    """The KV cache of the last prompt is used again if the new one is as long."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        length, cache = vars(self.engine).get("kept", (0, None))
        if len(token_ids) < 8 or self.model is not self.engine.target:
            return super().prefill(token_ids, sampler, keep_logits=keep_logits)
        if length == len(token_ids):
            self.cache, self.token_ids = cache.copy(), list(token_ids[:-1])
        else:
            self.run(token_ids[:-1])
            vars(self.engine)["kept"] = len(token_ids), self.cache.copy()
        return self.choose(self.run(token_ids[-1:]), token_ids[-1:], sampler, keep_logits)


class GhostRows(ReferenceSequence):
    """A prefix cache believes to hold the newest token's row, where a rejected or no draft's is."""

    chosen = None

    def choose(self, logits, token_ids, sampler, keep_logits):
        step = super().choose(logits, token_ids, sampler, keep_logits)
        if isinstance(sampler, RuleSampler):  # of a request
            self.chosen = self.length - len(token_ids), step.token_ids
        return step

    def close(self):
        if not self.closed and self.chosen is not None:
            first, chosen = self.chosen
            kept_ids = [*self.token_ids, chosen[self.length - first - 1]]
            vars(self.engine)["kept"] = kept_ids, self.cache.copy()
        super().close()

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        kept_ids, cache = vars(self.engine).get("kept", ([], None))
        # Only a prompt that goes on from the whole of the last text: others are run.
        goes_on = len(token_ids) > len(kept_ids) and list(token_ids[: len(kept_ids)]) == kept_ids
        if not kept_ids or not goes_on or not isinstance(sampler, RuleSampler):
            return super().prefill(token_ids, sampler, keep_logits=keep_logits)
        self.cache = cache.copy()
        for layer in self.cache.layers:
            layer.length = len(kept_ids)
        self.token_ids = list(kept_ids)
        rest = token_ids[len(kept_ids) :]
        return self.choose(self.run(rest)[-1:], rest[-1:], sampler, keep_logits)


class LastOfTied(ReferenceSequence):
    """In steps of several rows the last of tied tokens is chosen."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        step = super().choose(logits, token_ids, sampler, keep_logits)
        processor = getattr(getattr(sampler, "_settings", None), "logits_processor", None)
        if processor is not None and len(logits) > 1:
            for index, row in enumerate(logits):
                seen = processor((), row[None])[0]
                if seen[step.token_ids[index]] == seen.max():
                    step.token_ids[index] = int(np.flatnonzero(seen == seen.max())[-1])
        return step


class RowsMixedUp(ReferenceSequence):
    """With four sequences open, a step's first row is that of another sequence."""

    def __init__(self, engine, model=None):
        super().__init__(engine, model)
        self.others = vars(engine).setdefault("opened", [])
        self.others.append(self)
        self.newest = None

    def choose(self, logits, token_ids, sampler, keep_logits):
        mine, self.newest = logits, logits[:1]
        other = next((each for each in self.others if each is not self and each.newest is not None), None)
        if len(self.others) >= 4 and other is not None:
            mine = np.concatenate([other.newest, logits[1:]])
        return super().choose(mine, token_ids, sampler, keep_logits)

    def close(self):
        if self in self.others:
            self.others.remove(self)
        super().close()


class LowPrecisionUnverified(LowPrecision, Unverified):
    """In low precision every draft is accepted."""


class LowPrecisionWrong(LowPrecision, AlwaysWrong):
    """In low precision no draft is right."""


DEFECTS = (
    Defect(
        "the last token of a full chunk is lost",
        "test_prefill_at_every_length",
        "at multiples of 256",
        partial(defective, LastTokenOfAChunk),
    ),
    Defect(
        "a chunk of one token is not stored",
        "test_prefill_at_every_length",
        "at one token past multiples of 64",
        partial(defective, ChunkOfOne),
    ),
    Defect(
        "a prompt of one token is not stored",
        "test_short_prompts",
        "another output than the prompt of 1 token",
        partial(defective, PromptOfOne),
    ),
    Defect(
        "steps drift after position 300",
        "test_prefill_at_every_length",
        "from a length of",
        partial(defective, StepsDrift),
        met_by=frozenset({"test_target_drafts_for_itself"}),
    ),
    Defect(
        "drafted rows drift after position 300",
        "test_long_output_equals_plain",
        "Speculation changed a long output at context 30",
        partial(defective, DraftedRowsDrift),
        met_by=frozenset({"test_right_drafts_are_accepted"}),
    ),
    Defect("k is capped at 8", "test_every_k_drafts_k", "at most 8 tokens", partial(defective, AtMostEight)),
    Defect(
        "the KV of a prompt of equal length is used again",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache was used",
        partial(defective, SameLength, reuses_prefixes=False),
        met_by=frozenset({"test_settings_do_not_leak"}),
    ),
    Defect(
        "ghost rows in a prefix cache",
        "test_next_turn_after_every_end",
        "ghost KV",
        partial(defective, GhostRows, reuses_prefixes=False),
    ),
    Defect(
        "the last of tied tokens in drafted rows",
        "test_ties_choose_the_lowest_id",
        "Ties are not broken by the lowest id",
        partial(defective, LastOfTied),
    ),
    Defect(
        "rows are mixed up when four sequences are open",
        "test_requests_at_once_are_their_single_runs",
        "rows or settings are mixed up",
        partial(defective, RowsMixedUp, reuses_prefixes=False),
    ),
    Defect(
        "bfloat16 only: verification skipped",
        "test_the_other_precision",
        "In bfloat16 only",
        partial(in_sixteen_bits, LowPrecisionUnverified),
    ),
    Defect(
        "bfloat16 only: weights perturbed while speculating",
        "test_the_other_precision",
        "In bfloat16 only",
        partial(in_sixteen_bits, LowPrecisionPerturbed),
    ),
    Defect(
        "bfloat16 only: no draft is right",
        "test_the_other_precision",
        "In bfloat16 only: few drafts are accepted",
        partial(in_sixteen_bits, LowPrecisionWrong),
    ),
)
