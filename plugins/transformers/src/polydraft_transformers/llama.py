"""Llama's and Qwen3's text layers on a CPU in as few operations as torch allows, as ``gemma4`` does for Gemma 4.

Transformers' parameters become views of the joined ones. Architecture: modeling_llama.py and modeling_qwen3.py of
Transformers (5.17 to 5.22).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polydraft_transformers.fused_layers import Norm
from polydraft_transformers.gemma4 import attend_by_definition, is_plain, joined
from polydraft_transformers.kv_cache import KvCache

__all__ = ["LlamaNetwork", "is_llama"]

_MODELS = {"LlamaModel", "Qwen3Model"}
_ROPES = {"default", "linear", "llama3", "yarn"}
"""Whose frequencies do not depend on the length of the text."""


def is_llama(text_model: Any) -> bool:
    """Whether ``LlamaNetwork`` can run a text model: on a CPU, of a known class, its projections plain."""
    config = text_model.config
    return (
        type(text_model).__name__ in _MODELS
        and config.hidden_act == "silu"
        and text_model.embed_tokens.weight.device.type == "cpu"
        and (config.rope_parameters or {}).get("rope_type", "default") in _ROPES
        and is_plain(text_model)
    )


class _RoundedNorm:
    """Root-mean-square norm of the last axis, rounded to the weights' dtype before the gain."""

    def __init__(self, module: Any) -> None:
        self._weight: Tensor = module.weight.detach()
        self._eps: float = module.variance_epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self._weight.shape, None, self._eps) * self._weight


def _norm(module: Any) -> Norm | _RoundedNorm:
    if module.weight.dtype != torch.float32:
        return _RoundedNorm(module)
    return Norm(module.weight, module.weight.shape[0], module.variance_epsilon, module.weight)


class _Layer:
    def __init__(self, module: Any, index: int) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.index = index
        self.head_dim: int = attention.head_dim
        self.heads: int = attention.q_proj.out_features // self.head_dim
        self.kv_heads: int = attention.k_proj.out_features // self.head_dim
        self.groups = self.heads // self.kv_heads
        self.scale: float = attention.scaling
        self.projection = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.query_norm = _norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.out = attention.o_proj.weight.detach().t()
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj.weight.detach().t()
        self.before_attention = _norm(module.input_layernorm)
        self.before_dense = _norm(module.post_attention_layernorm)

    def run(self, hidden: Tensor, cos: Tensor, signed_sin: Tensor, mask: Tensor | None, cache: KvCache) -> Tensor:
        """Run rows: (rows, hidden_size) in and out."""
        rows, heads = len(hidden), self.heads
        projected = torch.mm(self.before_attention(hidden), self.projection.t()).view(rows, -1, self.head_dim)
        rotated = projected.narrow(1, 0, heads + self.kv_heads)
        if self.query_norm is not None and self.key_norm is not None:
            rotated = torch.cat([self.query_norm(rotated[:, :heads]), self.key_norm(rotated[:, heads:])], 1)
        # As in ``fused_layers.rotate_and_store_by_definition``.
        rotated = (rotated * cos).addcmul_(rotated.roll(self.head_dim // 2, -1), signed_sin)
        queries, keys = rotated.narrow(1, 0, heads), rotated.narrow(1, heads, self.kv_heads)
        values = projected.narrow(1, -self.kv_heads, self.kv_heads)
        seen = attend_by_definition(queries, keys, values, mask, cache, self.index, self.groups, self.scale)
        # No `addmm`: TorchScript makes two operations of it, whose bits may be others.
        hidden = torch.mm(seen.reshape(rows, -1), self.out).add_(hidden)
        gate, up = torch.mm(self.before_dense(hidden), self.gate_up.t()).chunk(2, -1)
        return torch.mm(functional.silu(gate).mul_(up), self.down).add_(hidden)


class LlamaNetwork:
    """The layers of a target or a draft model; see ``is_llama``."""

    def __init__(self, text_model: Any) -> None:
        self._embedding: Tensor = text_model.embed_tokens.weight.detach()
        self._layers = [_Layer(module, index) for index, module in enumerate(text_model.layers)]
        self._norm = _norm(text_model.norm)
        frequencies = text_model.rotary_emb.inv_freq.float()
        self._frequencies = torch.cat([-frequencies, frequencies])  # signed: see ``Gemma4Network``
        self._scaling: float = text_model.rotary_emb.attention_scaling

    def traceable(self, rows: int) -> bool:
        """All steps are."""
        return True

    def run(self, token_ids: Tensor, cache: KvCache) -> Tensor:
        """Run tokens, shape (rows,), and store their KV: final-normed hidden rows (rows, hidden_size)."""
        layout, hidden = cache.layout, functional.embedding(token_ids, self._embedding)
        angles = layout.positions.view(-1, 1, 1) * self._frequencies
        cos, sin = angles.cos(), angles.sin_()
        if self._scaling != 1.0:
            cos, sin = cos * self._scaling, sin * self._scaling
        cos, sin = cos.to(hidden.dtype), sin.to(hidden.dtype)
        masks, groups = layout.masks, self._layers[0].groups
        if not layout.is_prompt:  # a row for each folded query
            masks = {kind: mask if mask is None else mask.repeat_interleave(groups, 0) for kind, mask in masks.items()}
        for layer in self._layers:
            kind = "full_attention" if cache.windows[layer.index] is None else "sliding_attention"
            hidden = layer.run(hidden, cos, sin, masks[kind], cache)
        return self._norm(hidden)
