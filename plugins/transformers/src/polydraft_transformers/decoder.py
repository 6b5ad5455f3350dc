"""A causal language model taken apart, as sequences run it: layers, head, embeddings, and the caches it can spare."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from polydraft.errors import UnsupportedError
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from polydraft_transformers.gemma4 import Gemma4Network, is_gemma4
from polydraft_transformers.kv_cache import KvCache, StepLayout
from polydraft_transformers.llama import LlamaNetwork, is_llama
from polydraft_transformers.prompt_attention import can_attend_prompt
from polydraft_transformers.step_attention import can_attend
from polydraft_transformers.step_products import runs_kernels
from polydraft_transformers.traced import Traced

__all__ = ["CHUNK", "LONG_CHUNK", "Decoder", "fixed_rows"]

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
CHUNK = 512
LONG_CHUNK = 4096  # keeps a GPU busy; without masks, which would grow with it
_MOST_PACKED = 1 << 24
"""Bytes of a head of which a second copy is kept."""
_PACKED_FOR = 5  # rows, about
_KEPT_CACHES = 2
"""Caches of closed sequences kept for the next ones; what was captured over them is kept with them."""


def fixed_rows(k: int) -> int:
    """Rows of a fixed step: a multiple of 8, so that sessions with k up to 7, or without a drafter, give equal bits."""
    return -(-(k + 1) // 8) * 8


class Network(Protocol):
    """Runs the layers."""

    def run(self, token_ids: Tensor, cache: Any) -> Tensor:
        """Tokens, shape (rows,), laid out in the cache, to final-normed hidden rows (rows, hidden_size).

        Of a prompt's chunk the last ``kept`` rows of its layout at least. Where rounds run, ``cache`` may be the
        ``SharedCaches`` of several sequences.
        """
        ...

    def traceable(self, rows: int) -> bool:
        """Whether ``traced`` can record a step of so many rows: no operation depends on a value."""
        ...


class _ModuleNetwork:
    """Any other architecture, through Transformers' own module."""

    def __init__(self, text_model: Any) -> None:
        self._model = text_model
        # With one KV head, Transformers repeats it for the query heads as a view, of which torch's memory-efficient
        # attention on a GPU reads wrong keys where a mask is given (torch 2.11, more than 64 keys).
        views = text_model.config.num_key_value_heads == 1 and text_model.embed_tokens.weight.is_cuda
        self._attention: Callable[[], AbstractContextManager[None]] = (
            partial(sdpa_kernel, SDPBackend.MATH) if views else nullcontext
        )

    def traceable(self, rows: int) -> bool:
        """Transformers' code is not known to be."""
        return False

    def run(self, token_ids: Tensor, cache: KvCache) -> Tensor:
        masks = {kind: None if mask is None else mask[None, None] for kind, mask in cache.layout.masks.items()}
        with self._attention():
            output = self._model(
                input_ids=token_ids[None],
                position_ids=cache.layout.positions[None],
                # Models whose layers are all of one kind take one mask.
                attention_mask=masks if len(masks) > 1 else masks["full_attention"],
                past_key_values=cache,
                use_cache=True,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden


class Decoder:
    """The text model and head of a checkpoint, without ``generate``.

    Args:
        model: ``...ForCausalLM``, or ``...ForConditionalGeneration`` whose text part is used.
        step_rows: Rows of a step at most.
        fixed: Whether every step of a session runs ``step_rows`` rows, each token in the row ``position % step_rows``,
            over full-layer buffers whose length depends on the position alone. A kernel may treat some rows differently
            (the last ones of a tile, the tail of a vector): a position then always meets the same treatment.
        vocab_size: For a draft model: the target's number of tokens. The two may differ, as sizes are padded: ids that
            only the draft model has are never drafted, and for one that only the target has it runs its own last one.
        own_experts: As for ``Gemma4Network``.

    Raises:
        UnsupportedError: Layers of a kind whose state this cache does not keep.
    """

    def __init__(
        self,
        model: Any,
        step_rows: int,
        *,
        fixed: bool = False,
        vocab_size: int | None = None,
        own_experts: bool = False,
    ) -> None:
        self.model = model.requires_grad_(False)  # what is recorded holds no weight with gradients
        base = getattr(model, "model", None)
        text_model: Any = getattr(base, "language_model", base)
        self.config = model.config.get_text_config()
        self.lm_head: Any = getattr(model, "lm_head", None)
        if self.lm_head is None or not hasattr(text_model, "embed_tokens") or not hasattr(text_model, "layers"):
            raise UnsupportedError(
                f"Models of type {self.config.model_type} are not built as this backend expects.",
                "Choose a Gemma 4, Llama or Qwen3 model.",
            )
        self.layers: Any = text_model.layers
        self.embedding: Any = text_model.embed_tokens
        """Token ids to input embeddings, scaled as the model scales them."""
        self.step_rows = step_rows
        self.fixed = fixed
        self.device: torch.device = self.lm_head.weight.device
        self.dtype: torch.dtype = self.lm_head.weight.dtype
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.layer_types = _layer_types(self.config)
        own_vocab = int(self.lm_head.weight.shape[0])
        self.missing_columns = (vocab_size or own_vocab) - own_vocab
        """Columns that logits are padded with, at -inf; negative: columns that are cut off."""
        self.run_as = dict.fromkeys(range(own_vocab, vocab_size or 0), own_vocab - 1)
        """Maps token ids to the ids that are run instead."""
        self._run_table: Tensor | None = None
        self.network: Network
        if is_gemma4(text_model):
            self.network = Gemma4Network(text_model, own_experts=own_experts)
            self.embedding = self.network.embedding
            if text_model is not base:
                self.run_as |= _media_as_padding(model.config)
        else:
            self.network = LlamaNetwork(text_model) if is_llama(text_model) else _ModuleNetwork(text_model)
        # Capture only what has been tested: Gemma 4 layers whose experts do not synchronise with the host.
        self.captures = (
            self.device.type == "cuda"
            and isinstance(self.network, Gemma4Network)
            and getattr(self.config, "_experts_implementation", None) != "eager"
        )
        self.runs_rounds = self.captures and runs_kernels(self.device)
        """Whether rounds run on the device (``device_rounds``)."""
        self.traced: Traced | None = None
        """Records steps on a CPU; fixed ones stay as they are, and None elsewhere."""
        if self.device.type == "cpu" and not fixed:
            self.traced = Traced()
        self._packed_head = None if fixed else _packed(self.lm_head)
        sizes = self.network.head_dims if isinstance(self.network, Gemma4Network) else {0}
        self._by_positions = can_attend(self.device, sizes)
        self._prompts_by_positions = can_attend_prompt(self.device, self.dtype, sizes)
        self.chunk = LONG_CHUNK if self._prompts_by_positions else CHUNK
        """Tokens of a prompt that are run in one forward, unless the user says otherwise."""
        # No lock: the garbage collector may close a sequence at any point.
        self._free: deque[KvCache] = deque(maxlen=_KEPT_CACHES)

    def run_ids(self, token_ids: Tensor) -> Tensor:
        """``run_as`` of ids on the device."""
        if not self.run_as:
            return token_ids
        if self._run_table is None:
            table = torch.arange(max(int(self.lm_head.weight.shape[0]), max(self.run_as) + 1))
            table[list(self.run_as)] = torch.tensor(list(self.run_as.values()))
            self._run_table = table.to(self.device)
        return self._run_table[token_ids]

    def run_rows(self, token_ids: Tensor, cache: KvCache) -> tuple[Tensor, Tensor]:
        """Run the rows of a step that is laid out.

        Returns:
            Final-normed hidden rows (rows, hidden_size) and logits (rows, vocab).
        """
        hidden = self._run_network(token_ids, cache)
        return hidden, self.logits(hidden)

    def _run_network(self, token_ids: Tensor, cache: KvCache) -> Tensor:
        rows, layout, seen = token_ids.shape[0], cache.layout, cache.seen()
        if self.traced is None or not seen or not self.network.traceable(rows):
            return self.network.run(token_ids, cache)
        # As in ``MtpDrafter.steps``.
        slides, layers = layout.ring is not None, tuple(seen)
        masked = {kind: mask is not None for kind, mask in layout.masks.items()}

        def run(token_ids: Tensor, positions: Tensor, slots: Tensor, *others: Tensor) -> tuple[Tensor]:
            rest = iter(others)
            ring = next(rest) if slides else None
            masks = {kind: next(rest) if has_mask else None for kind, has_mask in masked.items()}
            step = StepLayout(positions, -1, masks, slots=slots, ring=ring)
            cache = self.new_cache().stand_in(step, {layer: (next(rest), next(rest)) for layer in layers})
            return (self.network.run(token_ids, cache),)

        inputs = layout.positions, layout.slots, layout.ring, *layout.masks.values(), *chain(*seen.values())
        given = [token_ids, *(one for one in inputs if one is not None)]
        return self.traced.run(("step", rows, *masked.values()), run, given)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden rows (rows, hidden_size), soft-cap applied: (rows, vocab)."""
        logits: Tensor
        if self._packed_head is not None and hidden.shape[0] > 1:
            logits = torch.ops.mkldnn._linear_pointwise(hidden, self._packed_head, None, "none", [], "")
        else:
            logits = self.lm_head(hidden)
        if self.softcap is not None:
            capped = (logits / self.softcap).tanh_().mul_(self.softcap)
            # 0 * logits is 0, but NaN where they are infinite: the cap would hide it from the sampler.
            logits = capped.add_(logits, alpha=0)
        missing = self.missing_columns
        return functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def open_cache(self) -> KvCache:
        """An empty cache; one that was given back is used again, with what was captured over its buffers."""
        try:
            cache = self._free.pop()
        except IndexError:
            return self.new_cache()
        cache.clear()
        return cache

    def new_cache(self) -> KvCache:
        """An empty cache without buffers."""
        window = self.config.sliding_window if "sliding_attention" in self.layer_types else None
        windows = [window if kind == "sliding_attention" else None for kind in self.layer_types]
        return KvCache(
            windows,
            self.step_rows,
            self.dtype,
            masked=not self._by_positions,
            masks_prompts=not self._prompts_by_positions,
        )

    def give_back(self, cache: KvCache) -> None:
        """Take back a cache that is no longer used, and in which no forward failed."""
        self._free.append(cache)


def _packed(head: Any) -> Tensor | None:
    """A copy of a small head's weight for oneDNN, which on x86 takes half of MKL's time for the few rows of a step.

    One row is read as fast without. None elsewhere.
    """
    has_mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_mkldnn or platform.machine() not in {"x86_64", "AMD64"}:
        return None
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        return None
    weight = head.weight.detach()
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.nbytes > _MOST_PACKED:
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
    return packed


def _layer_types(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise UnsupportedError(
                f"Models of type {config.model_type} with a sliding window in every layer have not been tested.",
                "Choose a Gemma 4, Llama or Qwen3 model.",
            )
        kinds = ["full_attention"] * config.num_hidden_layers
    unknown = set(kinds) - _KNOWN_LAYERS
    if unknown:
        raise UnsupportedError(
            f"Layers of kind {', '.join(sorted(unknown))} keep a state that cannot be rolled back here.",
            "Choose a model with full and sliding attention only.",
        )
    return list(kinds)


def _media_as_padding(config: Any) -> dict[int, int]:
    """Placeholder ids for images, video and audio, mapped to padding as ``Gemma4Model`` does."""
    pad = config.get_text_config().pad_token_id
    names = ("image_token_id", "video_token_id", "audio_token_id")
    found = (getattr(config, name, None) for name in names)
    return {} if pad is None else {token_id: pad for token_id in found if token_id is not None}
