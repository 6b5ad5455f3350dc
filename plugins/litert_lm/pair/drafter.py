"""A Gemma 4 assistant as the TFLite model that LiteRT-LM's speculative decoding runs (``llm_litert_mtp_drafter.cc``).

It attends to the target's KV cache of the last layer of each kind, and stores none of its own. LiteRT-LM calls it once
for each drafted token with these inputs, float32 unless said otherwise:

* ``activations`` [1, 1, 2 * backbone]: the embedding of the newest token in the target, and the last hidden state: the
  target's, or ``projected_activations`` of the call before.
* ``input_pos`` [1], int32: the position of the newest token, which is not in the cache yet.
* ``mask`` [1, 1, 1, cache]: 0 for positions up to ``input_pos``, a large negative number for others.
* ``kv_cache_k_N`` [1, heads, cache, head_dim] and ``kv_cache_v_N`` [1, heads, head_dim, cache] of the two layers N.

It gives ``logits`` [1, 1, vocabulary] and ``projected_activations`` [1, 1, backbone]. An assistant with a head of
centroids gets its logits from the whole embedding: drafts differ where a centroid's tokens would have been left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["convert_drafter"]

_FULL, _SLIDING = "full_attention", "sliding_attention"


class _Attention(nn.Module):
    """Queries of the assistant, keys and values of the target."""

    def __init__(self, config: dict[str, Any], kind: str, head_dim: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.heads, self.head_dim, self.epsilon = config["num_attention_heads"], head_dim, config["rms_norm_eps"]
        self.query, self.output = nn.Parameter(weights["q_proj.weight"]), nn.Parameter(weights["o_proj.weight"])
        self.norm = nn.Parameter(weights["q_norm.weight"])
        rope = config["rope_parameters"][kind]
        # Partial rotary embeddings turn the first pairs only: the others have frequency 0.
        turned = int(rope.get("partial_rotary_factor", 1.0) * head_dim) // 2
        steps = torch.arange(0, 2 * turned, 2).float() / head_dim
        frequencies = torch.cat([rope["rope_theta"] ** -steps, torch.zeros(head_dim // 2 - turned)])
        self.register_buffer("frequencies", frequencies)

    def forward(self, hidden: Tensor, position: Tensor, bias: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query = functional.linear(hidden, self.query).reshape(self.heads, 1, self.head_dim)
        query = _normalized(query, self.norm, self.epsilon)
        angles = position * self.frequencies
        cosine, sine = torch.cos(angles), torch.sin(angles)
        first, second = query[..., : self.head_dim // 2], query[..., self.head_dim // 2 :]
        query = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
        groups = keys.shape[1]
        # Gemma 4 scales neither queries nor keys: the norms do.
        scores = query.reshape(groups, self.heads // groups, self.head_dim) @ keys[0].transpose(-1, -2) + bias
        mixed = torch.softmax(scores, -1) @ values[0].transpose(-1, -2)
        return functional.linear(mixed.reshape(1, 1, self.heads * self.head_dim), self.output)


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any], kind: str, head_dim: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.kind, self.epsilon = kind, config["rms_norm_eps"]
        self.attention = _Attention(config, kind, head_dim, _below(weights, "self_attn."))
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self.norms = nn.ParameterList([nn.Parameter(weights[f"{name}_layernorm.weight"]) for name in norms])
        self.gate, self.up, self.down = (
            nn.Parameter(weights[f"mlp.{name}_proj.weight"]) for name in ("gate", "up", "down")
        )
        self.scale = nn.Parameter(weights["layer_scalar"])

    def forward(self, hidden: Tensor, position: Tensor, bias: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        before, after, before_mlp, after_mlp = self.norms
        mixed = self.attention(_normalized(hidden, before, self.epsilon), position, bias, keys, values)
        hidden = hidden + _normalized(mixed, after, self.epsilon)
        inner = _normalized(hidden, before_mlp, self.epsilon)
        gated = functional.gelu(functional.linear(inner, self.gate), approximate="tanh") * functional.linear(
            inner, self.up
        )
        return (hidden + _normalized(functional.linear(gated, self.down), after_mlp, self.epsilon)) * self.scale


class _Drafter(nn.Module):
    """The assistant in a folder, for targets whose last layers of each kind have the numbers ``layers``."""

    def __init__(self, folder: Path, layers: dict[str, int], cache: int) -> None:
        super().__init__()
        whole = json.loads((folder / "config.json").read_text("utf-8"))
        self.config, self.backbone, self.numbers, self.cache = (
            whole["text_config"],
            whole["backbone_hidden_size"],
            layers,
            cache,
        )
        config, kinds = self.config, self.config["layer_types"]
        weights = {name: values.float() for name, values in load_file(folder / "model.safetensors").items()}
        own = config.get("per_layer_config") or {}
        self.dims = {
            kind: own.get(str(index), {}).get("head_dim", config["head_dim"]) for index, kind in enumerate(kinds)
        }
        self.groups = {
            kind: own.get(str(index), {}).get("num_key_value_heads", config["num_key_value_heads"])
            for index, kind in enumerate(kinds)
        }
        self.layers = nn.ModuleList(
            [
                _Layer(config, kind, self.dims[kind], _below(weights, f"model.layers.{i}."))
                for i, kind in enumerate(kinds)
            ]
        )
        self.before, self.after = (nn.Parameter(weights[f"{name}_projection.weight"]) for name in ("pre", "post"))
        self.norm, self.embedding = (nn.Parameter(weights[f"model.{name}.weight"]) for name in ("norm", "embed_tokens"))

    def forward(self, activations: Tensor, input_pos: Tensor, mask: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        # As in Transformers, the query stands at the last cached position, and does not see the slot after it.
        position, places = (input_pos - 1).float(), torch.arange(self.cache)
        visible = (mask.reshape(-1) > -1.0) & (places < input_pos)
        near = visible & (places > input_pos - 1 - self.config["sliding_window"])
        hidden_away = torch.tensor(-1e9)
        bias = {_FULL: torch.where(visible, 0.0, hidden_away), _SLIDING: torch.where(near, 0.0, hidden_away)}
        hidden = functional.linear(activations, self.before)
        for layer in self.layers:
            number = self.numbers[layer.kind]
            keys, values = cache[f"kv_cache_k_{number}"], cache[f"kv_cache_v_{number}"]
            hidden = layer(hidden, position, bias[layer.kind], keys, values)
        hidden = _normalized(hidden, self.norm, self.config["rms_norm_eps"])
        return {
            "logits": functional.linear(hidden, self.embedding),
            "projected_activations": functional.linear(hidden, self.after),
        }

    def sample(self) -> dict[str, Tensor]:
        """Inputs of the right shapes."""
        inputs = {
            "activations": torch.ones(1, 1, 2 * self.backbone),
            "input_pos": torch.full((1,), 3, dtype=torch.int32),
            "mask": torch.zeros(1, 1, 1, self.cache),
        }
        for kind, number in self.numbers.items():
            heads, dim = self.groups[kind], self.dims[kind]
            inputs[f"kv_cache_k_{number}"] = torch.ones(1, heads, self.cache, dim)
            inputs[f"kv_cache_v_{number}"] = torch.ones(1, heads, dim, self.cache)
        return inputs


def convert_drafter(folder: Path, layers: dict[str, int], cache: int, output: Path) -> None:
    """Convert an assistant.

    Args:
        folder: Its checkpoint.
        layers: Kind of attention -> number of the target's layer whose keys and values it reads.
        cache: Rows of the target's KV cache.
        output: The TFLite file.
    """
    import litert_torch

    drafter = _Drafter(folder, layers, cache).eval()
    with torch.no_grad():
        converter = litert_torch.signature("mtp_drafter", drafter, sample_kwargs=drafter.sample())
        converter.convert(strict_export=False).export(str(output))


def _normalized(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm with Gemma 4's weights, which are not offset by 1."""
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}
