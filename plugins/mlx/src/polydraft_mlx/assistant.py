"""A Gemma 4 assistant: its network, built on mlx-lm's own Gemma 4 layers, and its checkpoint.

Source of the architecture: ``modeling_gemma4_assistant.py`` in Transformers 5.22. ``gemma4_unified_assistant`` is the
same network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models import gemma4_text
from mlx_lm.utils import infer_quant_config
from polydraft.checkpoints.config import read_config
from polydraft.checkpoints.safetensors import weight_files
from polydraft.contract import ModelSource
from polydraft.errors import ModelFormatError, PolydraftError

from polydraft_mlx.config import text_overrides
from polydraft_mlx.resources import in_one_line

__all__ = ["Assistant", "load_assistant"]


class _Layers(nn.Module):  # type: ignore[misc]
    def __init__(self, args: gemma4_text.ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [gemma4_text.DecoderLayer(args, index) for index in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class _Centroids(nn.Module):  # type: ignore[misc]
    """Chooses the clusters of tokens whose logits are computed (Gemma4AssistantMaskedEmbedder)."""

    def __init__(self, hidden_size: int, vocab_size: int, clusters: int, best: int) -> None:
        super().__init__()
        self.centroids = nn.Linear(hidden_size, clusters, bias=False)
        self.token_ordering = mx.zeros((vocab_size,), dtype=mx.int32)
        self._clusters = clusters
        self._best = best
        if not 0 < best <= clusters:
            raise ValueError(f"centroid_intermediate_top_k is {best}, and num_centroids {clusters}")

    def __call__(self, row: mx.array) -> mx.array:
        """Ids of the tokens of the best clusters for a hidden row (1, hidden_size): (1, tokens)."""
        scores = self.centroids(row)
        best = mx.argpartition(-scores, self._best - 1, axis=-1)[..., : self._best]
        # The vocabulary, cluster by cluster: (clusters, tokens per cluster).
        return self.token_ordering.reshape(self._clusters, -1)[best[0]].reshape(1, -1)


class Assistant(nn.Module):  # type: ignore[misc]
    """The network. It stores no keys and values: its layers attend to the target's.

    Args:
        config: The checkpoint's ``config.json``.
        name: The checkpoint's name, for messages.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        super().__init__()
        fields = {**config["text_config"], **text_overrides(config, name)}
        # mlx-lm builds layers without k_proj and v_proj where all of them share keys and values.
        fields.update(num_kv_shared_layers=fields["num_hidden_layers"], hidden_size_per_layer_input=0)
        args = gemma4_text.ModelArgs.from_dict(fields)
        width = int(config["backbone_hidden_size"])
        self.model = _Layers(args)
        self.pre_projection = nn.Linear(2 * width, args.hidden_size, bias=False)
        self.post_projection = nn.Linear(args.hidden_size, width, bias=False)
        if not config.get("tie_word_embeddings", True):
            self.lm_head = nn.Embedding(args.vocab_size, args.hidden_size)
        self.masked_embedding: Any = None
        if config.get("use_ordered_embeddings"):
            self.masked_embedding = _Centroids(
                args.hidden_size, args.vocab_size, config["num_centroids"], config["centroid_intermediate_top_k"]
            )

    def __call__(self, inputs: mx.array, shared: Mapping[str, Any], position: mx.array) -> tuple[mx.array, mx.array]:
        """One draft step.

        Args:
            inputs: The token's embedding, then h, concatenated: (1, 1, 2 * width of the target).
            shared: Attention type -> the target's keys and values, (1, heads, slots, head_dim), and a mask (1, slots)
                or None.
            position: The newest token's position, an int array of shape ().

        Returns:
            Logits (1, vocab), and the next h (1, 1, width of the target).
        """
        hidden = self.pre_projection(inputs)
        for layer in self.model.layers:
            keys, values, mask = shared[layer.layer_type]
            # ``offset`` rotates the query only: the target's keys were rotated when they were stored.
            hidden, _, _ = layer(hidden, mask, None, shared_kv=(keys, values), offset=position)
        hidden = self.model.norm(hidden)
        return self._head(hidden[0]), self.post_projection(hidden)

    def check_ordering(self) -> None:
        """Check the token ids of a centroid head: MLX does not, and reads past the end of arrays.

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        if self.masked_embedding is None:
            return
        stored = np.array(self.masked_embedding.token_ordering)
        if stored.min() < 0 or stored.max() >= stored.size:
            raise ValueError(
                f"masked_embedding.token_ordering holds ids outside the vocabulary of {stored.size} tokens"
            )

    def _head(self, row: mx.array) -> mx.array:
        table = self.lm_head if "lm_head" in self else self.model.embed_tokens
        if self.masked_embedding is None:
            dense: mx.array = table.as_linear(row)
            return dense
        ids = self.masked_embedding(row)
        chosen = row @ table(ids[0]).T
        # All other tokens get the smallest of these, less one.
        lowest = mx.broadcast_to(chosen.min(axis=-1, keepdims=True) - 1.0, (1, table.weight.shape[0]))
        return mx.put_along_axis(lowest, ids, chosen, axis=-1)


def load_assistant(source: ModelSource, path: Path, dtype: mx.Dtype | None) -> Assistant:
    """Load the drafter lazily; MLX reads its weights when they are evaluated.

    Raises:
        ModelFormatError: It is quantized in a way that MLX cannot read, or its weights do not match its config.
    """
    config = read_config(path / "config.json", source.id)  # not the source's: the folder's agrees with the weights
    _check_quantization(config, source.id)
    weights: dict[str, Any] = {}
    try:
        for file in weight_files(path):
            weights.update(mx.load(str(file)))
        if (ordering := weights.get("masked_embedding.token_ordering")) is not None:
            weights["masked_embedding.token_ordering"] = ordering.astype(mx.int32)
        assistant = Assistant(config, source.id)
        if any(name.endswith(".scales") for name in weights):
            nn.quantize(assistant, class_predicate=lambda name, module: _packed(name, module, weights))
        assistant.eval()
        assistant.load_weights(list(weights.items()), strict=True)
        assistant.check_ordering()
    except PolydraftError:
        raise
    except Exception as error:  # of any kind, where config and weights do not match
        raise ModelFormatError(
            f"The assistant {source.id} does not match its config: {in_one_line(error)}",
            "Download it again, or convert it again from the original.",
        ) from error
    if dtype is not None:
        assistant.set_dtype(dtype)
    return assistant


def _packed(name: str, module: Any, weights: Mapping[str, Any]) -> bool | dict[str, Any]:
    """How a layer was packed, inferred from its arrays: layers may differ from what the config says of all."""
    if f"{name}.scales" not in weights or not hasattr(module, "to_quantized"):
        return False
    found: dict[str, Any] = infer_quant_config(name, module, weights)
    return found


def _check_quantization(config: Mapping[str, Any], name: str) -> None:
    if isinstance(config.get("quantization"), Mapping):  # MLX's own
        return
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if given:
        method = given.get("quant_method", "an unknown method") if isinstance(given, Mapping) else given
        raise ModelFormatError(
            f"The drafter {name} is quantized with {method}, which MLX cannot read.",
            "Use the original in bfloat16, or one converted for MLX.",
        )
