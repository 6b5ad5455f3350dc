"""Gemma 4's text layers in as few operations as torch allows, over the weights of Transformers' modules.

Transformers spends most of a small step in Python: decorators, masks, norms of five operations. Here projections that
share an input run as one, all heads are normed and rotated together, and the query heads of a KV head are folded into
rows, so that keys are neither repeated nor copied. Transformers' parameters become views of the joined ones: each
weight is stored once, and the module stays whole. Architecture: modeling_gemma4.py of Transformers (5.17 to 5.22).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polydraft_transformers import step_attention, step_experts
from polydraft_transformers.experts import FEW_ROWS, MOST_ROWS
from polydraft_transformers.fused_layers import (
    Norm,
    Stored,
    add_normed,
    gated,
    rotate_and_store,
    rotate_and_store_by_definition,
)
from polydraft_transformers.kv_cache import KvCache, StepLayout
from polydraft_transformers.prompt_attention import attend_prompt
from polydraft_transformers.prompt_end import PromptEnd
from polydraft_transformers.resources import drop_pages
from polydraft_transformers.shared_caches import SharedCaches
from polydraft_transformers.step_products import multiply, multiply_gated

__all__ = ["Caches", "Context", "Gemma4Network", "attend_by_definition", "is_gemma4", "is_plain", "joined"]

_MODELS = {"Gemma4TextModel", "Gemma4UnifiedTextModel"}
_FEW_BYTES = 1 << 22
"""Of a layer's experts: on a CPU to run them all takes less time than to tell which ones the rows chose."""

Context = tuple[Tensor, Tensor, list[Tensor | None]]
"""Of one kind of attention: cosines and signed sines, (rows, 1, head_dim), and the mask of each sequence, (queries,
keys)."""
Caches = KvCache | SharedCaches


def is_gemma4(text_model: Any) -> bool:
    """Whether ``Gemma4Network`` can run a text model.

    Its class is known, its activation the usual one, and its projections are plain and without bias.
    """
    if type(text_model).__name__ not in _MODELS or text_model.config.hidden_activation != "gelu_pytorch_tanh":
        return False
    return is_plain(text_model)


def is_plain(text_model: Any) -> bool:
    """Whether all projections are torch's own, without bias."""
    linears = (module for module in text_model.modules() if hasattr(module, "in_features"))
    return all(type(module) is torch.nn.Linear and module.bias is None for module in linears)


def joined(*modules: Any) -> Tensor:
    """One weight for projections of the same input; theirs become views of it."""
    if len(modules) == 1:
        alone: Tensor = modules[0].weight
        return alone
    own = [module.weight.detach() for module in modules]
    weight = torch.cat(own)
    drop_pages(own)
    start = 0
    for module in modules:
        end = start + module.weight.shape[0]
        module.weight = torch.nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return weight


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.weight.shape[0], module.eps, module.weight)


class _Attention:
    """Self-attention of one layer.

    Args:
        module: ``Gemma4TextAttention``.
        source: The layer whose keys and values it reads: its own, or the one it shares.
        read_heads: KV heads of that layer.
    """

    def __init__(self, module: Any, source: int, read_heads: int) -> None:
        self.kind: str = module.layer_type
        self.source = source
        self.owner = not module.is_kv_shared_layer
        self.head_dim: int = module.head_dim
        self.normed = Norm(None, self.head_dim, module.q_norm.eps, module.q_proj.weight)
        self.heads = module.q_proj.out_features // self.head_dim
        self.groups = self.heads // read_heads  # query heads per KV head
        self.out: Tensor = module.o_proj.weight
        gains = [module.q_norm.weight.detach().expand(self.heads, -1)]
        self.kv_heads = 0  # that this layer stores
        projections = [module.q_proj]
        if self.owner:
            self.kv_heads = read_heads
            # Without a v_proj, values are the normed key projection.
            projections += [module.k_proj] if module.v_proj is None else [module.k_proj, module.v_proj]
            gains.append(module.k_norm.weight.detach().expand(self.kv_heads, -1))
        self.projection = joined(*projections)
        self.gain = torch.cat(gains)

    def run(self, hidden: Tensor, context: Context, cache: Caches) -> Tensor:
        """Attend; shapes (rows, hidden_size) in and out, or (parts, rows, hidden_size) out: see ``multiply``."""
        rows = len(hidden)
        cos, signed_sin, masks = context
        if not cache.layout.masks:
            projected = multiply(hidden, self.projection)
            projected = projected.view(*projected.shape[:-1], -1, self.head_dim)
            seen = self._attend_by_positions(projected, cos, signed_sin, cache)
            return multiply(seen.view(rows, -1), self.out)
        projected = torch.mm(hidden, self.projection.t()).view(rows, -1, self.head_dim)
        queries, new_keys, new_values = rotate_and_store_by_definition(
            projected, self.normed, self.gain, cos, signed_sin, self.heads, self.kv_heads
        )
        kept = self.source, self.groups
        if len(masks) == 1:
            seen = attend_by_definition(queries, new_keys, new_values, masks[0], cache.each[0], *kept)
        else:
            size = rows // len(masks)
            found = []
            for index, (mask, one) in enumerate(zip(masks, cache.each, strict=True)):
                own = slice(index * size, (index + 1) * size)
                own_keys, own_values = (part if part is None else part[own] for part in (new_keys, new_values))
                found.append(attend_by_definition(queries[own], own_keys, own_values, mask, one, *kept))
            seen = torch.cat(found)
        return torch.mm(seen.reshape(rows, -1), self.out.t())

    def _attend_by_positions(self, projected: Tensor, cos: Tensor, signed_sin: Tensor, cache: Caches) -> Tensor:
        """In kernels, from projections, (rows, heads of all, head_dim), or their parts: (rows, heads, head_dim)."""
        layout, source, window = cache.layout, self.source, cache.window_of(self.source)
        rotations = self.normed, self.gain, cos, signed_sin, self.heads
        if self.owner and isinstance(cache, KvCache):
            cache.make_buffers(source, self.out, self.kv_heads, self.head_dim)
        if layout.is_prompt and isinstance(cache, KvCache):  # others run a prompt's last rows as a step
            keys, values, place, slots = cache.prompt_room(source, self.kv_heads, self.head_dim)
            queries = rotate_and_store(projected, *rotations, Stored(place, slots, self.kv_heads))
            seen = attend_prompt(queries, keys, values, window=window)
            cache.keep(source, keys, values)
            return seen
        places = cache.places(source)
        stored = Stored(places, cache.slots_of(source), self.kv_heads) if self.owner else None
        queries = rotate_and_store(projected, *rotations, stored)
        kv_heads = self.heads // self.groups
        return step_attention.attend(
            queries, places, layout.positions, kv_heads=kv_heads, near=layout.near, window=window
        )


def attend_by_definition(
    queries: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    mask: Tensor | None,
    cache: KvCache,
    source: int,
    groups: int,
    scale: float = 1.0,
) -> Tensor:
    """One sequence's rows, (rows, heads, head_dim) each, in torch's operations.

    Args:
        queries: Of the rows.
        new_keys: To be stored first; None: what is stored is attended.
        new_values: As ``new_keys``.
        mask: (rows, keys) for a prompt, else (rows * groups, keys).
        cache: Where the rows are laid out.
        source: The layer whose keys and values are read.
        groups: Query heads per KV head.
        scale: Of the scores. Gemma 4's: the norms of queries and keys replace the division by sqrt(head_dim).
    """
    if new_keys is not None and new_values is not None:
        keys, values = cache.update(new_keys.transpose(0, 1)[None], new_values.transpose(0, 1)[None], source)
    else:
        keys, values = cache.attended(source)
    if cache.layout.is_prompt:
        return _attend_prompt(queries, keys, values, mask, groups, scale)
    rows, heads, head_dim = map(int, queries.shape)  # constants of what is recorded
    in_order = rows == 1 or groups == heads
    # (rows, kv_heads, groups, head_dim) -> (1, kv_heads, rows * groups, head_dim), as the mask's rows
    if not in_order:
        queries = queries.reshape(rows, -1, groups, head_dim).transpose(0, 1)
    folded = queries.reshape(1, -1, rows * groups, head_dim)
    seen = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    if in_order:
        return seen.reshape(rows, heads, head_dim)
    return seen.view(-1, rows, groups, head_dim).transpose(0, 1)


def _attend_prompt(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, groups: int, scale: float
) -> Tensor:
    """A prompt's many rows: (rows, heads, head_dim) in and out, heads not folded."""
    # With a mask, torch's kernels for GPUs do not share a KV head between query heads; the one for CPUs does.
    if groups > 1 and keys.device.type != "cpu":
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    seen = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        scale=scale,
        enable_gqa=keys.shape[1] != queries.shape[1],
    )
    return seen[0].transpose(0, 1)


class _Layer:
    """One decoder layer.

    Args:
        module: ``Gemma4TextDecoderLayer``.
        source: The layer whose KV its attention reads.
        read_heads: KV heads of that layer.
        own_experts: Whether it may run experts in another way than Transformers' modules do.
    """

    def __init__(self, module: Any, source: int, read_heads: int, *, own_experts: bool) -> None:
        self.module = module
        self.attention = _Attention(module.self_attn, source, read_heads)
        self.gate_up = joined(module.mlp.gate_proj, module.mlp.up_proj)
        self.down: Tensor = module.mlp.down_proj.weight
        self.scalar: Tensor = module.layer_scalar
        self.experts = bool(getattr(module, "enable_moe_block", False))
        self.before_attention = _norm(module.input_layernorm)
        self.after_attention = _norm(module.post_attention_layernorm)
        self.after_dense = _norm(module.post_feedforward_layernorm)
        self.reads_sum = [_norm(module.pre_feedforward_layernorm)]
        if self.experts:
            self.after_dense_part = _norm(module.post_feedforward_layernorm_1)
            self.after_experts = _norm(module.post_feedforward_layernorm_2)
            self.reads_sum.append(_norm(module.pre_feedforward_layernorm_2))
            # Whose kernels route and mix; else Transformers' modules do.
            self.few_rows = module.experts.config._experts_implementation == FEW_ROWS
            weights = module.experts.gate_up_proj, module.experts.down_proj
            self.all_experts = own_experts and sum(weight.nbytes for weight in weights) <= _FEW_BYTES
            if self.few_rows or self.all_experts:
                router = module.router
                width = router.hidden_size
                norm = Norm(router.scale, width, router.norm.eps, router.scale, factor=router.scalar_root_size)
                self.reads_sum.append(norm)
        if getattr(module, "hidden_size_per_layer_input", 0):
            self.per_layer_gate: Tensor = module.per_layer_input_gate.weight
            self.per_layer_projection: Tensor = module.per_layer_projection.weight
            self.after_per_layer = _norm(module.post_per_layer_input_norm)

    def run(
        self,
        hidden: Tensor,
        normed: Tensor,
        per_layer: Tensor | None,
        following: Norm,
        context: Context,
        cache: Caches,
    ) -> tuple[Tensor, ...]:
        """Run rows.

        Args:
            hidden: Shape (rows, hidden_size).
            normed: ``hidden`` normed by ``before_attention``.
            per_layer: Shape (rows, hidden_size_per_layer_input).
            following: What norms the result for the next layer.
            context: Of the attention's kind.
            cache: The sequence's.

        Returns:
            The next ``hidden`` and ``normed``.
        """
        attended = self.attention.run(normed, context, cache)
        hidden, normed, *for_experts = add_normed(hidden, attended, self.after_attention, self.reads_sum)
        inner = multiply_gated(normed, self.gate_up)
        if inner is None:
            gate, up = multiply(normed, self.gate_up).chunk(2, -1)
            inner = gated(gate, up, hidden.dtype)
        dense = multiply(inner, self.down)
        mixture = (self._mix(hidden, *for_experts), self.after_dense_part, self.after_experts) if self.experts else None
        if per_layer is None:
            return add_normed(hidden, dense, self.after_dense, [following], scalar=self.scalar, mixture=mixture)
        (hidden,) = add_normed(hidden, dense, self.after_dense, mixture=mixture)
        own = multiply(gated(multiply(hidden, self.per_layer_gate), per_layer, hidden.dtype), self.per_layer_projection)
        return add_normed(hidden, own, self.after_per_layer, [following], scalar=self.scalar)

    def _mix(self, hidden: Tensor, normed: Tensor, for_router: Tensor | None = None) -> Tensor:
        """What the experts give: summed, (rows, hidden_size), or each one's, (rows, top_k, hidden_size)."""
        router, experts = self.module.router, self.module.experts
        if for_router is None:
            # The router norms its input itself.
            _, weights, chosen = router(hidden)
        else:
            scores = multiply(for_router, router.proj.weight)
            weights, chosen = step_experts.route(scores, router.per_expert_scale, router.config.top_k_experts)
            if len(hidden) <= MOST_ROWS:
                mix = step_experts.mix_all if self.all_experts else step_experts.mix
                return mix(normed, experts.gate_up_proj, experts.down_proj, weights, chosen, "gelu_pytorch_tanh")
        mixed: Tensor = experts(normed, chosen, weights)
        return mixed


class Gemma4Network:
    """The layers of a target, or of an assistant that reads a target's KV.

    Args:
        text_model: ``Gemma4TextModel`` or its unified twin; see ``is_gemma4``.
        target_sources: For an assistant, by kind of attention: the target's layer that it reads, and its KV heads.
        own_experts: Whether the rows of a step may run through experts in another way than Transformers' modules do.
    """

    def __init__(
        self,
        text_model: Any,
        target_sources: Mapping[str, tuple[int, int]] | None = None,
        *,
        own_experts: bool = False,
    ) -> None:
        self._model = text_model
        self._layers: list[_Layer] = []
        self._storing = 0
        """How many layers there are up to the last one that stores KV."""
        sources = dict(target_sources or {})
        for index, module in enumerate(text_model.layers):
            attention = module.self_attn
            if not attention.is_kv_shared_layer:
                self._storing = index + 1
                # Later layers overwrite earlier ones: sharing layers read the last owner of their kind.
                sources[attention.layer_type] = (index, attention.k_proj.out_features // attention.head_dim)
            self._layers.append(_Layer(module, *sources[attention.layer_type], own_experts=own_experts))
        self._groups = {layer.attention.kind: layer.attention.groups for layer in self._layers}
        self._frequencies = {kind: self._signed_frequencies(kind) for kind in self._groups}
        # Of each layer's input, and of the output.
        self._norms = [*(layer.before_attention for layer in self._layers), _norm(text_model.norm)]
        self.embedding = _Embedding(text_model.embed_tokens)
        """Token ids, shape (rows,), to input embeddings (rows, hidden_size)."""
        self._prompt_end = PromptEnd(self._run_end)
        self._per_layer_width = int(getattr(text_model, "hidden_size_per_layer_input", 0) or 0)
        if self._per_layer_width:
            self._per_layer_embedding = _Embedding(text_model.embed_tokens_per_layer)
            self._per_layer_norm = _norm(text_model.per_layer_projection_norm)

    @property
    def head_dims(self) -> set[int]:
        """Sizes of the layers' heads."""
        return {layer.attention.head_dim for layer in self._layers}

    def _signed_frequencies(self, kind: str) -> Tensor:
        # cos is even and sin odd: with the first half negative, one product serves x * cos + roll(x) * sin.
        frequencies = getattr(self._model.rotary_emb, f"{kind}_inv_freq").float()
        return torch.cat([-frequencies, frequencies])

    def traceable(self, rows: int) -> bool:
        """As ``decoder.Network``'s: Transformers' experts look at what the router chose."""
        return rows <= MOST_ROWS and all(layer.all_experts for layer in self._layers if layer.experts)

    def run(self, token_ids: Tensor, cache: Caches) -> Tensor:
        """Run tokens, shape (rows,), and store their KV: final-normed hidden rows (rows, hidden_size).

        Of a prompt's chunk these are the last ``kept`` rows.
        """
        embedded = self.embedding(token_ids)
        per_layer = self._per_layer_inputs(token_ids, embedded) if self._per_layer_width else None
        layout = cache.layout
        contexts = self.contexts(layout, embedded.dtype)
        if not (layout.is_prompt and isinstance(cache, KvCache)):
            return self.layers(embedded, contexts, cache, per_layer)
        storing = slice(self._storing)
        hidden, normed = self._run_layers(storing, embedded, contexts, cache, per_layer)
        last = slice(len(token_ids) - layout.kept, None)
        if not layout.kept or self._storing == len(self._layers):
            return normed[last]
        # What no later layer stores is needed of the last rows only.
        assert layout.slots is not None
        positions, slots = layout.positions[last], layout.slots[last]
        rows = [hidden[last]] if per_layer is None else [hidden[last], per_layer[last]]
        if layout.records:
            return self._prompt_end.run(cache, positions, slots, *rows)
        cache.begin_step(positions, layout.span, slots)
        return self._run_end(cache, *rows)

    def _run_end(self, cache: Caches, hidden: Tensor, per_layer: Tensor | None = None) -> Tensor:
        """The layers that store no KV, for rows of a step that is laid out: final-normed hidden rows."""
        contexts = self.contexts(cache.layout, hidden.dtype)
        return self._run_layers(slice(self._storing, None), hidden, contexts, cache, per_layer)[1]

    def contexts(self, layout: StepLayout, dtype: torch.dtype) -> dict[str, Context]:
        """By kind of attention what its layers share: rotations of the positions, and the mask."""
        contexts: dict[str, Context] = {}
        for kind, frequencies in self._frequencies.items():
            # (rows, 1, head_dim), in float32: bfloat16 holds integers exactly only up to 256.
            angles = layout.positions.view(-1, 1, 1).float() * frequencies
            cos, sin = angles.cos(), angles.sin()
            scale = getattr(self._model.rotary_emb, f"{kind}_attention_scaling")
            if scale != 1.0:
                cos, sin = cos * scale, sin * scale
            masks = [part.masks.get(kind) for part in layout.parts or (layout,)]
            if not layout.is_prompt:  # a row for each folded query
                groups = self._groups[kind]
                masks = [mask if mask is None else mask.repeat_interleave(groups, 0) for mask in masks]
            contexts[kind] = cos.to(dtype), sin.to(dtype), masks
        return contexts

    def layers(
        self, hidden: Tensor, contexts: Mapping[str, Context], cache: Caches, per_layer: Tensor | None = None
    ) -> Tensor:
        """From input embeddings (rows, hidden_size) to final-normed hidden rows of the same shape."""
        return self._run_layers(slice(None), hidden, contexts, cache, per_layer)[1]

    def _run_layers(
        self,
        which: slice,
        hidden: Tensor,
        contexts: Mapping[str, Context],
        cache: Caches,
        per_layer: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run some layers: the next ``hidden``, and the same normed for the layer after them."""
        first, last, _ = which.indices(len(self._layers))
        normed = self._norms[first](hidden)
        for index in range(first, last):
            layer = self._layers[index]
            own = None if per_layer is None else per_layer[:, index]
            following = self._norms[index + 1]
            hidden, normed = layer.run(hidden, normed, own, following, contexts[layer.attention.kind], cache)
        return hidden, normed

    def _per_layer_inputs(self, token_ids: Tensor, embedded: Tensor) -> Tensor:
        """Per-layer embeddings, shape (rows, layers, hidden_size_per_layer_input)."""
        model = self._model
        shape = (len(token_ids), len(self._layers), self._per_layer_width)
        looked_up = self._per_layer_embedding(token_ids).view(shape)
        projected = functional.linear(embedded, model.per_layer_model_projection.weight)
        projected = (projected * model.per_layer_model_projection_scale).view(shape)
        scale: float = model.per_layer_input_scale
        return (self._per_layer_norm(projected) + looked_up) * scale


class _Embedding:
    """A table's rows, scaled; ``Gemma4TextScaledWordEmbedding`` without the module around it."""

    def __init__(self, table: Any) -> None:
        self._weight: Tensor = table.weight.detach()
        # Rounded to the weights' dtype before the product, as Transformers does.
        self._scale: Tensor = table.embed_scale.to(table.weight.dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self._weight) * self._scale
