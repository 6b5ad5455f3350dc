# ruff: noqa: N803, ANN001, ANN202 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-def"
"""Mixtures of experts for a step's few rows on a GPU: each expert that a row chose is read once.

Nothing is sorted or gathered. Of the places (row, choice) with one expert the first one in a tile of rows works for all
of the tile: its programs multiply the rows that chose the expert with a part of its weights. A row of a tile of tensor
cores reads no other, so that a row's bits depend neither on what its neighbours chose nor on how many there are. Beside
each kernel is its definition in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from polydraft_transformers.launches import kernel
from polydraft_transformers.step_products import part_strides, runs_kernels, sum_parts

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["ACTIVATIONS", "mix", "mix_all", "route"]

ACTIVATIONS = ("gelu_pytorch_tanh", "silu")
"""Of the gates; names as in Transformers' configs."""


def route_by_definition(scores: Tensor, scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``route`` in torch's operations (``Gemma4TextRouter``)."""
    weights, chosen = scores.softmax(-1, dtype=torch.float32).topk(top_k, -1)
    weights = weights / weights.sum(-1, keepdim=True) * scale[chosen]
    return weights, chosen


def route(scores: Tensor, scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each row: those of the largest scores, of equal ones the first.

    Args:
        scores: Shape (rows, experts), or their parts, (parts, rows, experts).
        scale: Of each expert's weight, shape (experts,).
        top_k: Experts of a row.

    Returns:
        The experts' weights, float32, and the experts, int64; both (rows, top_k). Scores that are not finite make all
        weights of the row NaN.
    """
    if not runs_kernels(scores.device):
        return route_by_definition(scores, scale, top_k)
    rows, experts = scores.shape[-2:]
    row_stride, part_stride, parts = part_strides(scores)
    weights = torch.empty(rows, top_k, device=scores.device, dtype=torch.float32)
    chosen = torch.empty(rows, top_k, device=scores.device, dtype=torch.int64)
    block = triton.next_power_of_2(experts)
    _route[(rows,)](
        *(scores, scale, weights, chosen, experts, row_stride, part_stride),
        PARTS=parts,
        TOP=top_k,
        TOPS=triton.next_power_of_2(top_k),
        BLOCK=block,
        num_warps=4,
    )
    return weights, chosen


def mix_by_definition(
    hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: str
) -> Tensor:
    """``mix`` in torch's operations, over copies of the experts' weights."""
    inner = torch.einsum("rw,rknw->rkn", hidden, gate_up[chosen])
    gate, up = inner.chunk(2, -1)
    gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    return torch.einsum("rkn,rkwn->rkw", gate * up, down[chosen]) * weights[..., None]


def mix_all(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: str) -> Tensor:
    """What each row's experts give, weighted and summed, in products over all experts, few and small ones on a CPU.

    Of those that a row did not choose it gets 0 times a number. Arguments are those of ``mix``; (rows, width).
    """
    experts, width, inner = down.shape
    gate, up = functional.linear(hidden, gate_up.view(-1, width)).view(-1, experts, 2 * inner).chunk(2, -1)
    gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    shares = weights.new_zeros(len(hidden), experts).scatter(1, chosen, weights)
    between = gate * up * shares[..., None]
    return torch.bmm(between.transpose(0, 1), down.transpose(1, 2)).sum(0)


def mix(hidden: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: str) -> Tensor:
    """What each row's experts give, weighted.

    Args:
        hidden: Shape (rows, width).
        gate_up: Shape (experts, 2 * inner width, width): gates, then what they multiply.
        down: Shape (experts, width, inner width).
        weights: Float32, shape (rows, top_k).
        chosen: Int64, shape (rows, top_k); the experts of a row differ.
        activation: Of the gates, one of ``ACTIVATIONS``.

    Returns:
        Float32, shape (rows, top_k, width); not summed over the row's experts.
    """
    rows, width = hidden.shape
    top_k, inner = chosen.shape[1], down.shape[2]
    between = torch.empty(rows, top_k, inner, device=hidden.device, dtype=hidden.dtype)
    found = torch.empty(rows, top_k, width, device=hidden.device, dtype=torch.float32)
    places = rows * top_k
    shape = {
        "TOP": top_k,
        "TOPS": triton.next_power_of_2(top_k),
        "PLACES": triton.next_power_of_2(min(places, _TILE_ROWS * top_k)),
        "ROWS": 16 if rows <= 16 else _TILE_ROWS,
    }
    block = _INNER[hidden.itemsize]
    _inner[(-(-inner // block["BLOCK_N"]), places)](
        *(hidden, gate_up, chosen, between, rows, width, inner, hidden.stride(0)),
        SILU=activation == "silu",
        **shape,
        **block,
    )
    block = _OUTER[hidden.itemsize]
    _outer[(-(-width // block["BLOCK_N"]), places)](
        *(between, down, chosen, weights, found, rows, width, inner), **shape, **block
    )
    return found


_TILE_ROWS = 32
# By size of the weights' dtype in bytes: the tiles of weights that a program multiplies, and how many are on their way.
_INNER = {
    2: {"BLOCK_N": 32, "BLOCK_K": 128, "num_stages": 4, "num_warps": 4},
    4: {"BLOCK_N": 32, "BLOCK_K": 64, "num_stages": 3, "num_warps": 4},
}
_OUTER = {
    2: {"BLOCK_N": 64, "BLOCK_K": 128, "num_stages": 3, "num_warps": 4},
    4: {"BLOCK_N": 32, "BLOCK_K": 64, "num_stages": 3, "num_warps": 4},
}


def _route_kernel(
    S, scale, weights, chosen, experts, s_row, s_part,
    PARTS: tl.constexpr, TOP: tl.constexpr, TOPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, expert = tl.program_id(0), tl.arange(0, BLOCK)
    exists = expert < experts
    score = sum_parts(S + row * s_row + expert, s_part, exists, PARTS, scale.dtype.element_ty)
    score = tl.where(exists, score, float("-inf"))
    shares = tl.exp(score - tl.max(score, 0))
    shares = shares / tl.sum(shares, 0)
    # NaN compares with nothing: it gets a place in the order, so that the chosen experts always exist and differ.
    order = tl.where(score > float("-inf"), score, float("-inf"))
    equal = order[None, :] == order[:, None]
    ahead = (order[None, :] > order[:, None]) | (equal & (expert[None, :] < expert[:, None]))
    rank = tl.sum(ahead.to(tl.int32), 1)
    place = tl.arange(0, TOPS)
    here = rank[None, :] == place[:, None]
    best = tl.sum(tl.where(here, expert[None, :], 0), 1)
    share = tl.sum(tl.where(here, shares[None, :], 0.0), 1)
    share = tl.where(place < TOP, share, 0.0)
    share = share / tl.sum(share, 0) * tl.load(scale + best).to(tl.float32)
    tl.store(weights + row * TOP + place, share, mask=place < TOP)
    tl.store(chosen + row * TOP + place, best, mask=place < TOP)


def _is_first(chosen, first, place, expert, places, PLACES: tl.constexpr):
    """Whether no earlier place from ``first`` on has this expert."""
    every = first + tl.arange(0, PLACES)
    others = tl.load(chosen + every, mask=every < places, other=-1)
    return tl.min(tl.where(others == expert, every, places), 0) == place


def _rows_of(chosen, expert, first, rows, TOP: tl.constexpr, TOPS: tl.constexpr, ROWS: tl.constexpr):
    """Which rows of a tile chose an expert, and their places; ``first``: the tile's first row."""
    row, choice = first + tl.arange(0, ROWS), tl.arange(0, TOPS)
    mine = tl.load(
        chosen + row[:, None] * TOP + choice[None, :], mask=(row[:, None] < rows) & (choice[None, :] < TOP), other=-1
    )
    hit = mine == expert
    return tl.sum(hit.to(tl.int32), 1) > 0, row * TOP + tl.sum(tl.where(hit, choice[None, :], 0), 1)


def _inner_kernel(
    X, W, chosen, Y, rows, width, inner, x_row,
    SILU: tl.constexpr, TOP: tl.constexpr, TOPS: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1)
    expert = tl.load(chosen + place)
    first = place // (TOP * ROWS) * ROWS  # row of the tile
    if _is_first(chosen, first * TOP, place, expert, rows * TOP, PLACES):
        dtype: tl.constexpr = Y.dtype.element_ty
        here, at = _rows_of(chosen, expert, first, rows, TOP, TOPS, ROWS)
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        gates = W + expert * (2 * inner * width) + column[:, None] * width + k[None, :]
        x_at = X + row[:, None] * x_row + k[None, :]
        gate = tl.zeros((ROWS, BLOCK_N), tl.float32)
        up = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(0, width, BLOCK_K):
            within = k[None, :] < width - start
            x = tl.load(x_at + start, mask=here[:, None] & within, other=0.0)
            seen = (column[:, None] < inner) & within
            gate_weights = tl.load(gates + start, mask=seen, other=0.0)
            up_weights = tl.load(gates + inner * width + start, mask=seen, other=0.0)
            gate = tl.dot(x, tl.trans(gate_weights), gate, input_precision="ieee")
            up = tl.dot(x, tl.trans(up_weights), up, input_precision="ieee")
        gate = gate.to(dtype).to(tl.float32)
        if SILU:
            gate = gate / (1.0 + tl.exp(-gate))
        else:
            # 1 + tanh(y) = 2 / (1 + exp(-2y)), without the cancellation for negative y
            gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
        product = gate.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        tl.store(
            Y + at[:, None] * inner + column[None, :], product.to(dtype), mask=here[:, None] & (column[None, :] < inner)
        )


def _outer_kernel(
    Y, W, chosen, weights, F, rows, width, inner,
    TOP: tl.constexpr, TOPS: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1)
    expert = tl.load(chosen + place)
    first = place // (TOP * ROWS) * ROWS  # row of the tile
    if _is_first(chosen, first * TOP, place, expert, rows * TOP, PLACES):
        here, at = _rows_of(chosen, expert, first, rows, TOP, TOPS, ROWS)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        w_at = W + expert * (width * inner) + column[:, None] * inner + k[None, :]
        y_at = Y + at[:, None] * inner + k[None, :]
        found = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(0, inner, BLOCK_K):
            within = k[None, :] < inner - start
            y = tl.load(y_at + start, mask=here[:, None] & within, other=0.0)
            w = tl.load(w_at + start, mask=(column[:, None] < width) & within, other=0.0)
            found = tl.dot(y, tl.trans(w), found, input_precision="ieee")
        weight = tl.load(weights + at, mask=here, other=0.0)
        found = found.to(Y.dtype.element_ty).to(tl.float32) * weight[:, None]
        tl.store(F + at[:, None] * width + column[None, :], found, mask=here[:, None] & (column[None, :] < width))


if triton is not None:
    _is_first, _rows_of = triton.jit(_is_first), triton.jit(_rows_of)
    _route = kernel(_route_kernel)
    _inner, _outer = (kernel(function, do_not_specialize=("rows",)) for function in (_inner_kernel, _outer_kernel))
