"""Sequences of the reference engine with a defect each."""

import time
from typing import ClassVar

import numpy as np
from polydraft.contract import Proposal, Step
from polydraft_reference.sequence import ReferenceSequence


class Unverified(ReferenceSequence):
    """Accepts every draft."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        step = super().verify(token_ids, sampler, keep_logits=keep_logits)
        return Step([*token_ids[1:], step.token_ids[-1]], step.logits, step.logprobs)


class Silent(ReferenceSequence):
    """Drafts nothing."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return Proposal([])


class NearlyTied(ReferenceSequence):
    """In steps of several rows the two best logits, where they are close, come out the other way round.

    The logit of a token that is never chosen moves more than that: the noise.
    """

    dtype = "bfloat16"

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, 0] += 0.3 * (len(token_ids) > 1)
        for row in logits:
            second, first = row.argsort()[-2:]
            if row[first] - row[second] < 0.2:
                row[first] = row[second] + (1e-3 if len(token_ids) == 1 else -1e-3)
        return super().choose(logits, token_ids, sampler, keep_logits)


class WrongBlocks(ReferenceSequence):
    """Rows of larger steps are far off, with a drafter and without one."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        if len(token_ids) > 1:
            random = np.random.default_rng(self.length)
            logits = (logits + 2 * random.standard_normal(logits.shape)).astype(np.float32)
        return super().choose(logits, token_ids, sampler, keep_logits)


class WrongBlocksInLowPrecision(WrongBlocks):
    """The same, in a dtype that rounds coarsely."""

    dtype = "bfloat16"


class Slow(ReferenceSequence):
    """A tenth of a second for each step."""

    def verify(self, token_ids, sampler, *, keep_logits=False):
        time.sleep(0.1)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)


class Compiling(ReferenceSequence):
    """30 ms for the first step of each number of rows and length, as where kernels are compiled."""

    device = "gpu"
    compiled: ClassVar[set[tuple[int, int]]] = set()

    def verify(self, token_ids, sampler, *, keep_logits=False):
        step = (len(token_ids), self.length)
        if step not in self.compiled:
            self.compiled.add(step)
            time.sleep(0.03)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)
