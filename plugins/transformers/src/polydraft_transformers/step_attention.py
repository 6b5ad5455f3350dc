# ruff: noqa: N803, N806, ANN001, ANN202 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-def"
"""Attention of a step's few rows on a GPU: the keys are split over it, and only slots that are written are read.

The position of a row decides what it sees (``KvCache.begin_step`` has the rule), so no mask is made or read. A program
runs all query heads of a KV head over one part of the slots; a second kernel joins the parts. A part takes one block of
slots of so many, so that all have equally much to do wherever the text ends. How many parts there are depends on the
kind of layer alone, and a slot that a row does not see adds exactly 0: a row's bits do not depend on the rows next to
it. ``gemma4`` has the definition in torch's operations, which runs where Triton is missing.
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

__all__ = ["attend", "can_attend"]

_ROWS = 16  # of a tile, the fewest that tensor cores multiply
_PARTS = 64  # of the slots of a full layer
_WINDOW_PARTS = 40  # at most, of a sliding layer's


def can_attend(device: torch.device, head_dims: set[int]) -> bool:
    """Whether the kernel runs here: on a GPU, with Triton, for heads whose size is a power of two."""
    return runs_kernels(device) and all(16 <= n <= 512 and not n & (n - 1) for n in head_dims)


def attend(
    queries: Tensor, places: Tensor, positions: Tensor, *, kv_heads: int, near: int, window: int | None
) -> Tensor:
    """What each row sees.

    Args:
        queries: Shape (rows, heads, head_dim); rows may be strided.
        places: Int64, shape (sequences, 3): where each one's keys and values lie, and how many slots they have; see
            ``KvCache.places``. Each has as many of the rows, one sequence after the other.
        positions: Int64, shape (rows,).
        kv_heads: Of the layer; ``heads`` is a multiple of it.
        near: Distance of the nearest token that a row sees: 0, or 1 for a row that is not stored.
        window: Of a sliding layer, whose slots are a ring; None: slot p holds position p.

    Returns:
        Shape (rows, heads, head_dim), in the queries' dtype; scores are not scaled.
    """
    rows, heads, dim = queries.shape
    groups, own_rows = heads // kv_heads, rows // len(places)
    block = 32 if dim <= 256 else 16
    parts = _PARTS if window is None else min(_WINDOW_PARTS, -(-window // block) + 1)
    sums = torch.empty(rows, heads, parts, dim, device=queries.device, dtype=torch.float32)
    # Of each part: the largest score, and the sum of the exponentials of the others' distance to it.
    largest = torch.empty(rows, heads, parts, device=queries.device, dtype=torch.float32)
    weights = torch.empty_like(largest)
    seen = torch.empty(rows, heads, dim, device=queries.device, dtype=queries.dtype)
    tiles = -(-own_rows * groups // _ROWS)
    _part[(kv_heads, parts, tiles * len(places))](
        *(queries, places, positions, sums, largest, weights),
        *(own_rows, groups, tiles, near, window or 0, queries.stride(0), queries.stride(1)),
        DIM=dim,
        BLOCK=block,
        ROWS=_ROWS,
        SLIDES=window is not None,
        num_warps=4,
    )
    _join[(rows * heads,)](
        sums, largest, weights, seen, parts, DIM=dim, PARTS=triton.next_power_of_2(parts), num_warps=4
    )
    return seen


def _part_kernel(
    Q, places, P, sums, largest, weights, rows, groups, tiles, near, window, q_row, q_head,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLIDES: tl.constexpr,
):  # fmt: skip
    head, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2) // tiles
    folded = tl.program_id(2) % tiles * ROWS + tl.arange(0, ROWS)  # row of the sequence * groups + group
    exists = folded < rows * groups
    row, own_head = sequence * rows + folded // groups, head * groups + folded % groups
    dim = tl.arange(0, DIM)
    slots = tl.load(places + sequence * 3 + 2).to(tl.int32)
    start_of_head = head.to(tl.int64) * slots * DIM
    K = tl.multiple_of(tl.load(places + sequence * 3).to(Q.dtype), 16) + start_of_head
    V = tl.multiple_of(tl.load(places + sequence * 3 + 1).to(Q.dtype), 16) + start_of_head
    position = tl.load(P + row, mask=exists, other=-1)
    q = tl.load(Q + row[:, None] * q_row + own_head[:, None] * q_head + dim[None, :], mask=exists[:, None], other=0.0)
    most = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DIM), tl.float32)
    last = slots
    if not SLIDES:
        last = tl.minimum(slots, tl.max(position, 0) + 1 - near)  # later slots hold nothing that is seen
    for start in range(part * BLOCK, last, parts * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < last
        k = tl.load(K + slot[:, None] * DIM + dim[None, :], mask=there[:, None], other=0.0)
        v = tl.load(V + slot[:, None] * DIM + dim[None, :], mask=there[:, None], other=0.0)
        ahead = position[:, None] - near - slot[None, :]
        if SLIDES:
            # From each row back to the newest position that the slot can hold.
            back = (ahead % slots + slots) % slots
            seen = back < tl.minimum(position[:, None] + 1 - near, window + near)
        else:
            seen = ahead >= 0
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(seen & there[None, :] & exists[:, None], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp(most - new)
        share = tl.exp(scores - new[:, None])
        total = total * kept + tl.sum(share, 1)
        summed = summed * kept[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        most = new
    at = (row * (tl.num_programs(0) * groups) + own_head) * parts + part
    tl.store(sums + at[:, None] * DIM + dim[None, :], summed, mask=exists[:, None])
    tl.store(largest + at, most, mask=exists)
    tl.store(weights + at, total, mask=exists)


def _join_kernel(
    sums, largest, weights, seen, parts, DIM: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    one = tl.program_id(0)  # row and head
    part, dim = tl.arange(0, PARTS), tl.arange(0, DIM)
    exists = part < parts
    most = tl.load(largest + one * parts + part, mask=exists, other=-1e30)
    share = tl.exp(most - tl.max(most, 0))
    total = tl.sum(share * tl.load(weights + one * parts + part, mask=exists, other=0.0), 0)
    summed = tl.load(sums + (one * parts + part)[:, None] * DIM + dim[None, :], mask=exists[:, None], other=0.0)
    found = tl.sum(summed * share[:, None], 0) / total
    tl.store(seen + one * DIM + dim, found.to(seen.dtype.element_ty))


if triton is not None:
    # One kernel for plain steps, rounds and the drafter's rows, of one sequence and of several.
    _part = kernel(_part_kernel, do_not_specialize=("rows", "tiles", "near"))
    _join = kernel(_join_kernel)
