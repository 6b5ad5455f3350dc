"""Gumbel noise on CUDA in one kernel instead of a hundred, with the same bits.

Torch compiles the kernel when it is first used (``torch.cuda.jiterator``, by NVRTC, which comes with torch). Additions
and multiplications are written as intrinsics that the compiler never fuses into one rounding. Before a device uses the
kernel, it is compared with the separate operations, bit by bit; where it cannot be made, or differs, those are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from polydraft.sampling.noise import LOG_CONSTANTS

__all__ = ["fused_gumbel"]

Gumbel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""As ``ArrayOps.gumbel``: token ids (rows, n), and the two keys of each row, (rows, 1); noise (rows, n), float32."""

# h has 23 bits and 5.96e-08 is 2**-24: u = (2h + 1) / 2**24 is exact in float32, and neither 0 nor 1.
_SOURCE = """
template <typename T> T polydraft_gumbel(T token_id, T low, T high) {
  auto mix = [](unsigned int x) {
    x ^= x >> 16; x *= 0x7FEB352Du;
    x ^= x >> 15; x *= 0x846CA68Bu;
    return x ^ (x >> 16);
  };
  auto minus_log = [](float value) {
    int bits = __float_as_int(value);
    int exponent = (bits >> 23) - 127;
    float mantissa = __int_as_float((bits & 0x7FFFFF) | 0x3F800000);
    bool large = mantissa > SQRT_2;
    float e = (float)(large ? exponent + 1 : exponent);
    float x = __fadd_rn(large ? __fmul_rn(mantissa, 0.5f) : mantissa, -1.0f);
    float square = __fmul_rn(x, x);
    const float c[9] = {POLYNOMIAL};
    float y = c[0];
    for (int i = 1; i < 9; ++i) y = __fadd_rn(__fmul_rn(y, x), c[i]);
    y = __fmul_rn(__fmul_rn(y, x), square);
    y = __fadd_rn(y, __fmul_rn(e, LOG2_LOW));
    y = __fadd_rn(y, __fmul_rn(square, -0.5f));
    return __fmul_rn(__fadd_rn(__fadd_rn(x, y), __fmul_rn(e, LOG2_HIGH)), -1.0f);
  };
  unsigned int h = mix(mix((unsigned int)token_id ^ (unsigned int)low) + (unsigned int)high) >> 9;
  float u = __fmul_rn(__fadd_rn(__fmul_rn((float)h, 2.0f), 1.0f), 5.9604644775390625e-08f);
  return (T)__float_as_int(minus_log(minus_log(u)));
}
"""


@cache
def fused_gumbel(device: torch.device, separate: Gumbel) -> Gumbel | None:
    """The kernel for a device.

    Args:
        device: A CUDA device.
        separate: The same noise in separate operations.

    Returns:
        None where torch cannot make the kernel, or where any bit differs from ``separate``'s.
    """
    try:
        kernel = torch.cuda.jiterator._create_jit_fn(_source())

        def fused(token_ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
            # jiterator's result has the inputs' dtype: int32, which carries the bits of float32.
            made: torch.Tensor = kernel(*(array.to(torch.int32) for array in (token_ids, low, high)))
            return made.view(torch.float32)

        # A hundred thousand token ids, in two rows with different keys.
        ids = torch.arange(0, 262_144 * 8, 21, device=device).expand(2, -1)
        low = torch.tensor([[1], [0xFFFFFFFF]], device=device)
        high = torch.tensor([[0x9E3779B9], [7]], device=device)
        wanted, found = separate(ids, low, high), fused(ids, low, high)
        return fused if torch.equal(wanted.view(torch.int32), found.view(torch.int32)) else None
    except (AssertionError, AttributeError, RuntimeError):
        return None


def _source() -> str:
    """The kernel with the constants of ``polydraft.sampling.noise``, in enough digits to be read back exactly."""
    source = _SOURCE
    for name, value in LOG_CONSTANTS.items():
        values = value if isinstance(value, tuple) else (value,)
        source = source.replace(name, ", ".join(f"{float(number):.17g}f" for number in values))
    return source
