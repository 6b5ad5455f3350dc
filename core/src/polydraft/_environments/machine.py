"""What this machine has for engines: accelerators, and what an installation lacks."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from polydraft.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from polydraft._registry.engines import Accelerator, KnownEngine, Variant

__all__ = ["accelerators", "lacking", "variant_for"]

_COMPILERS = {
    "darwin": "xcode-select --install",
    "linux": "apt install g++ (or your system's package of it)",
    "win32": "Visual Studio's build tools for C++",
}


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """What this machine has, the fastest first; ``cpu`` is always among them."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return ("metal", "cpu")
    return ("cuda", "cpu") if _has_cuda() else ("cpu",)


def _has_cuda() -> bool:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def variant_for(engine: KnownEngine, wanted: str = "auto") -> Variant:
    """How an engine is installed here.

    Args:
        engine: The engine.
        wanted: ``auto``: for the fastest accelerator of this machine that it has packages for.

    Raises:
        EnvironmentSetupError: It has no packages for this platform, or none for that accelerator.
    """
    fitting = [variant for variant in engine.variants if variant.fits]
    for accelerator in accelerators() if wanted == "auto" else (wanted,):
        for variant in fitting:
            if variant.accelerator == accelerator:
                return variant
    where = f"{platform.system()} on {platform.machine()}"
    there = sorted({variant.accelerator for variant in fitting})
    if there:
        raise EnvironmentSetupError(
            f"{engine.name} cannot be installed for {wanted} on {where}.",
            f"There it can be installed for {' and '.join(there)}.",
        )
    raise EnvironmentSetupError(
        f"{engine.name} has no packages for {where}.", "`polydraft engines list` shows which engines have."
    )


def lacking(engine: KnownEngine, variant: Variant) -> EnvironmentSetupError | None:
    """The first thing that an installation needs and this machine does not have; Python is looked for apart."""
    if variant.glibc and sys.platform == "linux":
        library, number = platform.libc_ver()
        if library != "glibc" or _numbers(number) < _numbers(variant.glibc):
            return EnvironmentSetupError(
                f"{engine.name}'s packages need glibc {variant.glibc} or later, and this system has "
                f"{f'{library} {number}'.strip() or 'another C library'}.",
                "Use a newer system, a container of one, or another engine: `polydraft engines list` shows them.",
            )
    for alternatives in variant.programs:
        if not any(map(shutil.which, alternatives.split("|"))):
            return _without_program(engine, alternatives)
    return None


def _without_program(engine: KnownEngine, alternatives: str) -> EnvironmentSetupError:
    again = f"then run `polydraft engines install {engine.name}` again."
    if "nvcc" in alternatives:
        return EnvironmentSetupError(
            f"{engine.name} is compiled for CUDA here, and its compiler nvcc is not on the PATH.",
            "Install NVIDIA's CUDA toolkit and put its bin folder on the PATH, or install it for processors: "
            f"`polydraft engines install {engine.name} --accelerator cpu`.",
        )
    return EnvironmentSetupError(
        f"{engine.name} is compiled on your machine, and there is no C++ compiler ({alternatives.replace('|', ', ')}).",
        f"Install one: {_COMPILERS.get(sys.platform, 'your system has a package of it')}; {again}",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
