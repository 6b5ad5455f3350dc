"""Stepping engines with a defect in what later prompts reuse."""

from __future__ import annotations

from functools import partial

from polydraft._loop import kept
from polydraft_reference.sequence import ReferenceSequence

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, Whole
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


class NotRolledBack(ReferenceSequence):
    """The last row of what a kept sequence reuses is the first one that it should have forgotten."""

    parked = False

    def park(self):
        self.parked = True

    def rollback(self, length):
        stale = self.cache.copy() if self.parked and length < self.length else None
        self.parked = False
        super().rollback(length)
        if stale is not None:
            for layer, other in zip(self.cache.layers, stale.layers, strict=True):
                slot, next_slot = (length - 1) % layer.capacity, length % layer.capacity
                layer.keys[slot], layer.values[slot] = other.keys[next_slot], other.values[next_slot]


class RolledOver(ReferenceSequence):
    """A sliding layer goes back to rows that it has overwritten."""

    def reusable(self, length):
        return length

    def rollback(self, length):
        for layer in self.cache.layers:
            layer.written = min(layer.written, length)
        super().rollback(length)


class SharedBuffers(ReferenceSequence):
    """The buffers of a kept sequence are given to the next one."""

    def __init__(self, engine, model=None):
        super().__init__(engine, model)
        parked = vars(engine).setdefault("parked", [])
        if parked and self.model is engine.target:
            self.cache.layers[:] = parked.pop().layers
            for layer in self.cache.layers:
                layer.truncate(0)

    def park(self):
        self.lengths = [layer.length for layer in self.cache.layers]
        vars(self.engine)["parked"].append(self.cache)

    def rollback(self, length):
        for layer, stored in zip(self.cache.layers, vars(self).pop("lengths", ()), strict=False):
            layer.length = layer.written = stored
        super().rollback(length)

    def close(self):
        """The buffers are others'."""
        self.closed = True


class NothingReused(ReferenceSequence):
    """Claims what it does not do."""

    def reusable(self, length):
        return 0


class CountMadeUp(Whole):
    """Says that all of each prompt was there."""

    def rounds(self, generation):
        generation.report_reused(len(generation.request.prompt_token_ids) - 1)
        yield from super().rounds(generation)


def compared_by_length(monkeypatch):
    """Take two texts for equal as far as both go."""
    monkeypatch.setattr(kept, "_common", lambda one, other: min(len(one), len(other)))


DEFECTS = (
    Defect(
        "a kept sequence is rolled back to a stale row",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache was used",
        partial(defective, NotRolledBack),
    ),
    Defect(
        "a sliding layer goes back to what it has overwritten",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache was used",
        partial(defective, RolledOver),
    ),
    Defect(
        "the KV of another conversation",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache was used",
        partial(defective, SharedBuffers),
    ),
    Defect(
        "reuse is claimed, and there is none",
        "test_turns_reuse_what_is_there",
        "reused nothing",
        partial(defective, NothingReused),
    ),
    Defect(
        "whole: the number of reused tokens is made up",
        "test_turns_reuse_what_is_there",
        "tokens with what came before, and reports",
        partial(defective, whole=CountMadeUp, **{**CLAIMS, "reuses_prefixes": True}),
    ),
    Defect(
        "core: prompts are compared by their length",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache was used",
        defective,
        patch=compared_by_length,
    ),
)
