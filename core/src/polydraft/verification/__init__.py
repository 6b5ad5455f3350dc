"""Is speculative output the plain output? The verdict on a difference, and what it rests on.

``verdict`` judges; ``steps`` measures on stepping engines, ``logprobs`` on whole engines. The command line and the
conformance suite both use these, so that their verdicts mean the same.
"""

from polydraft.verification.logprobs import tie_from_logprobs
from polydraft.verification.steps import measure_tie
from polydraft.verification.verdict import Judgement, Tie, Verdict, first_difference, judge

__all__ = ["Judgement", "Tie", "Verdict", "first_difference", "judge", "measure_tie", "tie_from_logprobs"]
