# ruff: noqa: N803, ANN001, ANN202 - Triton's kernels have untyped arguments, and constants in capitals
# mypy: disable-error-code="import-not-found,no-untyped-call,no-untyped-def"
"""When the parts of a recorded round end, by the GPU's clock: for measurements."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from polydraft_transformers.launches import kernel
from polydraft_transformers.step_products import runs_kernels

if TYPE_CHECKING:
    from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["stamp"]


def stamp(times: Tensor, place: int) -> None:
    """Write the time once what was launched before has ended.

    Args:
        times: Int64; nanoseconds since some moment.
        place: Of the element.
    """
    if times.is_cuda and runs_kernels(times.device):
        _stamp[(1,)](times, PLACE=place, num_warps=1)
    else:
        times[place] = time.perf_counter_ns()


def _stamp_kernel(T, PLACE: tl.constexpr):
    tl.store(T + PLACE, tl.extra.cuda.globaltimer())


if triton is not None:
    _stamp = kernel(_stamp_kernel)
