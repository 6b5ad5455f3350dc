"""mlx-lm's own speculative decoding, ``stream_generate(draft_model=)``, on the same pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model
from polydraft.checkpoints.config import read_config
from polydraft.checkpoints.fetch import fetch
from polydraft.contract import HubOptions, LoadRequest, ModelSource

from polydraft_mlx.config import overrides

if TYPE_CHECKING:
    from polydraft_mlx.engine import MlxEngine

__all__ = ["StreamGenerate"]


class StreamGenerate:
    """Implements ``polydraft.contract.UpstreamCall``.

    Args:
        engine: The loaded pair. On the CPU, where its weights are laid out for this plugin's steps, mlx-lm gets models
            of its own.
        request: What was loaded.
    """

    def __init__(self, engine: MlxEngine, request: LoadRequest) -> None:
        assert request.plan.drafter is not None
        if engine.running.device == "cpu":
            self._target = _loaded(request.target, request.hub, engine.running.dtype)
            self._draft = _loaded(request.plan.drafter, request.hub, engine.running.dtype)
        else:
            self._target, self._draft = engine.target.model, engine.draft_model
        self._tokenizer: Any = load_tokenizer(fetch(request.target, request.hub))

    def __call__(
        self,
        prompt_token_ids: Sequence[int],
        k: int,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        emit: Callable[[Sequence[int]], None],
    ) -> None:
        """As ``UpstreamCall``."""
        self._tokenizer.eos_token_ids = set(eos_token_ids)
        drafting = {"draft_model": self._draft, "num_draft_tokens": k} if k else {}
        new: list[int] = []
        for step in stream_generate(
            self._target, self._tokenizer, list(prompt_token_ids), max_tokens=max_new_tokens, **drafting
        ):
            new.append(int(step.token))
            if not step.from_draft:  # the bonus token
                emit(new)
                new = []
        if new:
            emit(new)


def _loaded(source: ModelSource, hub: HubOptions, dtype: str) -> Any:
    path = fetch(source, hub)
    model, _ = load_model(path, model_config=overrides(read_config(path / "config.json", source.id), source.id))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    return model
