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


def drafts_ignore_the_temperature() -> bool:
    """Whether answers with drafts are the same for all seeds, at a temperature at which hardly two tokens are."""
    from polydraft_litert_lm.loading import load_pair
    from polydraft_litert_lm.runtime import Sampler

    path = Path(default_host().local_models()[_TARGET].path)
    config = read_config(path / "config.json", _TARGET)
    target = ModelSource(id=f"builtin:{_TARGET}", kind="builtin", path=path, format="litertlm", config=config)
    plan = SpeculationPlan(kind="mtp", num_speculative_tokens=4, chosen_by="registry", k_chosen_by="recommended")
    found = set()
    engine = load_pair(LoadRequest(backend="litert_lm", target=target, plan=plan, context_length=256))
    try:
        tokenizer = engine.tokenizer
        contents = tokenizer.contents([2, *tokenizer.encode(_PROMPT)])
        for seed in range(3):
            sampler = Sampler(top_k=tokenizer.vocab_size, top_p=1.0, temperature=3.0, seed=seed)
            with closing(engine.runtime.answer(contents, sampler, _TOKENS, speculate=True)) as answer:
                found.add("".join(piece.text for piece in answer.pieces() if piece is not None))
    finally:
        engine.close()
    return len(found) == 1
