"""What files hold, byte for byte: digests, kept so that a large file is read once.

A kept digest counts while the file's device, inode, size, time of modification and time of change are the same. Every
write sets the time of change, and no program can set it back. A writable memory mapping sets it at the first write, and
again after each write-back: what is written through one that is open while the file is hashed may not be noticed.
Where no such time is kept (Windows, FAT, network file systems, memory), every byte is read each time.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._folders import cache_folder
from polydraft._sealed import read_sealed, write_sealed
from polydraft.errors import ModelFormatError
from polydraft.files import system_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["content_digest", "digest_folder", "file_digest", "files_below", "known_content_digest", "libraries_digest"]

_SMALL = 4 << 20
"""Files of fewer bytes are hashed each time: that is as fast as looking a digest up."""
_MOST = 4096
"""Digests that are kept; those written longest ago are deleted."""
_SETTLED = 2.0
"""Seconds since the last change before a digest is kept: a change within one tick of the clock would not show."""
_THREADS = 4
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay"}
"""File systems of Linux whose time of change is set by the kernel at every write."""
_LIBRARIES = (".so", ".dylib", ".dll", ".pyd")


def file_digest(path: Path) -> str:
    """SHA-256 of all bytes of a file, in hexadecimal; links are followed.

    Raises:
        OSError: It cannot be read.
    """
    before = path.stat()
    if before.st_size < _SMALL or not _keeps_time_of_change(path):
        return _hashed(path)
    if kept := _kept_digest(before):
        return kept
    started = time.time()
    digest = _hashed(path)
    if _state(path.stat()) == _state(before) and 0 < before.st_ctime < started - _SETTLED:
        with suppress(OSError):  # not kept: read again the next time
            write_sealed(_kept_file(before), {"format": 1, **_state(before), "sha256": digest, "path": str(path)})
            _drop_oldest(digest_folder())
    return digest


def _kept_digest(status: os.stat_result) -> str:
    """The digest that was kept of a large file as it is now; empty if none was."""
    known = {"format": 1, **_state(status)}
    record = read_sealed(_kept_file(status))
    if isinstance(record, dict) and {name: record.get(name) for name in known} == known:
        return str(record["sha256"])
    return ""


def _kept_file(status: os.stat_result) -> Path:
    return digest_folder() / f"{status.st_dev:x}-{status.st_ino:x}.json"


def known_content_digest(files: Mapping[str, Path]) -> str:
    """``content_digest`` without reading large files; empty unless the digest of each of them is kept.

    Raises:
        ModelFormatError: A file cannot be read.
        OSError: One cannot be looked at.
    """
    for file in files.values():
        status = file.stat()
        if status.st_size >= _SMALL and not (_keeps_time_of_change(file) and _kept_digest(status)):
            return ""
    return content_digest(files)


def content_digest(files: Mapping[str, Path]) -> str:
    """One digest over the names and contents of several files, whatever their order and wherever they lie.

    Raises:
        ModelFormatError: A file cannot be read.
        SystemResourceError: No file can be opened, the disk fails, and so on.
    """
    names = sorted(files)
    try:
        # hashlib releases the interpreter's lock, so threads hash at the same time.
        with system_errors("A file cannot be read"), ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(file_digest, [files[name] for name in names]))
    except OSError as error:
        raise ModelFormatError(
            f"{error.filename or 'A file'} cannot be read: {error.strerror or error}.", "Check its permissions."
        ) from error
    listed = "".join(f"{name}\0{digest}\n" for name, digest in zip(names, digests, strict=True))
    return f"sha256:{hashlib.sha256(listed.encode('utf-8', 'surrogateescape')).hexdigest()}"


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file below a folder, through links too; a link back to a folder above it is not followed."""
    yield from _below(folder, frozenset())


def libraries_digest(*folders: Path) -> str:
    """One digest over the shared libraries below some folders: the identity of an engine's build.

    Raises:
        ModelFormatError: A library cannot be read.
    """
    found = {
        f"{number}/{path.relative_to(folder).as_posix()}": path
        for number, folder in enumerate(folders)
        for path in files_below(folder)
        # ``libllama.so.0.5`` too.
        if any(part in _LIBRARIES for part in path.suffixes)
    }
    return content_digest(found)


def digest_folder() -> Path:
    """Where digests are kept."""
    return cache_folder() / "digests"


def _below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _below(path, above | {own})
        elif path.is_file():
            yield path


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(status: os.stat_result) -> dict[str, Any]:
    names = {"device": "st_dev", "inode": "st_ino", "size": "st_size", "mtime": "st_mtime_ns", "ctime": "st_ctime_ns"}
    return {name: getattr(status, field) for name, field in names.items()}


def _keeps_time_of_change(path: Path) -> bool:
    if sys.platform == "darwin":
        return True  # APFS and HFS+
    if sys.platform != "linux":
        return False
    place = path.resolve()
    mounts = _mounts()
    # The nearest mount point: a container may mount a single file.
    return next((mounts[str(at)] in _LOCAL for at in (place, *place.parents) if str(at) in mounts), False)


def _mounts() -> dict[str, str]:
    """Mount point -> type of file system, as Linux lists them; later mounts hide earlier ones."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        # ``id parent device root POINT options ... - TYPE source options``; spaces in a path are written ``\040``.
        fields, _, rest = line.partition(" - ")
        found[fields.split(" ")[4].replace("\\040", " ")] = rest.partition(" ")[0]
    return found


def _drop_oldest(folder: Path) -> None:
    kept = list(folder.glob("*.json"))
    if len(kept) > _MOST:
        # Many at a time, so that sorting is rare.
        for path in sorted(kept, key=lambda path: path.stat().st_mtime_ns)[: len(kept) - _MOST * 3 // 4]:
            path.unlink(missing_ok=True)
