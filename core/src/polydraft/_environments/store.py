"""The environments in the user's data folder: which there are, which one is in use, and how one takes another's place.

``engines/NAME/state.json`` names the environment of an engine; it is replaced in one step, so it is always whole.
``engines/NAME/builds/NUMBER`` are virtual environments, which cannot be moved; one that the state does not name is left
over, or about to take its place. ``engines/.locks/NAME.lock`` is held by whoever changes something, and
``NAME@NUMBER@*.use`` by each process that uses an environment: a process's locks end with it, however it ends.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from polydraft._environments.records import Environment
from polydraft._folders import data_folder
from polydraft._presentable import holds_credentials
from polydraft._registry.engines import is_engine_name
from polydraft.contract.records import CONTRACT_VERSION, Record
from polydraft.errors import EnvironmentSetupError
from polydraft.files import read_bytes, read_json, system_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from filelock import BaseFileLock

__all__ = [
    "FORMAT",
    "Broken",
    "activate",
    "all_environments",
    "broken_environment",
    "clear_unused",
    "engine_folder",
    "environments",
    "hold",
    "in_use",
    "left_over",
    "locked",
    "new_build",
    "remove",
    "written",
]

FORMAT = 1
"""Version of the state file."""
_held: dict[Path, BaseFileLock] = {}
"""Environments that this process uses, until it ends."""
_holding = threading.Lock()
_read: dict[Path, tuple[tuple[int, int], Environment | Broken]] = {}
"""What state files said, by the time of their last change and their size."""


class Broken(Record):
    """An environment that cannot be used."""

    name: str
    reason: str
    """One sentence."""
    command: str
    """What mends it."""

    @property
    def hint(self) -> str:
        """What to do, one sentence."""
        return f"Make it anew: `{self.command}`."


def _engines() -> Path:
    return data_folder() / "engines"


def engine_folder(name: str) -> Path:
    """Where everything of an engine lies."""
    assert is_engine_name(name), name
    return _engines() / name


def environments() -> dict[str, Environment]:
    """The usable environments, by engine. No process is started.

    An environment's own interpreter has none but itself.
    """
    if Path(sys.prefix).is_relative_to(_engines()):
        return {}
    return {name: found for name, found in all_environments().items() if isinstance(found, Environment)}


def all_environments() -> dict[str, Environment | Broken]:
    """All environments by engine, those that cannot be used included."""
    try:
        names = sorted(entry.name for entry in _engines().iterdir() if is_engine_name(entry.name))
    except OSError:  # there is none yet
        return {}
    found = {name: _look_at(name) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def broken_environment(name: str) -> Broken | None:
    """An engine's environment, if it cannot be used."""
    found = _look_at(name)
    return found if isinstance(found, Broken) else None


def _look_at(name: str) -> Environment | Broken | None:
    path = engine_folder(name) / "state.json"
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return _broken(name, f"Its state cannot be read: {error.strerror or error}.", "install")
    key = (status.st_mtime_ns, status.st_size)
    if path not in _read or _read[path][0] != key:
        _read[path] = (key, _parse(name, path))
    found = _read[path][1]
    try:
        return _checked(found) if isinstance(found, Environment) else found
    except OSError as error:  # of another user, who keeps it to himself
        return _broken(name, f"It cannot be read: {error.strerror or error} ({error.filename}).", "update")


def _checked(found: Environment) -> Environment | Broken:
    """Look whether it is there, and where it was made."""
    missing = next((proof for proof in (found.python, *found.proofs) if not proof.exists()), None)
    if missing is not None:
        return _broken(found.name, f"Files of it are gone: {missing}.", "update")
    place = engine_folder(found.name) / "builds" / str(found.build)
    if not place.exists() or not place.samefile(found.folder):
        return _broken(found.name, f"It was made as {found.folder}, and cannot be used from another folder.", "update")
    return found


def _parse(name: str, path: Path) -> Environment | Broken:
    other = "It was made by another version of polydraft"
    try:
        text = read_bytes(path)
        found = Environment.model_validate_json(text)
    except OSError as error:
        return _broken(name, f"Its state cannot be read: {error.strerror or error}.", "install")
    except ValidationError:
        if re.search(rb'"format": ?(\d+)', text) and b'"polydraft"' in text:
            return _broken(name, f"{other}.", "update")
        return _broken(name, f"Its state is damaged: {path}.", "install")
    if found.name != name:
        return _broken(name, f"Its state is that of {found.name}.", "install")
    if found.format != FORMAT or found.contract_version != CONTRACT_VERSION:
        return _broken(name, f"{other}, {found.polydraft}.", "update")
    return found


def _broken(name: str, reason: str, command: str) -> Broken:
    return Broken(name=name, reason=reason, command=f"polydraft engines {command} {name}")


@contextmanager
def locked(name: str, waits: Callable[[], None]) -> Iterator[None]:
    """Let no other process or thread change an engine's environment during the ``with`` block.

    Args:
        name: The engine.
        waits: Called once, if another one does at the moment.

    Raises:
        EnvironmentSetupError: The data folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = _engines() / ".locks" / f"{name}.lock"
    lock = FileLock(path, thread_local=False)
    with written(name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waits()
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written(name: str) -> Iterator[None]:
    """Tell in words that the data folder cannot be written.

    Raises:
        EnvironmentSetupError: It cannot.
        SystemResourceError: The disk is full or fails, and so on.
    """
    what = f"The environment of {name} cannot be written into {data_folder()}"
    try:
        yield
    except (OSError, MemoryError) as error:
        read_only = isinstance(error, OSError) and error.errno == errno.EROFS
        if (refused := system_error(error, what)) and not read_only:
            raise refused from error
        raise EnvironmentSetupError(
            f"{what}: {getattr(error, 'strerror', '') or error}.",
            "Set POLYDRAFT_DATA_DIR to a folder that you may write, and run the command again.",
        ) from error


def new_build(name: str) -> tuple[int, Path]:
    """The number and the folder of the next environment; only while it is locked."""
    builds = engine_folder(name) / "builds"
    builds.mkdir(parents=True, exist_ok=True)
    found = _look_at(name)
    taken = {int(entry.name) for entry in builds.iterdir() if entry.name.isdecimal()}
    number = max({0, found.build if isinstance(found, Environment) else 0, *taken}) + 1
    return number, builds / str(number)


def activate(environment: Environment) -> None:
    """Let an environment take the place of the one before, in one step; only while it is locked."""
    path = engine_folder(environment.name) / "state.json"
    draft = path.with_suffix(".tmp")
    text = environment.model_dump_json(indent=1)
    draft.unlink(missing_ok=True)
    # A package's URL may hold a password, which `update` needs.
    mode = 0o600 if holds_credentials(text) else 0o666
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def left_over(name: str) -> list[Path]:
    """Environments that the state does not name: of an installation that did not end, or replaced by another."""
    named = ""
    with suppress(OSError, ValueError, TypeError, KeyError):  # of another version, too: its polydraft may use it
        named = str(read_json(engine_folder(name) / "state.json")["build"])
    try:
        return [entry for entry in (engine_folder(name) / "builds").iterdir() if entry.name != named]
    except OSError:
        return []


def clear_unused(name: str) -> None:
    """Remove the environments that the state does not name and no process uses; only while it is locked.

    What an installation that was killed was working with is removed, too.
    """
    shutil.rmtree(engine_folder(name) / "tmp", ignore_errors=True)
    for build in left_over(name):
        _remove_build(name, build)


def _remove_build(name: str, build: Path) -> bool:
    """Remove an environment; False if a process uses it."""
    if in_use(name, build.name):
        return False
    moved = build.with_name(f"{build.name}.removed")
    with suppress(OSError):
        if build.suffix != ".removed":
            build.rename(moved)
            if in_use(name, build.name):  # since a moment ago
                moved.rename(build)
                return False
        shutil.rmtree(build if build.suffix == ".removed" else moved, ignore_errors=True)
    return True


def remove(name: str) -> bool:
    """Remove an engine's environment with all that belongs to it; only while it is locked.

    Returns:
        False if it was not installed; what an installation left that did not end is removed all the same.

    Raises:
        EnvironmentSetupError: A process uses it, or it cannot be removed.
    """
    folder = engine_folder(name)
    if not folder.exists():
        return False
    builds = [*(folder / "builds").glob("*")]
    there = bool(builds) or (folder / "state.json").exists()
    used = any(in_use(name, build.name) for build in builds)
    with written(name):
        if not used:
            (folder / "state.json").unlink(missing_ok=True)  # first: what is half removed is not installed
            used = any(not _remove_build(name, build) for build in builds)
        if not used:
            shutil.rmtree(folder)
    if used:
        raise EnvironmentSetupError(
            f"The environment of {name} is in use.", "End the programs that run it, and remove it then."
        )
    return there


def hold(environment: Environment) -> Environment:
    """Note that this process uses an environment until it ends, so that it is not removed.

    Returns:
        The environment, or the one that has just taken its place.

    Raises:
        EnvironmentSetupError: It has just been removed.
    """
    from filelock import FileLock

    with _holding:
        while True:
            if environment.folder not in _held:
                name = f"{environment.name}@{environment.build}@{os.getpid()}-{secrets.token_hex(4)}.use"
                # A folder that cannot be written is another user's, who must know what is done.
                with suppress(OSError):
                    in_use(environment.name, str(environment.build))  # removes the notes of ended processes
                    lock = FileLock(_engines() / ".locks" / name, thread_local=False)
                    lock.acquire(timeout=0)
                    _held[environment.folder] = lock
            # Held before it is looked at: it cannot be removed in between.
            if environment.python.exists():
                return environment
            now = _look_at(environment.name)
            if not isinstance(now, Environment) or now.folder == environment.folder:
                raise EnvironmentSetupError(
                    f"The environment of {environment.name} has been removed.",
                    f"Install it again: `polydraft engines install {environment.name}`.",
                )
            environment = now


def in_use(name: str, build: str) -> bool:
    """Whether a process uses an environment; notes of processes that have ended are removed."""
    from filelock import FileLock, Timeout

    used = False
    for note in (_engines() / ".locks").glob(f"{name}@{build}@*.use"):
        if any(Path(lock.lock_file) == note for lock in _held.values()):
            used = True  # a second lock of this process would be granted
            continue
        lock = FileLock(note, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            used = True
        except OSError:
            continue
        else:
            lock.release()
            note.unlink(missing_ok=True)
    return used
