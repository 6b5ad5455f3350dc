"""Is speculative output the plain output? The verdict on a difference, what it rests on, and what is kept of it.

``verdict`` judges; ``steps`` measures on stepping engines, ``logprobs`` on whole engines, ``measure`` chooses between
them. The command line and the conformance suite both use these, so that their verdicts mean the same. ``run`` checks a
session (``polydraft verify``), on the prompts of ``plan``; ``store`` keeps what it found of a ``subject``; ``gate`` is
``load(verified=...)``.
"""

from polydraft.verification._gate import VerificationWarning
from polydraft.verification._logprobs import tie_from_logprobs
from polydraft.verification._steps import measure_tie
from polydraft.verification._verdict import Judgement, Tie, Verdict, first_difference, judge

__all__ = [
    "Judgement",
    "Tie",
    "Verdict",
    "VerificationWarning",
    "first_difference",
    "judge",
    "measure_tie",
    "tie_from_logprobs",
]
