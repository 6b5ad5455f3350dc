# mypy: disable-error-code="import-not-found,no-untyped-call"
"""Launches of Triton's kernels that take little of the host's time.

To find the compiled kernel of a call, Triton binds and describes all arguments and reads its settings anew, which takes
longer than a small kernel runs: a prompt, whose launches are not recorded, then waits for the host. Here a call is
described by what Triton compiles for (dtypes, alignment, integers that are 1 or divisible by 16); the kernel that it
gave for the first such call is launched at once for the others, with addresses in place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    import triton
except ImportError:  # torch brings it along on Linux with CUDA only
    triton = None

__all__ = ["Launcher", "kernel"]

_KNOWN = (3, 6)
"""The first version of Triton whose compiled kernels are launched here; they take all arguments, constants too."""


def kernel(function: Callable[..., None], do_not_specialize: tuple[str, ...] = ()) -> Any:
    """A kernel that is launched as those of ``triton.jit``: ``kernel[grid](*arguments, **constants)``.

    Args:
        function: Its constants stand last, and are given by name.
        do_not_specialize: Integers whose value Triton compiles nothing for.
    """
    compiled = triton.jit(function, do_not_specialize=do_not_specialize)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    # Another type where Triton's interpreter stands in for a GPU.
    return Launcher(compiled) if version >= _KNOWN and isinstance(compiled, triton.JITFunction) else compiled


class Launcher:
    """Launches a kernel.

    Args:
        compiling: Triton's kernel, which compiles itself for a call's arguments and returns what it has launched.
    """

    def __init__(self, compiling: Any) -> None:
        self._compiling = compiling
        self._constants: list[str] = [parameter.name for parameter in compiling.params if parameter.is_constexpr]
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Tensor | float, **constants: Any) -> None:
            values: list[Any] = []
            key: list[object] = [*constants.items()]
            for argument in arguments:
                if isinstance(argument, Tensor):
                    address = argument.data_ptr()
                    values.append(address)
                    # A compiled kernel belongs to a device.
                    key.append((argument.dtype, argument.get_device(), address & 15 == 0))
                    continue
                values.append(argument)
                if type(argument) is int:
                    small = -(1 << 31) <= argument < 1 << 31
                    key.append((small, argument == 1, argument & 15 == 0))
                else:
                    key.append(None)
            known = tuple(key)
            found = self._compiled.get(known)
            if found is None:
                self._compiled[known] = self._compiling[grid](*arguments, **constants)
            else:
                found[(*grid, 1, 1)[:3]](*values, *[constants[name] for name in self._constants])

        return launch
