"""Is speculative output the plain output? The verdict on a difference, what it rests on, and what is kept of it.

One verdict: ``judge_outputs`` serves the conformance suite, ``polydraft verify`` and ``polydraft generate --compare``.
``_verdict`` holds its rule, ``_noise`` the numeric noise, ``_steps`` measures on stepping engines, ``_logprobs`` on
whole engines, ``_measure`` chooses between them. ``_run`` checks a session on the prompts of ``_plan``; ``_store``
keeps what it found for a ``_subject``; ``_gate`` is ``load(verified=...)``.
"""

from polydraft.verification._gate import VerificationWarning
from polydraft.verification._logprobs import tie_from_logprobs
from polydraft.verification._measure import judge_outputs
from polydraft.verification._noise import (
    EPSILON,
    GreedySampler,
    Logits,
    Noise,
    difference,
    epsilon_of,
    measure_noise,
)
from polydraft.verification._steps import measure_tie
from polydraft.verification._verdict import (
    MARGIN_LIMIT,
    VERDICTS,
    Judgement,
    Tie,
    Verdict,
    first_difference,
    judge,
)

__all__ = [
    "EPSILON",
    "MARGIN_LIMIT",
    "VERDICTS",
    "GreedySampler",
    "Judgement",
    "Logits",
    "Noise",
    "Tie",
    "Verdict",
    "VerificationWarning",
    "difference",
    "epsilon_of",
    "first_difference",
    "judge",
    "judge_outputs",
    "measure_noise",
    "measure_tie",
    "tie_from_logprobs",
]
