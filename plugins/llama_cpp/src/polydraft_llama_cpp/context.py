"""A llama.cpp context: the KV cache of one sequence, and the buffers of a forward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from polydraft.errors import EngineError, OutOfMemoryError, UnsupportedError

from polydraft_llama_cpp.bindings import extension, library, recent_errors
from polydraft_llama_cpp.model import Model

__all__ = ["Context", "ContextSettings"]

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """Settings of target and drafter. Flash attention must be the same in both, else hardly any draft is accepted."""

    length: int
    """Tokens that the cache holds."""
    n_batch: int
    outputs: int
    """The most rows of logits that one forward gives."""
    threads: int
    threads_batch: int
    types: tuple[str, str]
    """Of the cached keys and values."""
    flash_attn: bool
    swa_full: bool
    on_gpu: bool


class Context:
    """One sequence's context. It holds only sequence 0, whose positions count from 0.

    An MTP drafter attends to the memory of ``shared``, the target's context, created with ``keeps_hidden``. A drafter's
    logits have ``vocab_size`` columns, the target's number of tokens: ids that only the drafter has are never drafted,
    and in place of one that only the target has it runs its own last one.

    Raises:
        OutOfMemoryError: llama.cpp cannot create the context; its own words are in the message.
        UnsupportedError: The model does not generate text.
    """

    def __init__(
        self,
        model: Model,
        settings: ContextSettings,
        *,
        shared: Context | None = None,
        keeps_hidden: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        lib = library()
        params = lib.llama_context_default_params()
        # n_ubatch = n_batch: llama.cpp never splits a forward, so the rows of a step are computed together.
        params.n_ctx, params.n_batch, params.n_ubatch = settings.length, settings.n_batch, settings.n_batch
        params.n_seq_max = 1
        params.n_outputs_max = settings.outputs
        params.n_threads, params.n_threads_batch = settings.threads, settings.threads_batch
        params.type_k, params.type_v = (GGMLQuantizationType[name.upper()] for name in settings.types)
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings.flash_attn else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.swa_full, params.no_perf = settings.swa_full, True
        # Both are on by default, and would use a GPU for a model whose layers are all on the CPU.
        params.offload_kqv = params.op_offload = settings.on_gpu
        if shared is not None:
            params.ctx_type, params.ctx_other = lib.LLAMA_CONTEXT_TYPE_MTP, shared.pointer
        recent_errors(forget=True)
        self.pointer: Any = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise OutOfMemoryError(
                f"llama.cpp cannot create a context of {settings.length} tokens for {model.name}: "
                f"{recent_errors() or 'it gives no reason'}.",
                "Give a smaller `context_length`.",
            )
        self._memory: Any = lib.llama_get_memory(self.pointer)
        if not self._memory:  # without a cache llama.cpp only encodes, and aborts when asked for logits
            lib.llama_free(self.pointer)
            raise UnsupportedError(
                f"{model.name} does not generate text: like models for embeddings, it has no KV cache.",
                "Give the GGUF file of a language model.",
            )
        self.model = model
        self._last_token = model.vocab_size - 1
        self._missing_columns = (vocab_size or model.vocab_size) - model.vocab_size
        self._settings = settings
        self._keeps_hidden = keeps_hidden
        self._views: dict[tuple[int, int], Rows] = {}
        # A batch with a width holds hidden rows; llama.cpp then allocates no tokens for it.
        width = model.hidden_size if shared is not None else 0
        self._batch: Any = lib.llama_batch_init(settings.n_batch if width == 0 else 1, width, 1)
        self._tokens = (lib.llama_token * settings.n_batch)() if width else None
        if self._tokens is not None:
            self._batch.token = ctypes.cast(self._tokens, type(self._batch.token))
            # A view of llama.cpp's memory, float32, shape (width,): callers write the hidden row into it.
            self.input_row: Rows = np.ctypeslib.as_array(self._batch.embd, shape=(width,))
        for index in range(settings.n_batch if width == 0 else 1):
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
        # ctypes creates new objects at every access
        self._slots = self._batch.token, self._batch.pos, self._batch.logits
        if keeps_hidden:
            extension().llama_set_embeddings_nextn(self.pointer, True, True)

    @property
    def n_batch(self) -> int:
        """The most tokens of one forward; a larger batch would abort the process."""
        return self._settings.n_batch

    def decode(self, token_ids: Sequence[int], position: int, *, all_rows: bool) -> None:
        """Run tokens at ``position`` onwards.

        Args:
            token_ids: At most ``n_batch``; exactly one if the context has an ``input_row``, which must be filled first.
            position: Absolute position of the first token.
            all_rows: Whether every token gives logits, or only the last.

        Raises:
            EngineError: llama.cpp failed.
            OutOfMemoryError: It could not allocate memory.
        """
        if not 0 < len(token_ids) <= (self.n_batch if self._tokens is None else 1):
            raise EngineError(f"A forward of {len(token_ids)} tokens was asked for; 1 to {self.n_batch} are possible.")
        last = len(token_ids) - 1
        tokens, positions, flags = self._slots
        self._batch.n_tokens = last + 1
        for index, token_id in enumerate(token_ids):
            tokens[index] = min(token_id, self._last_token)
            positions[index] = position + index
            # Whether this token's logits are computed.
            flags[index] = all_rows or index == last
        code = library().llama_decode(self.pointer, self._batch)
        if code:
            raise _failure(code, len(token_ids), position, self._settings.length)

    def logits(self, rows: int) -> Rows:
        """Logits of the last forward's outputs, float32, shape (rows, vocab): a view, valid until the next forward."""
        own = self._view(library().llama_get_logits(self.pointer), rows, self.model.vocab_size)
        if self._missing_columns > 0:
            return np.pad(own, ((0, 0), (0, self._missing_columns)), constant_values=-np.inf)
        return own[:, : self._missing_columns] if self._missing_columns else own

    def hidden(self, rows: int) -> Rows:
        """Hidden rows after the final norm, float32, shape (rows, hidden_size): a view, valid as ``logits``."""
        return self._view(extension().llama_get_embeddings_nextn(self.pointer), rows, self.model.hidden_size)

    def _view(self, pointer: Any, rows: int, width: int) -> Rows:
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if not address:
            raise EngineError("llama.cpp gave no output for a forward.", "Report it as a defect of polydraft.")
        found = self._views.get((address, rows))
        if found is None:
            # Addresses change only when llama.cpp reallocates its output buffer, so few entries are in use.
            if len(self._views) > 64:
                self._views.clear()
            found = self._views[address, rows] = np.ctypeslib.as_array(pointer, shape=(rows, width))
        return found

    def forget(self, length: int) -> None:
        """Remove all but the first ``length`` tokens from the cache.

        Raises:
            EngineError: llama.cpp cannot, or a sliding-window layer no longer holds what the next token needs.
        """
        lib = library()
        # Sequence 0 from ``length`` to the end (-1).
        if not lib.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise EngineError(f"llama.cpp cannot forget tokens after the first {length}.", "Use `drafter=None`.")
        if length and not self.reaches(length):
            raise EngineError(
                f"The sliding window's cache starts at token {self.first_position}, too late to go back to {length} "
                "tokens.",
                "Give `engine_options={'swa_full': True}`.",
            )

    def reaches(self, length: int) -> bool:
        """Whether what the token after the first ``length`` ones attends to is still stored in every layer."""
        # It attends to positions from length - window + 1 on.
        return not self.model.window or self.first_position <= max(0, length - self.model.window + 1)

    @property
    def first_position(self) -> int:
        """The position of the first token that all layers store."""
        first: int = library().llama_memory_seq_pos_min(self._memory, 0)
        return first

    def clear(self, *, data: bool) -> None:
        """Mark all cells empty; with ``data`` overwrite them, too: NaN in an empty cell would reach other tokens."""
        library().llama_memory_clear(self._memory, data)

    def free(self) -> None:
        """Free it: an MTP drafter's before its target's, whose memory it shares. May be called twice."""
        if self.pointer:
            lib = library()
            if self._tokens is not None:
                self._batch.token = type(self._batch.token)()  # allocated here: llama_batch_free must not free it
            lib.llama_batch_free(self._batch)
            lib.llama_free(self.pointer)
            self.pointer = None
            self._views.clear()


def _failure(code: int, count: int, position: int, length: int) -> EngineError | OutOfMemoryError:
    said = recent_errors()
    # llama_decode's codes: 1 is a cache without room, -2 a failed allocation.
    if code == 1:
        return EngineError(
            f"The cache of {length} tokens has no room for {count} more at position {position}.",
            "Load the model with a larger `context_length`.",
        )
    if code == -2:
        return OutOfMemoryError(
            f"llama.cpp could not allocate memory for {count} tokens at position {position}. {said}".rstrip(),
            "Give a smaller `context_length` or `n_batch`.",
        )
    return EngineError(
        f"llama_decode failed with code {code} for {count} tokens at position {position}. {said}".rstrip(),
        "Report it with the model's name and what the logger polydraft.llama_cpp has.",
    )
