"""``examples/ray_data_batch.py`` on two local workers: one is killed in mid-run, and the driver once, too."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray.data")

EXAMPLE = Path(__file__).parents[3] / "examples" / "ray_data_batch.py"
ROWS = 120


def start(folder):
    options = json.dumps({"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 8})
    line = [
        *(sys.executable, str(EXAMPLE), str(folder / "in.jsonl"), str(folder / "out.jsonl")),
        *("--dtype", "float32", "--engine-options", options, "--max-new-tokens", "40", "--batch-size", "6"),
    ]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def written(folder):
    path = folder / "out.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def wait_for(folder, process, count, seconds=1200):  # two imports of vLLM and more on a busy machine
    deadline = time.monotonic() + seconds
    while written(folder) < count:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.2)


def workers(process):
    """The processes of ours that hold a session."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if any("MapWorker" in part for part in child.cmdline())]


def test_nothing_is_lost_or_doubled(tmp_path):
    rows = [{"id": f"r{number}", "prompt": f"def function_{number}(path):\n"} for number in range(ROWS)]
    rows.append({"id": "too-long", "prompt": "x " * 30000})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    first = start(tmp_path)
    try:
        wait_for(tmp_path, first, 1)
        victims = workers(first)
        assert len(victims) == 2
        victims[0].kill()
        before = written(tmp_path)
        wait_for(tmp_path, first, before + 12)
    finally:
        first.kill()  # the driver dies as well, in mid-run
        first.wait()
    assert written(tmp_path) < len(rows), "It was done before it was killed: give it more rows."
    with (tmp_path / "out.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "r1')  # what an interruption in mid-write leaves
    time.sleep(5)  # Ray's own processes end

    second = start(tmp_path)
    assert second.wait(1200) == 0, (tmp_path / "log").read_text()[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [line["id"] for line in lines]
    assert sorted(names) == sorted(row["id"] for row in rows)
    assert [line["id"] for line in lines if "error" in line] == ["too-long"]
    assert all(line["text"] for line in lines if "error" not in line)
