"""Run nox sessions in parallel, each in a separate nox, for ``nox -s tests``.

nox's own ``--parallel`` hides a session's output until the session ends, prints nothing meanwhile if there is no
terminal, loses the output of running sessions on Ctrl+C, and leaves them running on SIGTERM. Here the output of a
hanging session can be read, and nothing outlives the run. Needs POSIX.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["WORKERS", "Outcome", "command", "run", "usable_cores"]

WORKERS = "POLYDRAFT_WORKERS"
"""The environment variable that tells a session how many processes it may run its checks in."""
HEARTBEAT = 60.0
"""Seconds without output after which a run reports what it is doing."""
PATIENCE = 15.0
"""Seconds that interrupted sessions have to end by themselves: pytest stops the servers that it started."""
_POLL = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a session ended."""

    name: str
    result: str
    """As nox reports it: success, failed, skipped, aborted; interrupted if this run was."""
    seconds: float
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether nox counts it as passed; a skipped session is."""
        return self.result in ("success", "skipped")

    def __str__(self) -> str:
        return f"{self.result} after {self.seconds:.0f} s{f': {self.reason}' if self.reason else ''}"


@dataclass
class _Session:
    """A running session: the leader of a new process group."""

    name: str
    log: Path
    report: Path
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def outcome(self) -> Outcome:
        """The status that nox reported, or else that of its exit code."""
        code = self.process.wait()
        result, reason = ("failed", f"nox ended with code {code}") if code else ("success", "")
        with contextlib.suppress(OSError, ValueError, LookupError):
            said = json.loads(self.report.read_text(encoding="utf-8"))["sessions"][0]
            if not code or said["result"] != "success":
                result, reason = said["result"], said.get("reason") or ""
        return Outcome(self.name, result, self.seconds, reason)


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def command(arguments: Sequence[str], coloured: bool) -> list[str]:
    """The command of the nox that a session runs in, without the session's name: this nox's options up to ``--``.

    Args:
        arguments: This nox's command-line arguments.
        coloured: Whether its output goes to a terminal. The session's goes to a file, which nox would not colour.
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
    """Run sessions, at most ``lanes`` at once, started in the given order; print the output of each when it has ended.

    Args:
        names: Names of the sessions.
        nox: The command that runs them; of options given twice the last counts.
        lanes: How many run at once.
        logs: Folder for their output, one file per session.
        folder: Working directory of nox.
        say: Called with one line per event.
        stop_at_failure: Whether to start no more sessions after a failure.

    Returns:
        The outcomes of the sessions that ran, in the order in which they ended.

    Raises:
        KeyboardInterrupt: On SIGINT, SIGTERM or SIGHUP, after all sessions and the processes they started have ended.
    """
    waiting, running, ended = deque(names), list[_Session](), list[Outcome]()
    logs.mkdir(parents=True, exist_ok=True)
    with _signals() as received:
        try:
            spoken = time.monotonic()
            while (waiting or running) and not received:
                while waiting and len(running) < lanes:
                    running.append(_start(waiting.popleft(), nox, lanes, logs, folder))
                    say(f"{running[-1].name} started, output in {running[-1].log}")
                    spoken = time.monotonic()
                time.sleep(_POLL)
                for session in [one for one in running if one.process.poll() is not None]:
                    running.remove(session)
                    _signal_group(session, signal.SIGKILL)  # what it has left running
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


def _start(name: str, nox: Sequence[str], lanes: int, logs: Path, folder: str) -> _Session:
    log = logs / f"{re.sub(r'[^a-z0-9_]+', '-', name.lower()).strip('-')}.log"
    report = log.with_suffix(".json")
    report.unlink(missing_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*nox, "--report", str(report.resolve()), "-s", name],
            cwd=folder,
            # Otherwise the output of Python programs comes in blocks, and the last block is lost if they are killed.
            env={**os.environ, "PYTHONUNBUFFERED": "1", WORKERS: str(max(1, usable_cores() // lanes))},
            stdin=subprocess.DEVNULL,  # parallel sessions cannot share a terminal's input
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Session(name, log, report, process)


def _show(session: _Session, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Print the session's output, unchanged and in one block: CI reads pytest's closing lines."""
    say(f"{session.name}: {outcome}. It said:")
    with session.log.open(encoding="utf-8", errors="replace") as text:
        shutil.copyfileobj(text, sys.stdout)
    print(flush=True)
    say(f"{session.name}: {outcome}")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Record the signals that ask to end, in the list that the ``with`` block gets.

    An exception instead could come between the start of a process and its recording. SIGINT is handled even if this
    process was started with it ignored, as shells do for background programs.
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
    """Interrupt the sessions as Ctrl+C would, then kill what is left; at once if another signal comes."""
    started = _descendants({one.process.pid for one in running})
    for session in running:
        _signal_group(session, signal.SIGINT)
    deadline, signals = time.monotonic() + PATIENCE, len(received)
    while any(one.process.poll() is None for one in running):
        if time.monotonic() > deadline or len(received) > signals:
            break
        time.sleep(_POLL)
    for session in running:
        _signal_group(session, signal.SIGKILL)
        session.process.wait()
    for pid, birth in started.items():  # processes with a group of their own
        if _born(pid)[1] == birth:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _signal_group(session: _Session, number: int) -> None:
    # macOS refuses if only zombies are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session.process.pid, number)


def _descendants(pids: set[int]) -> dict[int, str]:
    """Descendants of processes, with start times, since ids are reused. Empty without /proc."""
    births = {int(entry.name): _born(int(entry.name)) for entry in Path("/proc").glob("[0-9]*")}
    found: dict[int, str] = {}
    above = pids
    while above:
        below = {pid: birth for pid, (parent, birth) in births.items() if parent in above}
        found |= below
        above = {*below}
    return found


def _born(pid: int) -> tuple[int, str]:
    """A process's parent, and its start time in the kernel's units; (0, "") if it has ended."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return int(values[1]), values[19]
