"""Reading files: regular ones only, of bounded size; and what the operating system refuses, as typed errors."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from polydraft.errors import OutOfMemoryError, PolydraftError, SystemResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

__all__ = [
    "LONG_NUMBER",
    "check_folder",
    "exhausted",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_json",
    "system_error",
    "system_errors",
]

LONG_NUMBER = "a number in it has too many digits"
"""In place of Python's words for a whole number of thousands of digits, which advise who writes the program."""
_LARGEST = 1 << 30
"""Largest file in bytes that is read as a whole. A tokenizer.json has some 30 MB."""
_ELSEWHERE = "Free some space, or use a folder on another disk."
_FAULTS = {
    "ENOSPC": ("the disk is full", _ELSEWHERE),
    "EDQUOT": ("your disk quota is used up", _ELSEWHERE),
    "EROFS": ("the file system is read-only", "Use a folder that can be written."),
    "EIO": ("the disk or device failed (input/output error)", "Check it, and the system's log."),
    "ESTALE": ("the network file system has lost it", "Mount it again."),
    "EFBIG": (
        "the file becomes larger than a limit allows",
        "Raise the limit (`ulimit -f`), or use another file system.",
    ),
    "EMFILE": ("this process may open no more files", "Close some sessions, or raise the limit: `ulimit -n 4096`."),
    "ENFILE": ("the system can open no more files", "End some programs, and try again."),
    "ENOLCK": ("the file system has no locks left", "Use a folder on another file system."),
    "EAGAIN": ("the system has no resources left for it", "End some programs, and try again."),
}
"""Name of an errno -> what it says about the machine, and what to do. Not every system has them all."""
_BY_NUMBER = {getattr(errno, name): told for name, told in _FAULTS.items() if hasattr(errno, name)}
_IN_TEXT = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
"""How Python and Rust (tokenizers, safetensors) write an errno into the text of another exception."""
_LINKER = {
    "failed to map segment": errno.ENOMEM,
    "Cannot allocate memory": errno.ENOMEM,
    "Too many open files": errno.EMFILE,
}
"""What the dynamic linker says in place of an errno, when a library cannot be loaded."""


def system_error(error: BaseException, what: str = "") -> PolydraftError | None:
    """The typed error for what the machine is short of, or refuses whatever is asked for; None for other errors.

    Args:
        error: Any exception. An errno that a library has put into the text of its own exception counts, too.
        what: What failed, a sentence without its full stop: ``config.json of org/name cannot be read``.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _IN_TEXT.search(str(error))):
        number = int(found[1] or found[2])
    if number is None and isinstance(error, ImportError):
        number = next((code for words, code in _LINKER.items() if words in str(error)), None)
    if number is None and isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        number = errno.EAGAIN
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return OutOfMemoryError(
            _sentence(what, "memory ran out"), "Free some memory, or raise its limit (`ulimit -v`)."
        )
    if number not in _BY_NUMBER:
        return None
    reason, hint = _BY_NUMBER[number]
    path = error.filename if isinstance(error, OSError) and error.filename is not None else ""
    at = f" ({path})" if str(path) not in what else ""
    return SystemResourceError(f"{_sentence(what, reason)[:-1]}{at}.", hint)


def exhausted(error: BaseException, what: str) -> PolydraftError | None:
    """``system_error`` for memory and file handles only: what fails for want of them is not itself broken."""
    number = error.errno if isinstance(error, OSError) else None
    short = isinstance(error, MemoryError) or number in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
    return system_error(error, what) if short else None


def _sentence(what: str, reason: str) -> str:
    return f"{what}: {reason}." if what else f"{reason[0].upper()}{reason[1:]}."


@contextmanager
def system_errors(what: str) -> Iterator[None]:
    """Raise what ``system_error`` knows as its typed error; other exceptions pass. ``what`` as there.

    Raises:
        SystemResourceError: The disk is full or read-only, file handles or threads have run out, and so on.
        OutOfMemoryError: Memory ran out.
    """
    try:
        yield
    except PolydraftError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        typed = system_error(error, what)
        if typed is None:
            raise
        raise typed from error


def check_folder(folder: Path) -> None:
    """Find out before work is done whether files can be written into a folder, or where it would be made.

    Raises:
        OSError: They cannot.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0")  # a full disk still makes empty files


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Others could block for ever (a FIFO) or never end (``/dev/zero``).

    Raises:
        OSError: As ``open`` does; or it is not a regular file.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # Opened first, so that it cannot be exchanged after the look; non-blocking, as a FIFO may have no writer.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of at most 1 GiB: settings and tokenizers, not weights.

    Raises:
        OSError: It cannot be read, is larger, or is not a regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST:
            raise OSError(errno.EINVAL, f"{size} bytes are too many for such a file", str(path))
        return file.read()


def read_json(path: Path) -> Any:
    """What a regular UTF-8 file holds as JSON.

    Raises:
        OSError: As ``read_bytes``.
        ValueError: As ``parse_json``, or it is not UTF-8.
    """
    return parse_json(read_bytes(path).decode("utf-8"))


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, which raises ``RecursionError`` for deep nesting; here that is a ``ValueError``, too.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has a whole number of thousands of digits.
            ``json.JSONDecodeError`` says where.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise ValueError(LONG_NUMBER) from None
