# ruff: noqa: N803, ANN001, ANN202 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-call,no-untyped-def"
"""Products of a step's few rows with a layer's weights on a GPU.

Reading the weights is all that takes time, and a matrix of a layer is so small that its rows alone do not keep all of
the GPU reading: the sums over its columns are split too. The parts are added by what reads the product next
(``fused_layers``, ``step_experts``), which saves a launch. How the sums are split depends on the weights' shape alone,
and a row of a tile of tensor cores reads no other: a row's bits depend neither on its neighbours nor on how many there
are. More rows than a tile has are more tiles, which read the same weights at the same time, once from memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polydraft_transformers.launches import kernel

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["add_parts", "multiply", "multiply_gated", "part_strides", "runs_kernels", "splits"]

_DEVICE = "cuda"  # another one only in tests, whose interpreter runs kernels on a CPU
_MOST_ROWS = 128  # of a step that sequences share
_PROGRAMS = 256  # about two for each multiprocessor
_MOST_PARTS = 8
_N, _K = 32, 128  # weights of a tile
_TILE = {"BLOCK_N": _N, "BLOCK_K": _K, "num_warps": 4}


def runs_kernels(device: torch.device) -> bool:
    """Whether this plugin's kernels run on a device: on a GPU, with Triton."""
    return triton is not None and device.type == _DEVICE


def splits(rows: Tensor) -> bool:
    """Whether the kernels run for these rows: few, in a 16-bit dtype, on a GPU with Triton."""
    return runs_kernels(rows.device) and rows.itemsize == 2 and rows.shape[0] <= _MOST_ROWS


def add_parts(product: Tensor, dtype: torch.dtype) -> Tensor:
    """A product whose parts are added; the definition of what the kernels that read it do.

    Args:
        product: As ``multiply`` gives it: (rows, out), or float32 (parts, rows, out).
        dtype: Of the sum, to which it is rounded once.

    Returns:
        Shape (rows, out).
    """
    return product if product.dim() == 2 else product.sum(0).to(dtype)


def part_strides(product: Tensor) -> tuple[int, int, int]:
    """Of a product as ``multiply`` gives it: the stride of its rows and of its parts, and how many parts there are."""
    return (product.stride(0), 0, 1) if product.dim() == 2 else (product.stride(1), product.stride(0), len(product))


def multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """``functional.linear(rows, weight)``, in parts where that is faster.

    Args:
        rows: Shape (rows, in).
        weight: Shape (out, in), contiguous.

    Returns:
        The product, (rows, out); for few rows on a GPU its parts, float32 (parts, rows, out): see ``add_parts``.
    """
    if not splits(rows):
        # `functional.linear` in fewer operations.
        return torch.mm(rows, weight.t())
    count, width = rows.shape
    out = weight.shape[0]
    blocks = -(-out // _N)
    parts = 1
    while parts < _MOST_PARTS and blocks * parts < _PROGRAMS:
        parts *= 2
    chunk = -(-width // (parts * _K)) * _K
    parts = -(-width // chunk)
    product = torch.empty(parts, count, out, device=rows.device, dtype=torch.float32)
    tile, stages = _tile_of(count)
    _multiply[(-(-count // tile), blocks, parts)](
        *(rows, weight, product, count, width, out, rows.stride(0), chunk),
        ROWS=tile,
        num_stages=stages,
        **_TILE,
    )
    return product


def multiply_gated(rows: Tensor, weight: Tensor) -> Tensor | None:
    """The product with gates and what they multiply, and the gates' GELU, in one: (rows, out / 2), in the rows' dtype.

    Args:
        rows: Shape (rows, in).
        weight: Shape (out, in), contiguous; the gates are its first half.

    Returns:
        None where ``multiply`` and ``fused_layers.gated`` are as fast: for other than few rows, and for a weight whose
        rows alone do not keep the GPU busy.
    """
    inner = weight.shape[0] // 2
    blocks = -(-inner // _N)
    if not splits(rows) or blocks < _PROGRAMS:
        return None
    count, width = rows.shape
    product = torch.empty(count, inner, device=rows.device, dtype=rows.dtype)
    tile, stages = _tile_of(count)
    _multiply_gated[(-(-count // tile), blocks)](
        *(rows, weight, product, count, width, inner, rows.stride(0)),
        ROWS=tile,
        num_stages=stages,
        **_TILE,
    )
    return product


def _tile_of(rows: int) -> tuple[int, int]:
    """How many rows a program multiplies, and how many tiles of weights are under way at a time."""
    return (64, 3) if rows > 32 else (32 if rows > 16 else 16, 4)


def sum_parts(pointers, stride, exists, PARTS: tl.constexpr, dtype: tl.constexpr):
    """For other kernels: the elements of a product whose parts are ``stride`` apart, added and rounded; 0 elsewhere."""
    total = tl.load(pointers, mask=exists, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(pointers + part * stride, mask=exists, other=0.0).to(tl.float32)
    return total.to(dtype).to(tl.float32)


def _multiply_kernel(
    X, W, P, rows, width, out, x_row, chunk, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    part = tl.program_id(2)
    first = part * chunk
    last = tl.minimum(first + chunk, width)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = X + row[:, None] * x_row + k[None, :]
    w_at = W + column[:, None].to(tl.int64) * width + k[None, :]
    product = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        within = k[None, :] < last - start
        x = tl.load(x_at + start, mask=(row[:, None] < rows) & within, other=0.0)
        w = tl.load(w_at + start, mask=(column[:, None] < out) & within, other=0.0)
        product = tl.dot(x, tl.trans(w), product)
    at = (part * rows + row[:, None]) * out + column[None, :]
    tl.store(P + at, product, mask=(row[:, None] < rows) & (column[None, :] < out))


def _multiply_gated_kernel(
    X, W, Y, rows, width, inner, x_row, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = Y.dtype.element_ty
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at = X + row[:, None] * x_row + k[None, :]
    gates = W + column[:, None].to(tl.int64) * width + k[None, :]
    ups = gates + tl.cast(inner, tl.int64) * width
    gate = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        within = k[None, :] < width - start
        x = tl.load(x_at + start, mask=(row[:, None] < rows) & within, other=0.0)
        seen = (column[:, None] < inner) & within
        gate = tl.dot(x, tl.trans(tl.load(gates + start, mask=seen, other=0.0)), gate)
        up = tl.dot(x, tl.trans(tl.load(ups + start, mask=seen, other=0.0)), up)
    gate = gate.to(dtype).to(tl.float32)
    # 1 + tanh(y) = 2 / (1 + exp(-2y)), without the cancellation for negative y
    gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    product = gate.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    at = row[:, None] * inner + column[None, :]
    tl.store(Y + at, product.to(dtype), mask=(row[:, None] < rows) & (column[None, :] < inner))


if triton is not None:
    sum_parts = triton.jit(sum_parts)
    # The number of rows changes all the time, and is not worth a kernel of its own: 1, divisible by 16, others.
    _multiply, _multiply_gated = (
        kernel(function, do_not_specialize=("rows",)) for function in (_multiply_kernel, _multiply_gated_kernel)
    )
