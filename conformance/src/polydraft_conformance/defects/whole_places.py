"""Whole engines that are wrong at some lengths, after some requests, or with several at once."""

from __future__ import annotations

import os
from functools import partial

from polydraft.errors import EngineError

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, FEW_CLAIMS, Whole
from polydraft_conformance.defects.making import defective

__all__ = ["DEFECTS"]


class Other:
    """A generation whose request is another one."""

    def __init__(self, generation, **changes):
        self.generation = generation
        self.request = generation.request.model_copy(update=changes)

    def __getattr__(self, name):
        return getattr(self.generation, name)


class LastTokenOfAChunk(Whole):
    """Where the prompt fills its last chunk of 128, another token replaces the last one."""

    def rounds(self, generation):
        prompt = generation.request.prompt_token_ids
        if len(prompt) % 128 == 0:
            generation = Other(generation, prompt_token_ids=(*prompt[:-1], prompt[-1] ^ 1))
        return super().rounds(generation)


class Truncated(Whole):
    """Of a prompt of more than 300 tokens the engine sees the last 300 only."""

    def rounds(self, generation):
        prompt = generation.request.prompt_token_ids
        return super().rounds(Other(generation, prompt_token_ids=prompt[-300:]))


class AtMostEight(Whole):
    """A larger k than 8 is taken for 8."""

    def draft(self, sequence, newest, k, sampler, request, random):
        return super().draft(sequence, newest, min(k, 8), sampler, request, random)


class DraftsAcceptedFar(Whole):
    """Past 300 tokens of context every draft is accepted."""

    def accept(self, random, rows, drafts, drafter_rows, request, output):
        if len(request.prompt_token_ids) + len(output) <= 300 or not drafts:
            return super().accept(random, rows, drafts, drafter_rows, request, output)
        p = self.probabilities(request, rows[len(drafts)], (*output, *drafts))
        return [*drafts, self.draw(random, p)], len(drafts)


class SlotsLeak(Whole):
    """A request that is closed early keeps its slot; there are 64."""

    slots = 64

    def rounds(self, generation):
        if self.slots == 0:
            raise EngineError("No slot is free.", "Wait.")
        self.slots -= 1
        yield from super().rounds(generation)
        self.slots += 1  # not reached if the caller closes the stream


class FilesLeak(Whole):
    """A request that is closed early leaves a file open."""

    def __init__(self, engine):
        super().__init__(engine)
        self.files: list[int] = []

    def rounds(self, generation):
        self.files.append(os.open(os.devnull, os.O_RDONLY))
        yield from super().rounds(generation)
        os.close(self.files.pop())

    def close(self):
        while self.files:
            os.close(self.files.pop())
        super().close()


class CancelHitsTheNext(Whole):
    """The flag of a request that was cancelled in its prefill is still set for the next one."""

    flag = False

    def rounds(self, generation):
        flag, self.flag = self.flag, False
        if flag:
            raise EngineError("The request was cancelled.", "Try again.")
        yield from super().rounds(generation)
        self.flag = generation.cancelled() and len(generation.token_ids) < 3


class Lasting(Whole):
    """A setting of the last request stays where the next one has the default."""

    name = ""
    last = None

    def rounds(self, generation):
        given = getattr(generation.request.settings, self.name)
        if given:
            self.last = given
        elif self.last:
            settings = generation.request.settings.model_copy(update={self.name: self.last})
            generation = Other(generation, settings=settings)
        return super().rounds(generation)


class BansLast(Lasting):
    """Banned tokens of the last request stay banned."""

    name = "banned_token_ids"


class PenaltyLasts(Lasting):
    """The presence penalty of the last request stays."""

    name = "presence_penalty"


class SortedByLength(Whole):
    """Of five and more requests that wait together, outputs come back in the order of the prompts' lengths."""

    def __init__(self, engine):
        super().__init__(engine)
        self.waiting = []

    def rounds(self, generation):
        self.waiting.append(generation)
        return self.run(generation, len(self.waiting) - 1)

    def run(self, generation, index):
        prompts = [each.request.prompt_token_ids for each in self.waiting]
        if len(prompts) >= 4 and index < len(prompts):
            generation = Other(generation, prompt_token_ids=sorted(prompts, key=len)[index])
        try:
            yield from super().rounds(generation)
        finally:
            if all(each.finish_reason or each.cancelled() for each in self.waiting):
                self.waiting.clear()


DEFECTS = (
    Defect(
        "whole: the last token of a full chunk is lost",
        "test_outputs_continue_themselves",
        "The output depends on where the prompt ends, at ",
        partial(defective, whole=LastTokenOfAChunk, **FEW_CLAIMS),
    ),
    Defect(
        "whole: long prompts are truncated",
        "test_outputs_continue_themselves",
        "from a length of",
        partial(defective, whole=Truncated, **CLAIMS),
    ),
    Defect(
        "whole: k is capped at 8",
        "test_every_k_drafts_k",
        "at most 8 tokens",
        partial(defective, whole=AtMostEight, **FEW_CLAIMS),
    ),
    Defect(
        "whole: drafts are not verified far on",
        "test_long_output_equals_plain",
        "Speculation changed a long output at context 30",
        partial(defective, whole=DraftsAcceptedFar, **FEW_CLAIMS),
        also=frozenset({"test_outputs_continue_themselves"}),
    ),
    Defect(
        "whole: a cancelled request keeps its slot",
        "test_cancelling_two_hundred_times",
        "A cancelled request keeps its slot",
        partial(defective, whole=SlotsLeak, **FEW_CLAIMS),
        met_by=frozenset({"test_long_outputs_draft_k_tokens"}),
    ),
    Defect(
        "whole: a cancelled request leaves a file open",
        "test_cancelling_two_hundred_times",
        "more open files",
        partial(defective, whole=FilesLeak, **FEW_CLAIMS),
    ),
    Defect(
        "whole: a cancel hits the next request",
        "test_cancelling_in_prefill",
        "the next request fails",
        partial(defective, whole=CancelHitsTheNext, **FEW_CLAIMS),
        met_by=frozenset({"test_cancelling_from_another_thread"}),
    ),
    Defect(
        "whole: bans of the last request stay",
        "test_settings_do_not_leak",
        "`banned_token_ids`",
        partial(defective, whole=BansLast, **CLAIMS),
    ),
    Defect(
        "whole: a penalty of the last request stays",
        "test_settings_do_not_leak",
        "`presence_penalty`",
        partial(defective, whole=PenaltyLasts, **CLAIMS),
    ),
    Defect(
        "whole: outputs sorted by the prompts' lengths",
        "test_requests_at_once_are_their_single_runs",
        "Outputs are given to the wrong requests",
        partial(defective, whole=SortedByLength, **FEW_CLAIMS),
        met_by=frozenset({"test_many_prompts"}),
    ),
)
