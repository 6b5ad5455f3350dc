"""How a worker ended, in words: exit code or signal, its last words, and whether memory ran out."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from polydraft.errors import EngineCrashedError

__all__ = ["Death", "oom_kills"]

_LINES, _CHARACTERS = 6, 600
"""How much of what a worker wrote last an error shows."""
_DUMP = re.compile(
    r"^(?:Current thread|Thread) 0x|^Stack \(most recent|^Extension modules: |^<no Python frame>", re.MULTILINE
)
"""What Python's faulthandler writes after the reason: stacks of all threads, and modules."""
_ABORTS = {"SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP"}


@dataclass(frozen=True, slots=True)
class Death:
    """What is known of a worker that has ended.

    Args:
        who: ``The worker of transformers (process 4711)``.
        code: Its exit code; negative: the signal that ended it. None: not known.
        wrote: The end of what it wrote to standard error.
        new_oom_kills: Processes that the kernel killed for want of memory while it ran, in this process's control
            group; None if that is not counted here.
        broken: Why this process ended it, as part of a sentence: ``closed its pipe``. Empty if it ended by itself.
    """

    who: str
    code: int | None
    wrote: str
    new_oom_kills: int | None
    broken: str = ""

    @property
    def signal(self) -> str:
        """Name of the signal that ended it; empty if none did, or if this process sent it."""
        if self.code is None or self.code >= 0 or self.broken:
            return ""
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"

    @property
    def last_words(self) -> str:
        """Its last lines, without the stacks of Python's faulthandler."""
        text = _DUMP.split(self.wrote, maxsplit=1)[0] if "Fatal Python error" in self.wrote else self.wrote
        lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        return "\n".join(lines[-_LINES:])[-_CHARACTERS:]

    @property
    def out_of_memory(self) -> bool | None:
        """Whether memory ran out; None if that is not known."""
        if self.signal != "SIGKILL":
            return False if self.code is not None else None
        return None if self.new_oom_kills is None else self.new_oom_kills > 0

    def error(self, doing: str = "") -> EngineCrashedError:
        """A new error for a call. ``doing`` is what the worker was asked for, as part of a sentence."""
        how = (
            f"was ended by {self.signal}"
            if self.signal
            else f"ended with exit code {self.code}"
            if self.code is not None
            else "has gone"
        )
        if self.broken:
            how = f"{self.broken}, and was ended"
        if self.out_of_memory:
            how = "was killed by the system, because memory ran out"
        words = self.last_words
        said = f" Its last words: {words.rstrip('.')}." if words else ""
        return EngineCrashedError(
            f"{self.who} {how}{doing and f' {doing}'}.{said}",
            self._hint(),
            exit_code=self.code if self.code is not None and self.code >= 0 else None,
            signal=self.signal,
            last_words=words,
            out_of_memory=self.out_of_memory,
        )

    def _hint(self) -> str:
        if self.out_of_memory:
            return "Load it with a smaller `context_length`, or a smaller model."
        if self.signal == "SIGKILL" and self.out_of_memory is None:
            return (
                "Load it again with polydraft.load. If nobody killed it, memory has probably run out: then give a "
                "smaller `context_length`, or a smaller model."
            )
        if self.signal in _ABORTS:
            return "Load it again with polydraft.load. If that happens again, report it to the engine's authors."
        return "Load it again with polydraft.load."


def oom_kills() -> int | None:
    """Processes that the kernel has killed for want of memory in this process's control group; None if not counted."""
    for path in _counters():
        try:
            found = re.search(r"^oom_kill (\d+)", path.read_text(encoding="ascii"), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if found:
            return int(found[1])
    return None


def _counters() -> list[Path]:
    """Files that hold the count: of control groups 2 and 1, then of the whole machine."""
    groups = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if number == "0" and not controllers:
            found.append(groups / place.strip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(groups / "memory" / place.strip("/") / "memory.oom_control")
    # In a container the group's own files are at the root.
    return [*found, groups / "memory.events", groups / "memory" / "memory.oom_control", Path("/proc/vmstat")]
