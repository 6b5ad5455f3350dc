"""A short answer at load: whether the server drafts, and whether the target's logits are finite."""

from __future__ import annotations

from polydraft.contract import SpeculationPlan, Tokenizer

from polydraft_gguf.serving.client import Client
from polydraft_gguf.serving.rounds import check_finite

__all__ = ["drafts_as_planned"]

_CODE = "def add(a, b):\n    return a + b\n\n\n"
"""Code, which even a weak drafter continues."""
_TOKENS = 12


def drafts_as_planned(client: Client, tokenizer: Tokenizer, plan: SpeculationPlan, dtype: str) -> bool:
    """Whether the server drafts for a short answer, if the plan has a drafter. The answer is greedy: always the same.

    Raises:
        NonFiniteLogitsError: The target's logits, computed in ``dtype``, are not finite.
        EngineError: The server failed.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # N-grams are looked up in the prompt, too: there has to be one.
    prompt = [*bos, *tokenizer.encode(_CODE * (6 if plan.kind == "ngram" else 1) + "def ")]
    tokens = 1 if plan.kind is None else _TOKENS
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    timings = check_finite(client, body, len(prompt), dtype).get("timings")
    return plan.kind is None or (isinstance(timings, dict) and bool(timings.get("draft_n")))
