"""The processor, its dtypes and the dtype to use on it; and the memory that is free."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from polydraft.checkpoints.config import checkpoint_dtype
from polydraft.checkpoints.safetensors import count_numbers

__all__ = ["cpu_dtype", "cpu_features", "cpu_model", "free_memory", "multiplies_natively", "processor"]

_CPUINFO = Path("/proc/cpuinfo")
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_NATIVE = {
    # As /proc/cpuinfo names them on x86-64 and on Arm, and as macOS does.
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16", "svebf16", "FEAT_BF16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp", "FEAT_FP16"},
}
_SHARE_OF_MEMORY = 0.75
"""Weights in float32 may take this share of the free memory; KV caches and activations need the rest."""
_QUANTIZED = ("quantization_config", "quantization")


@cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        # One block per logical processor, with empty lines between them.
        first = _CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def processor() -> str:
    """The processor's name as the platform gives it, such as ``AMD EPYC``; may be empty."""
    info = _cpuinfo()
    # On Arm the kernel gives numbers, not a name.
    on_arm = " ".join(info[name] for name in ("CPU implementer", "CPU part", "CPU variant") if name in info)
    return info.get("model name") or on_arm or platform.processor()


@cache
def cpu_features() -> frozenset[str]:
    """The processor's instruction sets and features, in the platform's own words; empty where they are not known."""
    info = _cpuinfo()
    # x86 says ``flags``, Arm ``Features``.
    if found := info.get("flags") or info.get("Features"):
        return frozenset(found.split())
    if platform.system() != "Darwin":
        return frozenset()
    try:
        listed = subprocess.run(
            ["/usr/sbin/sysctl", "hw.optional.arm"], capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    # Lines such as ``hw.optional.arm.FEAT_BF16: 1``.
    return frozenset(line.split(":")[0].rpartition(".")[2] for line in listed.splitlines() if line.endswith(": 1"))


def cpu_model() -> str:
    """The processor as far as rounding depends on it, in one line: its name, and a digest of its features.

    The name alone is not enough: two virtual machines of one name may have different instruction sets.
    """
    info = _cpuinfo()
    parts = [*(info.get(name, "") for name in ("vendor_id", "cpu family", "model")), *sorted(cpu_features())]
    digest = hashlib.blake2b(" ".join(parts).encode(), digest_size=4).hexdigest()
    return f"{platform.machine()} {processor()} [{digest}]"


def multiplies_natively(dtype: str) -> bool:
    """Whether this processor has instructions that multiply ``dtype``, such as ``bfloat16``; float32 always."""
    return dtype not in _NATIVE or bool(_NATIVE[dtype] & cpu_features())


def cpu_dtype(config: Mapping[str, Any], folders: Iterable[Path], free_bytes: int) -> tuple[str, str]:
    """The dtype that ``auto`` means for a safetensors checkpoint on the processor, and why.

    The checkpoint's own dtype where the processor multiplies it natively. Otherwise float32, where its weights take at
    most three quarters of the free memory: 16-bit types are emulated there, which is slow, and their coarse rounding
    lets near ties flip. Quantized checkpoints keep their own.

    Args:
        config: The target's parsed config.json.
        folders: The folders of target and drafter.
        free_bytes: Free memory.

    Returns:
        ``float32``, ``bfloat16`` or ``float16`` (or another name that the config gives), and one sentence, empty where
        the checkpoint's own dtype is used and runs natively.
    """
    own = checkpoint_dtype(config)
    if own not in _NATIVE or multiplies_natively(own) or any(config.get(name) for name in _QUANTIZED):
        return own, ""
    # Bytes: float32 has 4.
    needed = 4 * count_numbers(folders)
    if needed > _SHARE_OF_MEMORY * free_bytes:
        return own, (
            f"The dtype is {own}, which this processor emulates: in float32 the weights would take "
            f"{needed / 2**30:.1f} of {free_bytes / 2**30:.1f} GiB free."
        )
    known = "this processor has no" if cpu_features() else "it is not known whether this processor has"
    return "float32", f"The dtype is float32, as {known} instructions for the checkpoint's {own}."


def free_memory() -> int:
    """Bytes that this process can still allocate without swapping, within the limits of its containers.

    On Linux that is ``MemAvailable``, and no more than any control group (v1 or v2) of this process leaves: a process
    that exceeds such a limit is killed. On macOS, which does not tell what is free, it is all memory.
    """
    return min([_available(), *_left_by_cgroups()])


def _available() -> int:
    if sys.platform == "win32":
        return _available_on_windows()
    with suppress(OSError, ValueError):
        return _numbers_of(_PROC / "meminfo")["MemAvailable:"] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_cgroups() -> Iterator[int]:
    """What each limited control group that this process is in leaves."""
    with suppress(OSError):
        for line in (_PROC / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
            number, controllers, path = line.split(":", 2)
            # v2 has one hierarchy, number 0; under v1 each controller has its own. Hybrids mount v2 as ``unified``.
            if number == "0" and not controllers:
                yield from _left_in(("", "unified"), path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _left_in((controllers, "memory"), path, *names)


def _left_in(mounts: Iterable[str], path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    own = PurePosixPath(path.lstrip("/"))
    for mount in dict.fromkeys(mounts):
        # A limit holds for all groups below. Inside a container the path may be the host's: then the mount is its own.
        for group in (own, *own.parents):
            folder = _CGROUPS / mount / group
            with suppress(OSError, ValueError):  # no such group, or "max": no limit
                most = int((folder / limit).read_text(encoding="ascii"))
                # Page cache that the kernel drops before it kills a process.
                cache = _numbers_of(folder / "memory.stat").get(reclaimable, 0)
                yield max(0, most - int((folder / usage).read_text(encoding="ascii")) + cache)


def _numbers_of(file: Path) -> dict[str, int]:
    """Names and numbers of a file with one of each per line."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {fields[0]: int(fields[1]) for fields in lines if len(fields) > 1}


def _available_on_windows() -> int:
    """Free physical memory, by GlobalMemoryStatusEx."""
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_uint32) for name in ("length", "load")),
            *((name, ctypes.c_uint64) for name in ("total", "free", "pages", "free_pages", "space", "free_space", "x")),
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.free)
