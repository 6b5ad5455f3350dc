"""Small JSON records in the user's folders: written whole or not at all, and sealed against edits.

The seal is an HMAC with a random key that only this user can read. It finds edits, damage, and records of another user
or machine. It does not stop a program of this user, which can read the key. Without the key (deleted, or its folder
cannot be written) no record counts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft._folders import data_folder
from polydraft.errors import PolydraftError
from polydraft.files import check_folder, exhausted, read_bytes, read_json, system_error

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_writable", "keep_result", "read_sealed", "write_sealed"]

_KEY_BYTES = 32
_making_key = threading.Lock()


def check_writable(folder: Path) -> None:
    """Find out before work is done whether records can be written into a folder, or where it would be made.

    Raises:
        OSError: They cannot.
    """
    _own_key()
    check_folder(folder)


def keep_result(write: Callable[[], object], what: str) -> None:
    """Write the result of a long command, or say how to do without keeping it.

    Args:
        write: Writes it, or checks that it can be written.
        what: The result, as the start of a sentence.

    Raises:
        PolydraftError: It cannot be written.
    """
    what, without = f"{what} cannot be kept", "do without keeping the result: `keep=False`"
    try:
        write()
    except OSError as error:
        refused = system_error(error, what)
        if refused is None:
            at = f" ({error.filename})" if error.filename is not None else ""
            raise PolydraftError(f"{what}: {error.strerror or error}{at}.", f"Fix the folder, or {without}.") from error
        refused.hint += f" Or {without}."
        raise refused from error


def write_sealed(path: Path, record: Any) -> None:
    """Write a record (JSON-ready data); an older one is replaced, and a reader never sees half of one.

    Raises:
        OSError: The folder, or that of the key, cannot be written.
    """
    text = json.dumps({"record": record, "seal": _seal(record, _own_key())}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, text.encode())


def read_sealed(path: Path) -> Any:
    """The record in a file; None where there is none, it is not a regular file, or its seal does not fit.

    Raises:
        SystemResourceError: No file can be opened.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead to a record of something else
            return None
        data = read_json(path)
        key = _key()
        if (
            key is None
            or set(data) != {"record", "seal"}
            or not hmac.compare_digest(str(data["seal"]), _seal(data["record"], key))
        ):
            return None
        return data["record"]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        _refuse_if_exhausted(error, path)
        return None


def _write_whole(path: Path, content: bytes) -> None:
    """Write a small file for this user only, so that other processes see all of it or none.

    Raises:
        OSError: The folder cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _seal(record: Any, key: bytes) -> str:
    """Of the data, not of its spelling: key order and indentation do not count."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _refuse_if_exhausted(error: Exception, path: Path) -> None:
    """A system that can open no file must not look like one without records."""
    if refused := exhausted(error, f"{path} cannot be read"):
        raise refused from error


def _key_file() -> Path:
    return data_folder() / "key"


def _key() -> bytes | None:
    try:
        key = read_bytes(_key_file())
    except OSError as error:
        _refuse_if_exhausted(error, _key_file())
        return None
    return key if len(key) == _KEY_BYTES else None


def _own_key() -> bytes:
    """The key, made where there is none.

    Raises:
        OSError: It cannot be written.
    """
    with _making_key:
        key = _key()
        if key is None:
            path = _key_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, secrets.token_bytes(_KEY_BYTES))
            # Of two processes that write one at once, the later wins: read what is there now.
            key = _key()
        if key is None:
            raise OSError(f"{_key_file()} cannot be read")
        return key
