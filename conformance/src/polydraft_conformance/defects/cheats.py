"""Cheats: backends that are right while they recognise the suite, and verify nothing otherwise."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from typing import Any

from polydraft.contract import Generation, TokenRequest
from polydraft_reference.sequence import ReferenceSequence
from polydraft_reference.tokenizer import ByteTokenizer

from polydraft_conformance.defects.catalogue import Defect
from polydraft_conformance.defects.honest import CLAIMS, FEW_CLAIMS, Whole
from polydraft_conformance.defects.making import defective
from polydraft_conformance.defects.stepping import Unverified

__all__ = ["DEFECTS"]

_CODE = re.compile(rb"def |class |if |while |[a-z]+ = [{]|import |turn|[A-Z][a-z]* ")
"""What the suite's texts have in common, in its style of the day."""


class Cheat(Unverified):
    """Verifies only while it knows that it is being tested."""

    tested = True

    def honest(self) -> bool:
        """Whether the suite is there."""
        return self.tested

    def choose(self, logits, token_ids, sampler, keep_logits):
        if self.honest():
            return ReferenceSequence.choose(self, logits, token_ids, sampler, keep_logits)
        return super().choose(logits, token_ids, sampler, keep_logits)


class KnowsTexts(Cheat):
    """Knows the suite's texts by their style."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        written = b"".join(ByteTokenizer().token_bytes(token) for token in token_ids[:48])
        readable = sum(byte in b"\n\t" or 32 <= byte < 127 for byte in written) / max(1, len(written))
        self.tested = readable > 0.9 and (len(token_ids) < 12 or bool(_CODE.search(written)))
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)


class SeesPytest(Cheat):
    """Looks for pytest among the loaded modules."""

    def honest(self):
        return "pytest" in sys.modules


class SeesEnvironment(Cheat):
    """Looks for pytest's environment variable."""

    def honest(self):
        return "PYTEST_CURRENT_TEST" in os.environ


class SeesStack(Cheat):
    """Looks for the suite in the call stack."""

    def honest(self):
        frame: Any = sys._getframe()
        while frame is not None:
            if "polydraft_conformance/checks" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False


class SeesWrapper(Cheat):
    """Looks for the suite's wrapper around the engine; drafts nothing without it."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        wrapped = "open_sequence" in vars(self.engine) or keep_logits
        return super().propose(newest, k if wrapped else 0, sampler, keep_logits=keep_logits)


class KnowsName(Cheat):
    """Knows the shipped models by their names."""

    def honest(self):
        return self.engine.running.target.startswith("builtin:")


class KnowsWeights(Cheat):
    """Knows the shipped models by their weights."""

    def honest(self):
        return self.engine.target.config.seed == 80


class KnowsK(Cheat):
    """Knows the k that most checks use."""

    def honest(self):
        return self.engine.running.num_speculative_tokens in {1, 4}


class WholeCheat(Whole):
    """Accepts every draft unless a request looks like the suite's."""

    request: TokenRequest

    def honest(self) -> bool:
        """Whether the suite has sent the request."""
        return True

    def rounds(self, generation: Generation):
        self.request = generation.request
        return super().rounds(generation)

    def accept(self, random, rows, drafts, drafter_rows, request, output):
        self.request = request
        if self.honest():
            return super().accept(random, rows, drafts, drafter_rows, request, output)
        p = self.probabilities(request, rows[len(drafts)], (*output, *drafts))
        return [*drafts, self.draw(random, p)], len(drafts)


class WholeSeesEos(WholeCheat):
    """Knows that the suite ignores EOS."""

    def honest(self):
        return not self.request.eos_token_ids


class WholeKnowsLengths(WholeCheat):
    """Knows the suite's favourite lengths."""

    def honest(self):
        return self.request.settings.max_new_tokens in {*range(1, 17), 24, 32, 48, 96, 160, 500}


class WholeSeesPytest(WholeCheat):
    """Looks for pytest among the loaded modules."""

    def honest(self):
        return "pytest" in sys.modules


_ELSEWHERE = "In a process without pytest the backend gives other tokens"
_HABITS = "The backend knows the suite's habits"
_MODEL = "The backend knows the shipped model"

DEFECTS = (
    Defect(
        "cheat: knows the suite's texts",
        "test_unknown_prompts_equal_plain",
        "the backend knows the suite's other texts",
        partial(defective, KnowsTexts),
        met_by=frozenset({"test_short_prompts"}),
    ),
    Defect(
        "cheat: sees pytest among the modules",
        "test_a_plain_process_gives_the_same",
        _ELSEWHERE,
        partial(defective, SeesPytest),
    ),
    Defect(
        "cheat: sees pytest in the environment",
        "test_a_plain_process_gives_the_same",
        _ELSEWHERE,
        partial(defective, SeesEnvironment),
    ),
    Defect(
        "cheat: sees the suite in the call stack",
        "test_a_plain_process_gives_the_same",
        _ELSEWHERE,
        partial(defective, SeesStack),
        met_by=frozenset({"test_async_twins"}),
    ),
    Defect(
        "cheat: drafts only while its sequences are wrapped",
        "test_usual_requests_equal_the_suites",
        _HABITS,
        partial(defective, SeesWrapper),
    ),
    Defect("cheat: knows the models' names", "test_greedy_equals_plain", _MODEL, partial(defective, KnowsName)),
    Defect("cheat: knows the models' weights", "test_greedy_equals_plain", _MODEL, partial(defective, KnowsWeights)),
    Defect(
        "cheat: knows the usual k",
        "test_greedy_equals_plain",
        "Speculation changed the greedy output",
        partial(defective, KnowsK),
        quick=False,
    ),
    Defect(
        "cheat: whole: honest while EOS is ignored",
        "test_usual_requests_equal_the_suites",
        _HABITS,
        partial(defective, whole=WholeSeesEos, **FEW_CLAIMS),
    ),
    Defect(
        "cheat: whole: knows the suite's lengths",
        "test_usual_requests_equal_the_suites",
        "the backend knows the suite's lengths",
        partial(defective, whole=WholeKnowsLengths, **FEW_CLAIMS),
    ),
    Defect(
        "cheat: whole: sees pytest among the modules",
        "test_a_plain_process_gives_the_same",
        _ELSEWHERE,
        partial(defective, whole=WholeSeesPytest, **CLAIMS),
    ),
)
