"""Device, dtype and memory of a pair."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from polydraft.checkpoints.config import checkpoint_dtype
from polydraft.contract import LoadRequest
from polydraft.errors import DeviceError, InvalidRequestError, OutOfMemoryError, UnsupportedError
from polydraft.hardware import cpu_dtype, free_memory

from polydraft_transformers.dtypes import DTYPES

__all__ = [
    "available_memory",
    "choose_device",
    "choose_dtype",
    "drop_pages",
    "out_of_memory",
]

_WORTH_DROPPING = 1 << 20  # bytes


def available_memory(device: torch.device) -> int:
    """Free bytes of a device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return free_memory()


def drop_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Let go of pages of weight files, of which there are copies: resident memory counts them as long as it can.

    Nothing is lost: who reads one of these tensors all the same gets it from its file. Tensors in other memory are left
    as they are.

    Args:
        tensors: Contiguous.
    """
    size = mmap.PAGESIZE
    spans = [
        (-(-one.data_ptr() // size) * size, (one.data_ptr() + one.nbytes) // size * size)
        for one in tensors
        if one.device.type == "cpu" and one.nbytes >= _WORTH_DROPPING
    ]
    if not spans or sys.platform != "linux":
        return
    files = []
    with suppress(OSError, ValueError), Path("/proc/self/maps").open("rb") as maps:
        for line in maps:  # such as ``7f00-7f80 rw-p 00000000 fe:00 1591670    /folder/model.safetensors``
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if int(inode) and path and path[0].startswith(b"/") and not path[0].startswith((b"/dev/", b"/memfd:")):
                start, _, end = addresses.partition(b"-")
                files.append((int(start, 16), int(end, 16)))
    for first, last in spans:
        if any(start <= first and last <= end for start, end in files):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def choose_device(name: str) -> torch.device:
    """The device that ``device`` names.

    Raises:
        InvalidRequestError: torch does not know the name.
        DeviceError: The device does not exist.
        UnsupportedError: This backend has not been tested on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequestError(f"{name!r} is not a device.", "Give auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"The device {name} does not exist: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs.",
            "Use `device='cpu'`, or install a CUDA build of torch (`polydraft doctor` shows the devices).",
        )
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"The transformers backend has not been tested on {device.type}.", "Use `device='cpu'` or `device='cuda'`."
        )
    return device


def choose_dtype(request: LoadRequest, folders: Iterable[Path], device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that the request asks for, and a note on it, which may be empty.

    ``auto`` is the checkpoint's own (float32 where it names none), but on CPUs by ``polydraft.hardware.cpu_dtype``.
    """
    if request.dtype != "auto":
        name, note = request.dtype, ""
    elif device.type == "cpu":
        name, note = cpu_dtype(request.target.config, folders, available_memory(device))
    else:
        name, note = checkpoint_dtype(request.target.config), ""
    dtype: torch.dtype = getattr(torch, DTYPES.get(name, "float32"))
    return dtype, note


def out_of_memory(error: BaseException, what: str, hint: str) -> OutOfMemoryError | None:
    """The error to raise where torch reports, in one of its ways, that memory ran out; None for any other error.

    Args:
        error: What torch raised.
        what: The sentence's end: "Memory ran out while ...".
        hint: What the user can do.
    """
    # torch's allocator for hosts raises a plain RuntimeError.
    plain = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    )
    if plain or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OutOfMemoryError(f"Memory ran out while {what}.", hint)
    return None
