"""Runs nox sessions side by side, each in a nox of its own: ``nox -s tests`` does.

nox's own ``--parallel`` keeps a session's output to itself until the session ends, says nothing meanwhile where there
is no terminal, loses the output of what was running on Ctrl+C, and leaves its sessions behind on SIGTERM. Here a
session that hangs can be looked at, and nothing outlives the run. Needs POSIX.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Outcome", "command", "run", "usable_cores"]

HEARTBEAT = 60.0
"""Seconds after which a run that had nothing to say says what it is doing."""
PATIENCE = 15.0
"""Seconds that sessions have to end by themselves after they were interrupted: pytest ends the servers it started."""
_POLL = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of a session."""

    name: str
    result: str
    """nox's word: success, failed, skipped, aborted; interrupted if this run was."""
    seconds: float
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether nox takes it for good: a skipped session is."""
        return self.result in ("success", "skipped")

    def __str__(self) -> str:
        return f"{self.result} after {self.seconds:.0f} s{f': {self.reason}' if self.reason else ''}"


@dataclass
class _Session:
    """A session that runs: the leader of a process group of its own."""

    name: str
    log: Path
    report: Path
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def outcome(self) -> Outcome:
        """What nox has reported; where it could not, its exit code tells."""
        code = self.process.wait()
        result, reason = ("failed", f"nox ended with code {code}") if code else ("success", "")
        with contextlib.suppress(OSError, ValueError, LookupError):
            said = json.loads(self.report.read_text(encoding="utf-8"))["sessions"][0]
            if not code or said["result"] != "success":
                result, reason = said["result"], said.get("reason") or ""
        return Outcome(self.name, result, self.seconds, reason)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def command(arguments: Sequence[str], coloured: bool) -> list[str]:
    """The nox that a session runs in, its name not yet given: this one's options, without what follows ``--``.

    Args:
        arguments: What this nox was called with.
        coloured: Whether its output goes to a terminal; the session's goes to a file, so nox would not colour it.
    """
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    said = {"--forcecolor", "--force-color", "--nocolor", "--no-color"} & {*options}
    if coloured and not said and not {"NO_COLOR", "FORCE_COLOR"} & {*os.environ}:
        options.append("--forcecolor")
    return [sys.executable, "-m", "nox", *options]


def run(
    names: Sequence[str],
    nox: Sequence[str],
    *,
    lanes: int,
    logs: Path,
    folder: str,
    say: Callable[[str], None],
    stop_at_failure: bool = False,
) -> list[Outcome]:
    """Run sessions, at most ``lanes`` at once, in the given order; each one's output is printed when it has ended.

    Args:
        names: The sessions.
        nox: The nox to run them with; of options given twice the last counts.
        lanes: How many at once.
        logs: Folder for their output, one file each.
        folder: Where nox runs.
        say: Takes what happens, a line each time.
        stop_at_failure: Whether to start no more after one has failed.

    Returns:
        What became of those that ran, in the order of their ends.

    Raises:
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came. All sessions have ended then, with all that they started.
    """
    waiting, running, ended = deque(names), list[_Session](), list[Outcome]()
    logs.mkdir(parents=True, exist_ok=True)
    with _signals() as received:
        try:
            spoken = time.monotonic()
            while (waiting or running) and not received:
                while waiting and len(running) < lanes:
                    running.append(_start(waiting.popleft(), nox, logs, folder))
                    say(f"{running[-1].name} started, output in {running[-1].log}")
                    spoken = time.monotonic()
                time.sleep(_POLL)
                for session in [one for one in running if one.process.poll() is not None]:
                    running.remove(session)
                    _kill_group(session)
                    ended.append(session.outcome())
                    _show(session, ended[-1], say)
                    spoken = time.monotonic()
                    if stop_at_failure and not ended[-1].good:
                        waiting.clear()
                if running and time.monotonic() - spoken >= HEARTBEAT:
                    what = ", ".join(f"{one.name} for {one.seconds:.0f} s" for one in running)
                    say(f"running: {what}; {len(waiting)} to come")
                    spoken = time.monotonic()
        finally:  # after an error of ours, too
            if running:
                say(f"ending {', '.join(one.name for one in running)}; once more to end them at once")
                _stop(running, received)
        for session in running:
            _show(session, Outcome(session.name, "interrupted", session.seconds), say)
    if received:
        raise KeyboardInterrupt
    return ended


def _start(name: str, nox: Sequence[str], logs: Path, folder: str) -> _Session:
    log = logs / f"{re.sub(r'[^a-z0-9_]+', '-', name.lower()).strip('-')}.log"
    report = log.with_suffix(".json")
    report.unlink(missing_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*nox, "--report", str(report.resolve()), "-s", name],
            cwd=folder,
            # Else what Python programs print comes in blocks, and the last one not at all if they are killed.
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,  # two cannot ask at one terminal
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Session(name, log, report, process)


def _show(session: _Session, outcome: Outcome, say: Callable[[str], None]) -> None:
    """What the session said, as one block and as it said it: CI reads pytest's closing lines."""
    say(f"{session.name}: {outcome}. It said:")
    with session.log.open(encoding="utf-8", errors="replace") as text:
        for line in text:
            sys.stdout.write(line)
    sys.stdout.write("\n")
    sys.stdout.flush()
    say(f"{session.name}: {outcome}")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note the signals that ask to end, in the list that the block gets.

    Exceptions in their place would come between the start of a process and the note of it. SIGINT reaches the sessions
    also where this process was started with it ignored, as shells start programs in the background.
    """
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _stop(running: Sequence[_Session], received: Sequence[int]) -> None:
    """Interrupt the sessions as Ctrl+C would, then kill what is left, at once if another signal comes."""
    started = _descendants({one.process.pid for one in running})
    for session in running:
        _signal_group(session, signal.SIGINT)
    deadline, signals = time.monotonic() + PATIENCE, len(received)
    while any(one.process.poll() is None for one in running):
        if time.monotonic() > deadline or len(received) > signals:
            break
        time.sleep(_POLL)
    for session in running:
        _kill_group(session)
        session.process.wait()
    for pid, birth in started.items():  # those with a group of their own
        if _born(pid)[1] == birth:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill_group(session: _Session) -> None:
    """Kill what a session has left behind, or all of it."""
    _signal_group(session, signal.SIGKILL)


def _signal_group(session: _Session, number: int) -> None:
    # macOS refuses where only zombies are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session.process.pid, number)


def _descendants(pids: set[int]) -> dict[int, str]:
    """The processes below some, and their births, since numbers are given again. Empty where there is no /proc."""
    births = {int(entry.name): _born(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    found: dict[int, str] = {}
    above = pids
    while above:
        below = {pid: birth for pid, (parent, birth) in births.items() if parent in above}
        found |= below
        above = {*below}
    return found


def _born(pid: int) -> tuple[int, str]:
    """A process's parent, and its birth in the kernel's units; (0, "") if it is gone."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return int(values[1]), values[19]
