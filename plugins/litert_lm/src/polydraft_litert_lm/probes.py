"""Probes: whether a bug of the installed LiteRT-LM is still there. They run the engine on the built-in pair."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from polydraft import default_host
from polydraft.checkpoints.config import read_config
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan

__all__ = ["drafts_ignore_the_temperature"]

_TARGET = "tiny-e2b-litertlm"
_PROMPT = "def main():\n"
_TOKENS = 24
_COMPARED = 24
"""Characters."""


def drafts_ignore_the_temperature() -> bool:
    """Whether an answer with drafts is greedy from its second token on, at a high temperature."""
    from polydraft_litert_lm.loading import load_pair
    from polydraft_litert_lm.runtime import Sampler

    path = Path(default_host().local_models()[_TARGET].path)
    config = read_config(path / "config.json", _TARGET)
    target = ModelSource(id=f"builtin:{_TARGET}", kind="builtin", path=path, format="litertlm", config=config)
    plan = SpeculationPlan(kind="mtp", num_speculative_tokens=4, chosen_by="registry", k_chosen_by="recommended")
    engine = load_pair(LoadRequest(backend="litert_lm", target=target, plan=plan, context_length=256))
    tokenizer, hot = engine.tokenizer, Sampler(top_k=engine.tokenizer.vocab_size, top_p=1.0, temperature=3.0, seed=1)

    def answered(token_ids: list[int], sampler: Sampler, *, speculate: bool) -> str:
        with closing(
            engine.runtime.answer(tokenizer.contents(token_ids), sampler, _TOKENS, speculate=speculate)
        ) as answer:
            return "".join(piece.text for piece in answer.pieces() if piece is not None)

    try:
        prompt = [2, *tokenizer.encode(_PROMPT)]
        drafted = answered(prompt, hot, speculate=True)
        first = tokenizer.encode(drafted)[:1]  # which is chosen before there are drafts
        rest = answered([*prompt, *first], Sampler(top_k=1, top_p=1.0, temperature=1.0, seed=0), speculate=False)
    finally:
        engine.close()
    return rest[:_COMPARED] == drafted[len(tokenizer.vocabulary.join(first).decode()) :][:_COMPARED]
