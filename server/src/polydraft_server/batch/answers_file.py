"""The file of answers: whole lines only, each ``custom_id`` once, whatever interrupts the run."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from polydraft.errors import InvalidRequestError
from polydraft.files import open_regular, parse_json, system_errors

from polydraft_server.answers import encoded
from polydraft_server.batch.requests_file import RequestsFile, digest

__all__ = ["AnswersFile", "may_pass"]

_SYNC_EVERY = 1.0
"""Seconds between syncs to the disk: what a loss of power may cost. A killed process costs nothing."""


_BEGINNING = b'{"id":"batch_req_'
"""Of every answer, so that a piece of one is told from a file of somebody else."""
_LONGEST_LINE = 1 << 30
"""Bytes of an answer."""


def may_pass(status: int) -> bool:
    """Whether a failure may be another one's fault, so that the line is done again when the batch is run again."""
    return status in (408, 429) or status >= 500


class AnswersFile:
    """The answers to a file of requests, for one process at a time. A context manager.

    Args:
        path: The file; what it holds of an earlier run is kept.
        requests: The requests.

    Raises:
        InvalidRequestError: It is the file of the requests, or holds answers to others, which are left as they are;
            or another process is at work on it.
        PolydraftError: It cannot be written.
    """

    def __init__(self, path: Path, requests: RequestsFile) -> None:
        self.path = path
        self.done: dict[bytes, bool] = {}
        """``digest(custom_id)`` -> whether it was answered, and not refused."""
        self._requests = requests
        if path.exists() and path.samefile(requests.path):
            raise InvalidRequestError(f"{path} is the file of the requests.", "Name another file for the answers.")
        if not path.parent.is_dir():  # a lock would create it
            raise InvalidRequestError(
                f"There is no folder {path.parent}.", "Create it, or name another file for the answers."
            )
        lock = path.with_name(f"{path.name}.lock")
        self._lock = FileLock(lock, thread_local=False)
        with _writing(path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                if not lock.exists():  # nobody has it: there it cannot be made, and this says why
                    lock.touch()
                raise InvalidRequestError(
                    f"Another process is at work on {path}.", "Wait until it has ended, or name another file."
                ) from None
        try:
            with _writing(path):
                self._take_up()
                self._file = path.open("ab", buffering=0)
            self._length = os.fstat(self._file.fileno()).st_size
            self._synced = time.monotonic()
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file, _writing(self.path):
                os.fsync(self._file.fileno())
        finally:
            self._unlock()

    def add(self, answer: dict[str, Any]) -> bool:
        """Write an answer, whole or not at all. False: there is one to this request already, and it was left out.

        Raises:
            PolydraftError: The disk is full, or fails otherwise; what the file held is kept.
        """
        name = digest(answer["custom_id"])
        if name in self.done:
            return False
        line = memoryview(encoded(answer) + b"\n")
        with _writing(self.path):
            try:
                written = 0
                while written < len(line):  # a disk that fills takes a part first
                    written += self._file.write(line[written:]) or 0
            except BaseException:
                with suppress(OSError):
                    self._file.truncate(self._length)
                raise
            self._length += len(line)
            self.done[name] = answer["response"]["status_code"] == 200
            if time.monotonic() - self._synced >= _SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        return True

    def _take_up(self) -> None:
        """Read what an earlier run has left; take off a line cut short, and failures that another try may mend."""
        if not self.path.exists():
            return
        whole = 0
        again: list[tuple[int, int]] = []
        with open_regular(self.path) as file:
            for number in itertools.count(1):
                raw = file.readline(_LONGEST_LINE)
                if not raw.endswith(b"\n"):  # the end, or what an interruption has cut short
                    break
                name, status = self._answered(number, raw)
                if may_pass(status):
                    again.append((whole, len(raw)))
                else:
                    self.done[name] = status == 200
                whole += len(raw)
            if raw[: len(_BEGINNING)] != _BEGINNING[: len(raw)]:
                raise self._foreign(f"line {number}, which is not an answer of this command")
            if again:
                self._rewrite(whole, again)
            elif raw:
                os.truncate(self.path, whole)

    def _rewrite(self, end: int, leave_out: list[tuple[int, int]]) -> None:
        """Replace the file by one without some lines, each given by its offset and length; at once, by its name."""
        target = self.path.resolve()
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
        new = Path(name)
        try:
            with os.fdopen(handle, "wb") as copy, open_regular(target) as file:
                for start, length in [*leave_out, (end, 0)]:
                    while (left := start - file.tell()) > 0:
                        copy.write(file.read(min(left, 1 << 20)))
                    file.seek(length, os.SEEK_CUR)
                copy.flush()
                os.fsync(copy.fileno())
            new.chmod(target.stat().st_mode & 0o7777)
            new.replace(target)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def _answered(self, number: int, raw: bytes) -> tuple[bytes, int]:
        """Whose answer a line is, and its status."""
        try:
            found = parse_json(raw)
            name, asked = digest(found["custom_id"]), found["polydraft"]["request"]
            status = found["response"]["status_code"]
            if type(status) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._foreign(f"line {number}, which is not an answer of this command") from None
        shown = json.dumps(found["custom_id"])[:60]
        if name not in self._requests.digests:
            raise self._foreign(f"the answer to {shown}, which {self._requests.path} does not ask for")
        if self._requests.digests[name] != asked:
            raise self._foreign(f"the answer to another request {shown}, or of another model or other settings")
        if name in self.done:
            raise self._foreign(f"two answers to {shown}")
        return name, status

    def _foreign(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.path} holds {what}.",
            "Name another file for the answers. Nothing was run, and this one is as it was.",
        )

    def _unlock(self) -> None:
        self._lock.release()
        with suppress(OSError):
            Path(self._lock.lock_file).unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A block in which what the system refuses is a typed error about the file."""
    what = f"{path} cannot be written"
    try:
        with system_errors(what):
            yield
    except OSError as error:
        raise InvalidRequestError(
            f"{what}: {error.strerror or error}.", "Name a file in a folder that can be written."
        ) from error
