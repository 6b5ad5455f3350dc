# ruff: noqa: N803, ANN001, ANN202 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-call,no-untyped-def"
"""The small operations between a layer's matrix products, each in one Triton kernel on a GPU.

A step of few rows waits for launches, not for arithmetic. Beside each kernel stands its definition in torch's
operations, which runs where Triton is missing; a kernel rounds where the definition does. A program computes one row,
or a part of one, and reads no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from polydraft_transformers.launches import kernel
from polydraft_transformers.step_products import add_parts, part_strides, runs_kernels, sum_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["Norm", "Stored", "add_normed", "gated", "mixed", "rotate_and_store"]

_PART = 1024  # elements that a program of `gated` computes


class Stored(NamedTuple):
    """Where the keys and values of rows go."""

    places: Tensor
    """Int64, (sequences, 3): of each sequence's keys and values, (kv_heads, slots, head_dim), the addresses, and how
    many slots they have. Each has as many of the rows, one sequence after the other."""
    slots: Tensor
    """Int64, (rows,): the slot of each row."""
    kv_heads: int


class Norm:
    """Root-mean-square norm of the last axis.

    Args:
        weight: Gain, shape (width,); None: no gain.
        width: Of the last axis.
        eps: Added to the mean square.
        like: A tensor of the device and dtype that it is used with.
        factor: What the normed row is multiplied by after the gain; rounded on its own, but not in float32 on a CPU.
    """

    def __init__(
        self, weight: Tensor | None, width: int, eps: float, like: Tensor, *, factor: float | None = None
    ) -> None:
        self.weight = weight if weight is None else weight.detach()
        self.eps = eps
        self.factor = factor
        self._shape = (width,)
        # torch has no single kernel for this norm on CPUs; in float32, where no rounding between operations has to
        # be kept, these three take half the time of the seven it runs: x / sqrt(|x|**2 + width * eps) * sqrt(width).
        self._short = like.device.type == "cpu" and like.dtype == torch.float32
        self._floor = like.new_tensor((width * eps) ** 0.5)
        # A tensor in any case: torch takes longer to multiply by a number.
        scale = width**0.5 * (factor or 1.0)
        self._gain = like.new_tensor(scale) if weight is None else weight.detach() * scale

    def __call__(self, hidden: Tensor) -> Tensor:
        """Norm rows, shape (..., width)."""
        if self._short:
            return self._unit(hidden).mul_(self._gain)
        if self.factor is not None:
            normed = functional.rms_norm(hidden, self._shape, None, self.eps)
            return (normed if self.weight is None else normed * self.weight) * self.factor
        return functional.rms_norm(hidden, self._shape, self.weight, self.eps)

    def added(self, hidden: Tensor, branch: Tensor) -> Tensor:
        """``hidden`` plus the normed ``branch``, both (rows, width)."""
        if self._short:
            return torch.addcmul(hidden, self._unit(branch), self._gain)
        return hidden + self(branch)

    def _unit(self, hidden: Tensor) -> Tensor:
        # What is new is changed in place here and below: to get memory takes longer than to fill it.
        unit: Tensor = hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).hypot_(self._floor)
        return unit


def mixed(dense: Tensor, found: Tensor, after_dense: Norm, after_experts: Norm) -> Tensor:
    """The sum of a dense part and of a mixture of experts, each normed; the definition of ``add_normed``'s ``mixture``.

    Args:
        dense: Shape (rows, width).
        found: Shape (rows, top_k, width), float32: what each expert of a row gives, weighted; or their sum,
            (rows, width).
        after_dense: Of ``dense``.
        after_experts: Of the experts' sum.
    """
    return after_experts.added(after_dense(dense), found if found.dim() == 2 else found.sum(1).to(dense.dtype))


def add_normed_by_definition(
    hidden: Tensor,
    branch: Tensor,
    after: Norm,
    before: Sequence[Norm] = (),
    *,
    scalar: Tensor | None = None,
    mixture: tuple[Tensor, Norm, Norm] | None = None,
) -> tuple[Tensor, ...]:
    """``add_normed`` in torch's operations."""
    branch = add_parts(branch, hidden.dtype)
    if mixture is not None:
        branch = mixed(branch, *mixture)
    hidden = after.added(hidden, branch)
    if scalar is not None:
        hidden = hidden.mul_(scalar)
    return hidden, *(norm(hidden) for norm in before)


def add_normed(
    hidden: Tensor,
    branch: Tensor,
    after: Norm,
    before: Sequence[Norm] = (),
    *,
    scalar: Tensor | None = None,
    mixture: tuple[Tensor, Norm, Norm] | None = None,
) -> tuple[Tensor, ...]:
    """Add a normed branch to the residual rows, and norm the sum for what reads it next.

    Args:
        hidden: Residual rows, shape (rows, width).
        branch: What is added, shape (rows, width), or its parts, (parts, rows, width).
        after: Norms the branch.
        before: Norms of the sum, three at most.
        scalar: Shape (1,): what the sum is multiplied by.
        mixture: The experts' part of the branch, and both parts' norms; see ``mixed``.

    Returns:
        The sum, and the sum normed by each of ``before``; all of the shape and dtype of ``hidden``.
    """
    if not runs_kernels(hidden.device):
        return add_normed_by_definition(hidden, branch, after, before, scalar=scalar, mixture=mixture)
    rows, width = hidden.shape
    row_stride, part_stride, parts = part_strides(branch)
    outputs = [torch.empty_like(hidden) for _ in range(1 + len(before))]
    nothing = hidden  # for pointers that a kernel's constants leave unread
    found, after_dense, after_experts = mixture if mixture is not None else (nothing, after, after)
    summed = (after, after_dense, after_experts)
    missing = 3 - len(before)
    padded = [*before, *[after] * missing]
    block = triton.next_power_of_2(width)
    _add_normed[(rows,)](
        *(hidden, branch, found, nothing if scalar is None else scalar),
        *(nothing if norm.weight is None else norm.weight for norm in (*summed, *padded)),
        *(*outputs, *[nothing] * missing),
        *(width, row_stride, part_stride),
        *(norm.eps for norm in (*summed, *padded)),
        *(norm.factor or 1.0 for norm in padded),
        BLOCK=block,
        PARTS=parts,
        SCALED=scalar is not None,
        TOP=0 if mixture is None else 1 if found.dim() == 2 else found.shape[1],
        NORMS=len(before),
        GAINS=sum((norm.weight is not None) << i for i, norm in enumerate((*padded, *summed))),
        FACTORS=sum((norm.factor is not None) << i for i, norm in enumerate(before)),
        num_warps=16 if block >= 8192 else 8 if block >= 1024 else 4,
    )
    return tuple(outputs)


def gated_by_definition(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """``gated`` in torch's operations."""
    return functional.gelu(add_parts(gate, dtype), approximate="tanh").mul_(add_parts(up, dtype))


def gated(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """GELU of the gate (its approximation by tanh), times ``up``.

    Args:
        gate: Shape (rows, width), or its parts, (parts, rows, width); rows may be strided.
        up: As ``gate``.
        dtype: Of the result, (rows, width).
    """
    if not runs_kernels(gate.device):
        return gated_by_definition(gate, up, dtype)
    rows, width = gate.shape[-2:]
    product = torch.empty(rows, width, device=gate.device, dtype=dtype)
    gate_row, gate_part, gate_parts = part_strides(gate)
    up_row, up_part, up_parts = part_strides(up)
    _gated[(rows, -(-width // _PART))](
        *(gate, up, product, width, gate_row, gate_part, up_row, up_part),
        GATE_PARTS=gate_parts,
        UP_PARTS=up_parts,
        PART=_PART,
        num_warps=4,
    )
    return product


def rotate_and_store_by_definition(
    projected: Tensor, norm: Norm, gain: Tensor, cos: Tensor, signed_sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries, keys and values of rows, (rows, heads, head_dim) each; without KV heads queries alone.

    Args:
        projected: Shape (rows, heads of queries, then keys, then values; head_dim); without values, the keys' are both.
        norm: Of each head, without gain.
        gain: Shape (heads + kv_heads, head_dim).
        cos: Shape (rows, 1, head_dim).
        signed_sin: As ``cos``; its first half is negative.
        heads: Of queries.
        kv_heads: Of keys.
    """
    normed = norm(projected)
    rotated = (normed.narrow(1, 0, heads + kv_heads) if kv_heads else normed) * gain
    # Rolling by half a head swaps its halves; the minus of the rotation is in ``signed_sin``.
    swapped = rotated.roll(int(projected.shape[-1]) // 2, -1)
    rotated = rotated.mul_(cos).addcmul_(swapped, signed_sin)
    if not kv_heads:
        return rotated, None, None
    # Values get neither gain nor rotation. Without projections of their own they are the normed keys'.
    return rotated.narrow(1, 0, heads), rotated.narrow(1, heads, kv_heads), normed.narrow(1, -kv_heads, kv_heads)


def rotate_and_store(
    projected: Tensor,
    norm: Norm,
    gain: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    heads: int,
    stored: Stored | None,
) -> Tensor:
    """As ``rotate_and_store_by_definition``, on a GPU with Triton, and keys and values go where they are stored.

    Args:
        projected: As there, contiguous, or its parts, (parts, rows, heads, head_dim); head_dim is a power of two.
        norm: As there.
        gain: As there.
        cos: As there.
        signed_sin: As there.
        heads: As there.
        stored: Where keys and values go. None: the rows have queries alone.

    Returns:
        The queries.
    """
    rows, all_heads, dim = projected.shape[-3:]
    queries = torch.empty(rows, heads, dim, device=projected.device, dtype=gain.dtype)
    places, slots, kv_heads = (queries, queries, 0) if stored is None else stored
    _rotate[(rows, all_heads)](
        *(projected, queries, places, gain, cos, signed_sin, slots),
        *(heads, kv_heads, norm.eps, rows // len(places), rows * all_heads * dim),
        PARTS=len(projected) if projected.dim() == 4 else 1,
        DIM=dim,
        STORES=stored is not None,
        SHARED=all_heads == heads + kv_heads,
        num_warps=4 if dim >= 256 else 1,
    )
    return queries


def _normed(
    row, gains, column, exists, width, eps, factor, GAIN: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """A row, whose elements beyond ``width`` are 0, over its root mean square; rounded as ``Norm`` rounds."""
    scaled = row * tl.rsqrt(tl.sum(row * row, 0) / width + eps)
    if FACTOR:
        scaled = scaled.to(dtype).to(tl.float32)
    if GAIN:
        scaled *= tl.load(gains + column, mask=exists, other=0.0).to(tl.float32)
    if FACTOR:
        scaled = scaled.to(dtype).to(tl.float32) * factor
    return scaled.to(dtype).to(tl.float32)


def _add_normed_kernel(
    H, X, F, S, after, after_dense, after_experts, gain_0, gain_1, gain_2, sums, out_0, out_1, out_2,
    width, x_row, x_part, eps, dense_eps, experts_eps, eps_0, eps_1, eps_2, factor_0, factor_1, factor_2,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr, NORMS: tl.constexpr,
    GAINS: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    exists = column < width
    at = row * width + column
    dtype: tl.constexpr = sums.dtype.element_ty
    x = sum_parts(X + row * x_row + column, x_part, exists, PARTS, dtype)
    hidden = tl.load(H + at, mask=exists, other=0.0).to(tl.float32)
    if TOP > 0:
        found = tl.zeros((BLOCK,), tl.float32)
        for choice in tl.static_range(TOP):
            found += tl.load(F + (row * TOP + choice) * width + column, mask=exists, other=0.0).to(tl.float32)
        found = found.to(dtype).to(tl.float32)
        x = _normed(x, after_dense, column, exists, width, dense_eps, 1.0, GAINS & 16, False, dtype)
        x += _normed(found, after_experts, column, exists, width, experts_eps, 1.0, GAINS & 32, False, dtype)
        x = x.to(dtype).to(tl.float32)
    hidden += _normed(x, after, column, exists, width, eps, 1.0, GAINS & 8, False, dtype)
    hidden = hidden.to(dtype).to(tl.float32)
    if SCALED:
        hidden = (hidden * tl.load(S).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(sums + at, hidden.to(dtype), mask=exists)
    if NORMS > 0:
        one = _normed(hidden, gain_0, column, exists, width, eps_0, factor_0, GAINS & 1, FACTORS & 1, dtype)
        tl.store(out_0 + at, one.to(dtype), mask=exists)
    if NORMS > 1:
        one = _normed(hidden, gain_1, column, exists, width, eps_1, factor_1, GAINS & 2, FACTORS & 2, dtype)
        tl.store(out_1 + at, one.to(dtype), mask=exists)
    if NORMS > 2:
        one = _normed(hidden, gain_2, column, exists, width, eps_2, factor_2, GAINS & 4, FACTORS & 4, dtype)
        tl.store(out_2 + at, one.to(dtype), mask=exists)


def _gelu(x):
    # 1 + tanh(y) = 2 / (1 + exp(-2y)), without the cancellation for negative y
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


def _gated_kernel(
    gate, up, product, width, gate_row, gate_part, up_row, up_part,
    GATE_PARTS: tl.constexpr, UP_PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    # A chunk of 50,000 tokens has more than 2**31 elements.
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART + tl.arange(0, PART)
    exists = column < width
    dtype: tl.constexpr = product.dtype.element_ty
    g = sum_parts(gate + row * gate_row + column, gate_part, exists, GATE_PARTS, dtype)
    u = sum_parts(up + row * up_row + column, up_part, exists, UP_PARTS, dtype)
    tl.store(product + row * width + column, (_gelu(g).to(dtype).to(tl.float32) * u).to(dtype), mask=exists)


def _rotate_kernel(
    X, Q, places, gains, COS, SIN, slots, heads, kv_heads, eps, own_rows, x_part,
    PARTS: tl.constexpr, DIM: tl.constexpr, STORES: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    row, head, all_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    dtype: tl.constexpr = Q.dtype.element_ty
    dim = tl.arange(0, DIM)
    other = (dim + DIM // 2) % DIM
    start = X + (row.to(tl.int64) * all_heads + head) * DIM
    exists = dim < DIM
    if STORES:
        place = places + row // own_rows * 3
        # Where the row begins in a KV head, and from one head to the next.
        at = tl.load(slots + row) * DIM + dim
        k_at = tl.multiple_of(tl.load(place).to(Q.dtype), 16) + at
        v_at = tl.multiple_of(tl.load(place + 1).to(Q.dtype), 16) + at
        to_head = tl.load(place + 2) * DIM
    x = sum_parts(start + dim, x_part, exists, PARTS, dtype)
    scale = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
    normed = (x * scale).to(dtype)
    if head < heads + kv_heads:
        rolled = (sum_parts(start + other, x_part, exists, PARTS, dtype) * scale).to(dtype)
        gain = tl.load(gains + head * DIM + dim).to(tl.float32)
        rolled_gain = tl.load(gains + head * DIM + other).to(tl.float32)
        cos = tl.load(COS + row * DIM + dim).to(tl.float32)
        sin = tl.load(SIN + row * DIM + dim).to(tl.float32)
        straight = (normed.to(tl.float32) * gain).to(dtype).to(tl.float32)
        crossed = (rolled.to(tl.float32) * rolled_gain).to(dtype).to(tl.float32)
        rotated = ((straight * cos).to(dtype).to(tl.float32) + crossed * sin).to(dtype)
        if head < heads:
            tl.store(Q + (row.to(tl.int64) * heads + head) * DIM + dim, rotated)
        elif STORES:
            tl.store(k_at + (head - heads) * to_head, rotated)
            if SHARED:
                tl.store(v_at + (head - heads) * to_head, normed)
    elif STORES:
        tl.store(v_at + (head - heads - kv_heads) * to_head, normed)


if triton is not None:
    _gelu, _normed = triton.jit(_gelu), triton.jit(_normed)
    _add_normed, _gated = kernel(_add_normed_kernel), kernel(_gated_kernel)
    # The number of rows changes all the time, and is not worth a kernel of its own: 1, divisible by 16, others.
    _rotate = kernel(_rotate_kernel, do_not_specialize=("own_rows",))
