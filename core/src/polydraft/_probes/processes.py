"""One child process that is asked: started, watched, read within bounds, and ended with all that it started."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from polydraft._presentable import presentable
from polydraft._probes.interpreter import command_of, environment_of

__all__ = ["Child"]

_MODULE = "polydraft._probes.child"
_LARGEST = 8 << 20
"""Bytes of an answer, and of what else may come before it on stdout."""
_KEPT = 16 << 10
"""Bytes of stderr that are kept, the last ones."""
_SHOWN = 300
"""Characters of its last line that are shown."""
_IDLE = 0.3
"""Seconds without computing and reading after which a child counts as waiting."""
_LONGEST = 90.0
"""Seconds after which a child ends however slow the machine is."""


class Child:
    """A process that has been asked.

    Its time is what it computes and what it sleeps. Waiting for a processor or for a disk does not count, where the
    system tells (Linux): on a busy machine or a cold disk an import may take ten times as long.

    Args:
        python: The interpreter.
        request: What ``child`` is asked; JSON-ready.
        seconds: How long it may take, of its own time.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, python: Path, request: dict[str, Any], seconds: float) -> None:
        self.seconds, self.started = seconds, time.monotonic()
        self._mark = secrets.token_hex(16)
        self._answer, self._words = bytearray(), b""
        self._too_much = self._late = False
        self._done = threading.Event()
        self._process = subprocess.Popen(
            command_of(python, _MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_of(python),
            bufsize=0,
            # A group of its own: Ctrl+C in a terminal is not for it, and what it starts is ended with it.
            start_new_session=True,
        )
        self._look = _Look(self._process.pid)
        longest = max(seconds, _LONGEST) + 1
        self._line = json.dumps({**request, "mark": self._mark, "seconds": longest}).encode() + b"\n"
        self._readers = [
            threading.Thread(target=read, args=(stream,), name="polydraft-probe", daemon=True)
            for read, stream in ((self._read_answer, self._process.stdout), (self._read_words, self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def waits(self) -> bool:
        """Whether it leaves the processor to others at the moment."""
        return self._look.idle > _IDLE

    def ended(self) -> bool:
        """Whether it has answered, ended, or used up its time. To be called several times a second."""
        self._look.again()
        over = time.monotonic() - self.started >= max(self.seconds, _LONGEST)
        self._late = not self._done.is_set() and (over or self._look.own_time >= self.seconds)
        return self._late or self._done.is_set()

    def wait(self, seconds: float) -> None:
        """Wait until it has answered or ended, but no longer than ``seconds``."""
        self._done.wait(seconds)

    def end(self) -> None:
        """End it with all that it has started, and free what it holds."""
        if self._process.poll() is None or sys.platform != "win32":
            with suppress(OSError):
                # The group exists as long as one of its processes does.
                os.killpg(self._process.pid, signal.SIGKILL) if sys.platform != "win32" else self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(1.0)  # a process that left the group may hold the pipes open
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def result(self) -> tuple[bytes | None, str]:
        """After ``end``: the answer, or what became of the diagnosis, as the rest of a sentence."""
        if (answer := self._complete()) is not None:
            return answer, ""
        if self._too_much:
            return None, f"wrote more than {_LARGEST >> 20} MiB instead of an answer."
        if self._late:
            return None, f"did not end within {self.seconds:g} seconds."
        code = self._process.returncode
        words = presentable(self._words.decode("utf-8", "replace")).strip().splitlines()
        last = f": {words[-1].strip()[:_SHOWN]}" if words else ""
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            memory = " (memory may have run out)" if name == "SIGKILL" else ""
            return None, f"was killed by {name}{memory}{last.rstrip('.')}."
        return None, f"ended with exit code {code} and no answer{last.rstrip('.')}."

    def _complete(self) -> bytes | None:
        """The answer, if all of it has come."""
        _, found, rest = self._answer.partition(self._mark.encode() + b" ")
        size, line_end, answer = rest.partition(b"\n")
        if found and line_end and size.isdigit() and len(answer) >= int(size):
            return bytes(answer[: int(size)])
        return None

    def _read_answer(self, stream: IO[bytes]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended already
            self._process.stdin.write(self._line)
        with suppress(OSError, ValueError):
            while part := stream.read(1 << 16):
                self._answer += part
                self._too_much = len(self._answer) > _LARGEST
                if self._too_much or self._complete() is not None:
                    break
        # At the end of its output it has ended, or is about to: the exit code tells how.
        if not self._too_much and self._complete() is None:
            self._process.wait()
        self._done.set()

    def _read_words(self, stream: IO[bytes]) -> None:
        with suppress(OSError, ValueError):
            while part := stream.read(1 << 16):
                self._words = (self._words + part)[-_KEPT:]


class _Look:
    """What a process has done since it was started, as far as the system tells."""

    def __init__(self, pid: int) -> None:
        self._stat, self._io = Path(f"/proc/{pid}/stat"), Path(f"/proc/{pid}/io")
        self._tells = self._stat.exists()
        self._ticks_per_second = os.sysconf("SC_CLK_TCK") if self._tells else 1
        self._now = self._moved = time.monotonic()
        self._computed, self._read, self._slept = 0.0, 0, 0.0

    @property
    def own_time(self) -> float:
        """Seconds that it has computed or slept."""
        return self._computed + self._slept

    @property
    def idle(self) -> float:
        """Seconds since it last computed or read; 0 where the system does not tell."""
        return self._now - self._moved if self._tells else 0.0

    def again(self) -> None:
        """Look again."""
        now, before = time.monotonic(), self._now
        self._now = now
        if not self._tells:
            self._slept += now - before
            return
        try:
            # After the program's name, which may hold anything: the state, ..., major faults, ..., user, system time.
            fields = self._stat.read_text().rpartition(")")[2].split()
            read = int(fields[9])
            with suppress(OSError):  # not of a process that changed its user
                read += int(self._io.read_text().split()[1])
        except (OSError, ValueError, IndexError):  # it has just ended
            return
        computed = (int(fields[11]) + int(fields[12])) / self._ticks_per_second
        if computed > self._computed or read > self._read or fields[0] in {"R", "D"}:
            self._moved = now
        else:
            self._slept += now - before
        self._computed, self._read = computed, read
