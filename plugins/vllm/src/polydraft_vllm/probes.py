"""Probes: whether a bug of the installed vLLM is still there. They run the engine on a built-in pair."""

from __future__ import annotations

from pathlib import Path

from polydraft import Session, default_host
from polydraft.checkpoints.config import read_config
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan
from polydraft.errors import PolydraftError

__all__ = ["draft_model_reads_one_kv_group"]

_TARGET = "tiny-31b"


def draft_model_reads_one_kv_group() -> bool:
    """Whether ``draft_model`` is still wrong with sliding and full attention.

    The target drafts for itself: if that is right, nearly all drafts are accepted and the output is that of plain
    decoding.
    """
    from polydraft_vllm.backend import VllmBackend
    from polydraft_vllm.loading import load_pair
    from polydraft_vllm.options import VllmOptions

    path = Path(default_host().local_models()[_TARGET].path)
    target = ModelSource(
        id=f"builtin:{_TARGET}",
        kind="builtin",
        path=path,
        format="safetensors",
        config=read_config(path / "config.json", _TARGET),
    )
    request = LoadRequest(
        backend="vllm",
        target=target,
        plan=SpeculationPlan(kind="draft-model", drafter=target, num_speculative_tokens=4, chosen_by="caller"),
        dtype="float32",
        context_length=1024,
        engine_options=VllmOptions(),
    )
    try:
        engine = load_pair(request)  # not through polydraft.load, which refuses the pair
        with Session(engine, engine.running, VllmBackend().capabilities()) as session:
            prompt = "def add(a, b):\n    return a + b\n\n\n" * 12
            plain = session.generate(prompt, max_new_tokens=64, ignore_eos=True, speculate="off")
            found = session.generate(prompt, max_new_tokens=64, ignore_eos=True)
    except PolydraftError:
        return True
    return found.token_ids != plain.token_ids or (found.stats.acceptance_rate or 0.0) < 0.9
