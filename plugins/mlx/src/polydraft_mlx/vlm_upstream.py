"""mlx-vlm's own MTP decoding, ``generate_step(draft_kind="mtp")``, on the same pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_vlm.generate import generate_step
from mlx_vlm.models import gemma4
from mlx_vlm.speculative.drafters import gemma4_assistant
from mlx_vlm.utils import load_model
from polydraft.checkpoints.config import read_config
from polydraft.checkpoints.fetch import fetch
from polydraft.contract import LoadRequest, ModelSource

from polydraft_mlx.config import overrides

__all__ = ["GenerateStep"]


class GenerateStep:
    """Implements ``polydraft.contract.UpstreamCall``.

    Args:
        request: What was loaded: mlx-vlm gets models of its own.
        dtype: The loaded pair's.
    """

    def __init__(self, request: LoadRequest, dtype: str) -> None:
        assert request.plan.drafter is not None
        path = fetch(request.target, request.hub)
        multimodal = "text_config" in read_config(path / "config.json", request.target.id)
        self._target = load_model(path) if multimodal else _text_alone(path, request.target)
        self._assistant = _assistant(fetch(request.plan.drafter, request.hub), request.plan.drafter)
        # Otherwise it changes k by itself.
        self._assistant.prefer_requested_block_size = True
        for model in (self._target, self._assistant):
            model.set_dtype(getattr(mx, dtype))
            model.eval()
            mx.eval(model.parameters())

    def __call__(
        self,
        prompt_token_ids: Sequence[int],
        k: int,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        emit: Callable[[Sequence[int]], None],
    ) -> None:
        """As ``UpstreamCall``."""
        drafting: dict[str, Any] = {}
        if k:
            drafting = {"draft_model": self._assistant, "draft_kind": "mtp", "draft_block_size": k + 1}
        rounds, new = 0, list[int]()
        for token, _ in generate_step(
            mx.array([list(prompt_token_ids)]),
            self._target,
            None,
            None,
            max_tokens=max_new_tokens,
            temperature=0.0,
            **drafting,
        ):
            # Grows by one in each round, before its tokens come.
            begun = len(self._assistant.accept_lens)
            if new and (begun != rounds or not k):
                emit(new)
                new = []
            rounds = begun
            new.append(int(token))
            if new[-1] in eos_token_ids:
                break
        if new:
            emit(new)


def _text_alone(path: Path, source: ModelSource) -> Any:
    """A checkpoint of the text model in mlx-vlm's multimodal class, next to a vision tower that never runs.

    mlx-vlm's class for text alone takes no assistants.
    """
    config = read_config(path / "config.json", source.id)
    text = {**config, **overrides(config, source.id)}
    vision = gemma4.VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=32, global_head_dim=32, position_embedding_size=16,
    )  # fmt: skip
    sizes = {name: text[name] for name in ("vocab_size", "hidden_size")}
    model = gemma4.Model(
        gemma4.ModelConfig(text_config=gemma4.TextConfig.from_dict(text), vision_config=vision, **sizes)
    )
    weights = {f"model.language_model.{name.removeprefix('model.')}": value for name, value in _weights(path).items()}
    model.load_weights(list(model.sanitize(weights).items()), strict=False)
    return model


def _assistant(path: Path, source: ModelSource) -> Any:
    config = dict(read_config(path / "config.json", source.id))
    config["text_config"] = {**config["text_config"], **overrides(config["text_config"], source.id)}
    made = gemma4_assistant.Gemma4AssistantDraftModel(gemma4_assistant.ModelConfig.from_dict(config))
    made.load_weights(list(made.sanitize(_weights(path)).items()), strict=True)
    return made


def _weights(path: Path) -> dict[str, mx.array]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in mx.load(str(file)).items()}
