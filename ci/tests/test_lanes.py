"""Parallel sessions, with a program in place of nox that sleeps, fails or starts other programs."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

LANES = Path(__file__).parents[1] / "lanes.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="lanes need POSIX")

NOX = """
import json, os, subprocess, sys, time
report, name = sys.argv[sys.argv.index("--report") + 1], sys.argv[sys.argv.index("-s") + 1]
kind, _, value = name.partition(" ")
print("begin", name, time.monotonic(), file=sys.stderr)
if kind == "sleep":
    time.sleep(float(value))
if kind in ("stubborn", "leaving"):
    away = {"start_new_session": True, "stdout": subprocess.DEVNULL}
    kept = [] if kind == "leaving" else [subprocess.Popen(["sleep", "1234.5"], **away)]
    kept.append(subprocess.Popen(["sh", "-c", "trap '' INT TERM; sleep 1234.5; :"], stdout=subprocess.DEVNULL))
    print("started", *(one.pid for one in kept))
    time.sleep(0 if kind == "leaving" else 1000)
result = {"skip": "skipped", "abort": "aborted"}.get(kind, "success")
if kind != "crash":
    with open(report, "w") as file:
        json.dump({"sessions": [{"result": result, "reason": "no such engine" if kind == "skip" else None}]}, file)
print(f"===== 3 passed in {time.monotonic():.2f}s =====")
sys.exit(kind in ("abort", "crash"))
"""
RUNS = """
import importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("lanes_there", sys.argv[1])
lanes = sys.modules["lanes_there"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lanes)
from pathlib import Path
lanes.HEARTBEAT = 0.5
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as if pytest did not run under nohup
say = lambda text: print("say:", text, flush=True)
lanes.run(sys.argv[4:], [sys.executable, sys.argv[2]], lanes=2, logs=Path(sys.argv[3]), folder=".", say=say)
"""


@pytest.fixture(scope="module")
def lanes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_lanes", LANES)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["ci_lanes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nox(tmp_path: Path) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(NOX, encoding="utf-8")
    return script


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_results_and_output(lanes: ModuleType, nox: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["crash", "sleep 0.1", "skip", "abort"]
    said: list[str] = []
    ended = lanes.run(
        names, [sys.executable, str(nox)], lanes=2, logs=tmp_path / "logs", folder=str(tmp_path), say=said.append
    )
    assert {one.name: (one.result, one.good, one.reason) for one in ended} == {
        "crash": ("failed", False, "nox ended with code 1"),
        "sleep 0.1": ("success", True, ""),
        "skip": ("skipped", True, "no such engine"),
        "abort": ("aborted", False, ""),
    }
    lines = capfd.readouterr().out.splitlines()
    begun = [line for line in lines if line.startswith("begin")]
    assert len(begun) == 4
    # In one block: the last line of each follows its first.
    assert all(lines[lines.index(line) + 1].startswith("===== 3 passed in") for line in begun)
    for name in names:
        assert sum(line.startswith(f"{name} started") for line in said) == 1
        assert any(line.startswith(f"{name}: ") for line in said)


def test_no_more_than_the_lanes_at_once(
    lanes: ModuleType, nox: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    lanes.run(
        ["sleep 0.9", "sleep 0.8", "sleep 0.01"],
        [sys.executable, str(nox)],
        lanes=2,
        logs=tmp_path,
        folder=".",
        say=lambda _: None,
    )
    starts = sorted(float(line.split()[-1]) for line in capfd.readouterr().out.splitlines() if "begin" in line)
    assert starts[1] - starts[0] < 0.8, "the second has waited for the first"
    assert starts[2] - began > 0.8, "three ran at once"


def test_stop_at_failure(lanes: ModuleType, nox: Path, tmp_path: Path) -> None:
    names = ["sleep 0.5", "crash", "never"]
    ended = lanes.run(
        names,
        [sys.executable, str(nox)],
        lanes=2,
        logs=tmp_path,
        folder=".",
        say=lambda _: None,
        stop_at_failure=True,
    )
    assert [one.name for one in ended] == ["crash", "sleep 0.5"]


def test_what_a_session_leaves_behind_is_ended(
    lanes: ModuleType, nox: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lanes.run(["leaving"], [sys.executable, str(nox)], lanes=2, logs=tmp_path, folder=".", say=lambda _: None)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("started")]
    time.sleep(0.3)
    assert gone(int(line.split()[1]))


@pytest.mark.parametrize(
    ("number", "ignored"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
)
def test_signals_end_all(nox: Path, tmp_path: Path, number: signal.Signals, ignored: bool) -> None:
    """Also processes that ignore them or have their own group, and a run that a shell started in the background."""
    call = [sys.executable, "-c", RUNS, str(LANES), str(nox), str(tmp_path / "logs"), "stubborn", "sleep 30", "never"]
    if ignored:
        call = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *call]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        said: list[str] = []
        while not any("running: stubborn for" in line for line in said):
            said.append(run.stdout.readline())
            assert said[-1], "it ended"
        # On a busy machine a session may need longer than the first report to start its processes.
        deadline = time.monotonic() + 30
        while not any("started" in log.read_text() for log in (tmp_path / "logs").glob("stubborn*")):
            assert time.monotonic() < deadline, "it has not started"
            time.sleep(0.05)
        run.send_signal(number)
        rest, errors = run.communicate(timeout=14)  # less than PATIENCE
    assert run.returncode not in (0, None)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "say: stubborn: interrupted after" in rest
    (line,) = [line for line in rest.splitlines() if line.startswith("started")]
    time.sleep(0.3)
    assert all(gone(int(pid)) for pid in line.split()[1:])
    assert "never started" not in "".join(said) + rest


def test_options_reach_the_sessions(lanes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    here = [sys.executable, "-m", "nox"]
    assert lanes.command(["-R", "-s", "tests", "--", "lint"], False) == [*here, "-R", "-s", "tests"]
    assert lanes.command([], True) == [*here, "--forcecolor"]
    assert lanes.command(["--nocolor"], True) == [*here, "--nocolor"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert lanes.command([], True) == here
