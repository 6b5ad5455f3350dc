# ruff: noqa: N803, N806, E741, ANN001, ANN202 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-def"
"""Attention of a prompt's many rows on a GPU, for heads of up to 512 and windows; torch's flash attention has neither.

A program goes through the keys that a tile of rows sees, and keeps the largest score and the sums so far (Dao et al.
2022, arXiv:2205.14135). What a row sees follows from where it stands among the keys, so no mask is made or read.
``gemma4`` has the definition in torch's operations, which runs where Triton is missing, and in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polydraft_transformers.launches import kernel
from polydraft_transformers.step_products import runs_kernels

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["attend_prompt", "can_attend_prompt"]


def can_attend_prompt(device: torch.device, dtype: torch.dtype, head_dims: set[int]) -> bool:
    """Whether the kernel runs here: on a GPU, with Triton, in 16 bits, for heads whose size is a power of two."""
    fits = all(16 <= size <= 512 and not size & (size - 1) for size in head_dims)
    return runs_kernels(device) and dtype.itemsize == 2 and fits


def attend_prompt(queries: Tensor, keys: Tensor, values: Tensor, *, window: int | None) -> Tensor:
    """What each row of a prompt's chunk sees: itself, and the keys before it.

    Args:
        queries: Shape (rows, heads, head_dim), contiguous.
        keys: Shape (1, kv_heads, keys, head_dim): the last ``rows`` of them are the rows' own; ``heads`` is a multiple
            of ``kv_heads``.
        values: As ``keys``.
        window: Keys that a row sees at most, its own included; None: all before it.

    Returns:
        Shape (rows, heads, head_dim), in the queries' dtype; scores are not scaled.
    """
    rows, heads, dim = queries.shape
    kv_heads, count = keys.shape[1], keys.shape[2]
    seen = torch.empty_like(queries)
    tile = _TILES[512 if dim > 256 else 256]
    _attend[(heads, -(-rows // tile["ROWS"]))](
        *(queries, keys, values, seen, rows, count, heads // kv_heads, window or 0, heads),
        *(keys.stride(1), keys.stride(2), values.stride(1), values.stride(2)),
        DIM=dim,
        SLIDES=window is not None,
        **tile,
    )
    return seen


_TILES = {
    512: {"ROWS": 64, "BLOCK": 32, "num_warps": 8, "num_stages": 2},
    256: {"ROWS": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 2},
}
"""By size of the heads: rows of a tile, and keys that are read at a time."""


def _more(
    q, most, total, summed, K, V, own, first, last, keys, window, k_slot, v_slot,
    DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, SLIDES: tl.constexpr,
):  # fmt: skip
    """Go through the keys from ``first`` to ``last``: the new largest scores and sums."""
    dim = tl.arange(0, DIM)
    for start in range(first, last, BLOCK):
        key = start + tl.arange(0, BLOCK)
        if MASKED:
            k = tl.load(K + key[:, None] * k_slot + dim[None, :], mask=key[:, None] < keys, other=0.0)
        else:
            k = tl.load(K + key[:, None] * k_slot + dim[None, :])
        scores = tl.dot(q, tl.trans(k)) * 1.4426950408889634  # log2(e): exponentials have base 2
        if MASKED:
            seen = key[None, :] <= own[:, None]
            if SLIDES:
                seen = seen & (key[None, :] > own[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp2(most - new)
        share = tl.exp2(scores - new[:, None])
        total = total * kept + tl.sum(share, 1)
        summed = summed * kept[:, None]
        if MASKED:
            v = tl.load(V + key[:, None] * v_slot + dim[None, :], mask=key[:, None] < keys, other=0.0)
        else:
            v = tl.load(V + key[:, None] * v_slot + dim[None, :])
        summed = tl.dot(share.to(v.dtype), v, summed)
        most = new
    return most, total, summed


def _attend_kernel(
    Q, K, V, O, rows, keys, groups, window, heads, k_head, k_slot, v_head, v_slot,
    DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SLIDES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS  # tiles that see most come first
    row, dim = first_row + tl.arange(0, ROWS), tl.arange(0, DIM)
    at = (tl.arange(0, ROWS)[:, None] * heads + head) * DIM + dim[None, :]
    # A long chunk has more than 2**31 elements.
    Q += first_row.to(tl.int64) * heads * DIM
    O += first_row.to(tl.int64) * heads * DIM
    q = tl.load(Q + at, mask=row[:, None] < rows, other=0.0)
    own = row + (keys - rows)  # each row's own key
    first_own = first_row + (keys - rows)
    K += (head // groups).to(tl.int64) * k_head
    V += (head // groups).to(tl.int64) * v_head
    most = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DIM), tl.float32)
    if SLIDES:
        first_masked = tl.maximum(first_own - window + 1, 0) // BLOCK * BLOCK
    else:
        first_masked = first_own // BLOCK * BLOCK
        most, total, summed = _more(
            q, most, total, summed, K, V, own, 0, first_masked, keys, window, k_slot, v_slot,
            DIM, BLOCK, False, False,
        )  # fmt: skip
    last = tl.minimum(first_own + ROWS, keys)
    most, total, summed = _more(
        q, most, total, summed, K, V, own, first_masked, last, keys, window, k_slot, v_slot,
        DIM, BLOCK, True, SLIDES,
    )  # fmt: skip
    # A row beyond the last one sees no key where all are masked.
    found = summed / tl.maximum(total, 1e-30)[:, None]
    tl.store(O + at, found.to(O.dtype.element_ty), mask=row[:, None] < rows)


if triton is not None:
    _more = triton.jit(_more)
    # Else each kind of length would be compiled anew: divisible by 16, 1, and others.
    _attend = kernel(_attend_kernel, do_not_specialize=("rows", "keys"))
