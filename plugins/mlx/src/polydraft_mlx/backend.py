"""The backend: diagnosis, capabilities, and from a load request to an engine."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version
from polydraft.checkpoints.config import is_assistant
from polydraft.contract import (
    Backend,
    Capabilities,
    DeviceRecord,
    Diagnosis,
    LoadRequest,
    ModelSource,
    SpeculationPlan,
    SteppingEngine,
)

from polydraft_mlx.options import MlxOptions

__all__ = ["FIRST", "NEXT", "MlxBackend"]

FIRST, NEXT = Version("0.32.2"), Version("0.33")
"""The versions of mlx-lm that this backend was tried with: from the first, before the second."""

_RANGE = ">=0.32.2,<0.33"


class MlxBackend(Backend):
    """Runs safetensors checkpoints and MLX's own on Apple silicon, on Linux CPUs, and on CUDA."""

    options = MlxOptions

    def capabilities(self) -> Capabilities:
        """What works with every supported version."""
        return Capabilities(
            drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
            exactness=frozenset({"standard", "bitwise"}),
            seed_identical=True,
            exposes_logits=True,
            concurrent_calls=True,
            max_speculative_tokens=16,
        )

    def diagnose(self) -> Diagnosis:
        """Look at the platform, the versions, then the devices (imports mlx)."""
        if found := _platform_problem():
            return Diagnosis(usable=False, reason=found[0], remedy=found[1])
        try:
            installed = version("mlx-lm")
        except PackageNotFoundError:
            return Diagnosis(usable=False, reason="mlx-lm is not installed.", remedy=_install())
        if not FIRST <= Version(installed) < NEXT:
            return Diagnosis(
                usable=False,
                engine_version=installed,
                reason=f"mlx-lm {installed} is outside the range that this backend was tried with, {_RANGE}.",
                remedy=_install(),
            )
        try:
            import mlx.core  # noqa: F401
        except (ImportError, OSError) as error:
            return Diagnosis(usable=False, engine_version=installed, reason=_import_problem(error), remedy=_install())
        devices = _devices()
        return Diagnosis(
            usable=True,
            engine_version=installed,
            devices=devices,
            notes=(f"mlx {version('mlx')}",),
            rank=70 if len(devices) > 1 else 40,
        )

    def refuse(self, target: ModelSource, plan: SpeculationPlan) -> str | None:
        """An assistant cannot be a target; what mlx-lm has no class for cannot be loaded."""
        if is_assistant(target.config):
            return f"{target.id} is an assistant (a drafter); it cannot generate by itself."
        return None

    def load_engine(self, request: LoadRequest) -> SteppingEngine:
        """Load the pair; see ``loading``."""
        from polydraft_mlx.loading import load_pair

        return load_pair(request)


def _install() -> str:
    extra = "[cpu]" if sys.platform == "linux" else ""
    return f"pip install 'mlx-lm{extra}{_RANGE}'"


def _platform_problem() -> tuple[str, str] | None:
    """What stands in the way before any package can, and what to do."""
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return (
            "MLX has no packages for Macs with Intel processors (or for a Python that runs as one).",
            "Use the transformers or llama_cpp backend; on Apple silicon install Python for arm64.",
        )
    if sys.platform not in {"darwin", "linux"}:
        return f"MLX has no packages for {sys.platform}.", "Use the transformers or llama_cpp backend."
    name, found = platform.libc_ver()
    if sys.platform == "linux" and name != "glibc":
        return f"MLX's Linux packages need glibc, and this system has {name or 'another C library'}.", _OTHER
    if sys.platform == "linux" and Version(found) < Version("2.35"):
        return f"MLX's Linux packages need glibc 2.35 or later, and this system has {found}.", _OTHER
    return None


_OTHER = "Use a newer system (Ubuntu 22.04, Debian 12 or later) or a container of one, or another backend."


def _import_problem(error: Exception) -> str:
    if "libmlx" in str(error):
        return (
            "mlx is installed without a library to run with: on Linux it needs an extra, [cpu], [cuda12] or [cuda13]."
        )
    return f"mlx cannot be imported: {error}"


def _devices() -> tuple[DeviceRecord, ...]:
    import mlx.core as mx

    from polydraft_mlx.runtime import devices, find_device, free_memory

    found = []
    for name in devices():
        device = find_device(name)
        info = mx.device_info(device)
        total = info.get("memory_size") or info.get("total_memory")
        found.append(
            DeviceRecord(
                name=name,
                description=str(info.get("device_name", name)),
                total_memory_bytes=int(total) if total else None,
                free_memory_bytes=free_memory(device),
            )
        )
    return tuple(found)
