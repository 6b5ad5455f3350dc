"""Whole engines that are wrong from what they keep of earlier requests."""

from __future__ import annotations

from functools import partial

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, Whole
from polydraft_conformance.defects.making import defective
from polydraft_conformance.defects.whole_places import Other

__all__ = ["DEFECTS"]

_BLOCK = 16


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


def _defect(name: str, check: str, cause: str, engine: type[Whole]) -> Defect:
    return Defect(f"whole: {name}", check, cause, partial(defective, whole=engine, **CLAIMS))


DEFECTS = (
    _defect(
        "a kept prefix is compared by whole blocks",
        "test_prompts_that_resemble_the_last",
        "an earlier prompt's cache",
        PrefixByBlocks,
    ),
    _defect(
        "only the first requests are drafted for",
        "test_drafts_are_made",
        "The drafter is silent",
        FirstRequests,
    ),
)
