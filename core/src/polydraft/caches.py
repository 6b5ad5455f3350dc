"""Folders of files that are made once and kept: whole or not at all, checked at each use, and bounded.

A plugin keeps its files in a ``CacheFolder`` and names it with the hook ``polydraft_caches``; ``polydraft cache`` lists
and clears all of them.

POLYDRAFT_CACHE_LIMIT
    Size in GiB to which each ``CacheFolder`` is held; default 50. What was used longest ago is removed first, and what
    a process still uses is not removed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._folders import cache_folder
from polydraft.checkpoints.contents import file_digest
from polydraft.errors import InvalidRequestError, PolydraftError
from polydraft.files import exhausted, read_json, system_error

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CacheEntry", "CacheFolder", "CacheWarning", "entries_of", "limit_bytes", "remove", "remove_left_overs"]

_log = logging.getLogger("polydraft.cache")
_LIMIT = "POLYDRAFT_CACHE_LIMIT"
_DEFAULT_GIB = 50.0
_MARK = "polydraft_cache"
"""In the description next to each file: what has none is not polydraft's, and is never removed."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_ALMOST_NOTHING = 1 << 20
_used: dict[Path, int] = {}
"""Lock files of the entries that this process uses, with their open descriptors: in use until it ends."""
_temporary: dict[Path, Path] = {}
"""Files that this process made in a temporary folder, because the cache could not be written."""


class CacheWarning(UserWarning):
    """A cache folder cannot be written, so its files are made again for each process."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One thing that is kept."""

    description: Path
    """The small JSON file that describes it, or that it is."""
    file: Path | None
    bytes: int
    last_used: float
    """Seconds since the epoch."""


def limit_bytes() -> int:
    """The size to which each cache is held.

    Raises:
        InvalidRequestError: POLYDRAFT_CACHE_LIMIT is not a number.
    """
    given = os.environ.get(_LIMIT) or str(_DEFAULT_GIB)
    try:
        limit = float(given)
        if not 0 <= limit < float("inf"):
            raise ValueError(given)
    except ValueError as error:
        raise InvalidRequestError(
            f"{_LIMIT} is {given!r}, which is not a size in GiB.", f"Set it to a number, such as {_DEFAULT_GIB:g}."
        ) from error
    return int(limit * 2**30)


class CacheFolder:
    """A folder of files by name.

    Next to each file lies a description with its size and SHA-256, ``NAME.json``. ``.making`` holds what is being made,
    ``.locks`` who makes and who uses what. Several processes and threads may use one folder.

    Args:
        name: Name of the cache: its folder in polydraft's cache folder.
        variable: Environment variable that names another folder.
    """

    def __init__(self, name: str, variable: str) -> None:
        given = os.environ.get(variable)
        self.path = Path(given).expanduser() if given else cache_folder() / name
        self.name, self.variable = name, variable

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file of that name, in use by this process from now on.

        Args:
            name: What determines the contents must be part of it.
            make: Writes it to the path that it is given, where it is not there yet, is damaged or was cut short.

        Raises:
            SystemResourceError: The disk is full or fails, file handles have run out, and so on.
            PolydraftError: The file cannot be written for another reason; or what ``make`` raises.
        """
        limit = limit_bytes()
        remove_left_overs(self.path)
        if self.path / name in _temporary:
            return _temporary[self.path / name]
        if found := self._use(name):
            return found
        try:
            lock = self._lock(name, "making")
        except OSError as error:
            return self._in_temporary_folder(name, make, error)
        making = self.path / ".making" / name
        try:
            # Another process or thread may have made it meanwhile.
            if not self._sound(name):
                self._make(name, making, make)
        finally:
            shutil.rmtree(making, ignore_errors=True)
            os.close(lock)
        found = self._use(name)
        self._shrink(limit)
        if found is None:
            raise PolydraftError(
                f"{self.path / name} was damaged right after it was written.", "Check the disk, and try again."
            )
        return found

    def _shrink(self, limit: int) -> None:
        """Remove what was used longest ago until ``limit`` bytes are left, but nothing that a process still uses."""
        kept = entries_of(self.path)
        total = sum(entry.bytes for entry in kept)
        for entry in kept:
            if total > limit and remove(entry):
                total -= entry.bytes
                _log.info("Removed from the cache: %s", entry.file)

    def _use(self, name: str) -> Path | None:
        """The file if it is sound, marked as in use; None if it is not there."""
        if not self._description(name).is_file():
            return None
        mark = self.path / ".locks" / f"{name}.use"
        # Marked before it is checked: it cannot be removed in between.
        if mark not in _used:
            with contextlib.suppress(OSError):  # a folder of another user, or a file system without locks
                _used[mark] = self._lock(name, "use", shared=True)
        if not self._sound(name):
            return None
        with contextlib.suppress(OSError):
            # The description's time, not the file's: changing that would make its digest unknown.
            os.utime(self._description(name))
        return self.path / name

    def _sound(self, name: str) -> bool:
        said, file = _described(self._description(name)), self.path / name
        try:
            return (
                said is not None
                and not file.is_symlink()
                and file.stat().st_size == said.get("bytes")
                and file_digest(file) == said.get("sha256")
            )
        except OSError:
            return False

    def _make(self, name: str, making: Path, make: Callable[[Path], None]) -> None:
        file, description = making / name, making / f"{name}.json"
        try:
            shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
            making.mkdir(parents=True)
            make(file)
            _sync(file)
            found = {_MARK: 1, "bytes": file.stat().st_size, "sha256": file_digest(file)}
            # Described first, and as not complete: whatever happens now, the file is known to be polydraft's.
            description.write_text(json.dumps({_MARK: 1}), encoding="utf-8")
            description.replace(self._description(name))
            file.replace(self.path / name)
            description.write_text(json.dumps(found), encoding="utf-8")
            _sync(description)
            description.replace(self._description(name))
        except OSError as error:
            raise self._not_written(name, error, self.path) from error

    def _in_temporary_folder(self, name: str, make: Callable[[Path], None], error: OSError) -> Path:
        """Make the file for this process alone."""
        if error.errno in _FULL or exhausted(error, ""):
            raise self._not_written(name, error, self.path) from error
        warnings.warn(
            f"The cache folder {self.path} cannot be written ({error.strerror or error}), so {name} is made in a "
            f"temporary folder, and again in the next process. Set {self.variable} to a folder that you may write.",
            CacheWarning,
            stacklevel=3,
        )
        folder = _temporary_folder()
        try:
            make(folder / name)
        except OSError as failed:
            raise self._not_written(name, failed, folder) from failed
        _temporary[self.path / name] = folder / name
        return folder / name

    def _not_written(self, name: str, error: OSError, folder: Path) -> PolydraftError:
        if error.errno is None:  # numpy's tofile does not say why
            with contextlib.suppress(OSError):
                if shutil.disk_usage(folder).free < _ALMOST_NOTHING:
                    error = OSError(errno.ENOSPC, str(error))
        what = f"{name} could not be written into {folder}"
        if refused := system_error(error, what):
            if error.errno in _FULL:
                refused.hint = (
                    "Free some space (`polydraft cache` shows what polydraft keeps), or set "
                    f"{self.variable} to a folder on another disk."
                )
            else:
                refused.hint += f" {self.variable} names the folder."
            return refused
        return PolydraftError(f"{what}: {error.strerror or error}.", f"Set {self.variable} to another folder.")

    def _description(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _lock(self, name: str, what: str, *, shared: bool = False) -> int:
        path = self.path / ".locks" / f"{name}.{what}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return _locked(path, shared=shared)


def remove_left_overs(folder: Path) -> None:
    """Remove what processes that have ended were making in a cache's folder."""
    for left in (folder / ".making").glob("*"):
        # A process that still makes something holds the lock.
        with contextlib.suppress(OSError):
            lock = _locked(folder / ".locks" / f"{left.name}.making", wait=False)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def entries_of(folder: Path) -> list[CacheEntry]:
    """What polydraft keeps in a folder, the one used longest ago first."""
    found = []
    for description in folder.glob("*.json"):
        if _described(description) is None:
            continue
        file: Path | None = description.with_suffix("")
        with contextlib.suppress(OSError):
            status = description.lstat()
            size = status.st_size
            try:
                size += file.lstat().st_size if file else 0
            except OSError:
                file = None
            found.append(CacheEntry(description, file, size, status.st_mtime))
    return sorted(found, key=lambda entry: entry.last_used)


def remove(entry: CacheEntry) -> bool:
    """Remove an entry; False if a process uses it, or it cannot be removed."""
    try:
        if entry.file is not None:
            lock = _locked(entry.file.parent / ".locks" / f"{entry.file.name}.use", wait=False)
            try:
                entry.file.unlink(missing_ok=True)
                entry.description.unlink(missing_ok=True)
            finally:
                os.close(lock)
        else:
            entry.description.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _described(description: Path) -> dict[str, Any] | None:
    """The contents of a description that is polydraft's; None for any other file."""
    try:
        data = read_json(description)
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and (_MARK in data or set(data) == {"record", "seal"}) else None


def _locked(path: Path, *, shared: bool = False, wait: bool = True) -> int:
    """A descriptor that holds a lock until it is closed or the process ends, however it ends.

    Raises:
        OSError: Another one holds it (``wait=False``), or the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform != "win32":
            import fcntl

            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync(file: Path) -> None:
    """Have the contents on the disk before the name is: a crash must not leave a whole name of half a file."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _temporary_folder() -> Path:
    """A folder that is removed when this process ends; those of processes that were killed are removed now."""
    for left in Path(tempfile.gettempdir()).glob("polydraft-cache-*"):
        with contextlib.suppress(OSError):
            if (left / "owner").is_file():
                lock = _locked(left / "owner", wait=False)
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix="polydraft-cache-"))  # mode 0700
    owner = _locked(folder / "owner")
    atexit.register(_end, folder, owner, os.getpid())
    return folder


def _end(folder: Path, owner: int, home: int) -> None:
    if os.getpid() == home:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)
