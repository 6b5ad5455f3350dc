"""``polydraft batch --ray`` on two Ray nodes, two raylets on this machine: one dies in mid-run, then the command."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytest.importorskip("ray.data")

ROWS = 640  # ten blocks: some are left when the command is killed


@pytest.fixture
def cluster():
    """A head node and another one, each with room for two workers: those of a dead node start again on the other.

    They have addresses of their own, as machines do: the head that of this machine, whose node a driver joins.
    """
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield made, made.add_node(node_ip_address="127.0.0.2", **node)
    finally:
        made.shutdown()


def start(folder, address, *further):
    line = [
        *(sys.executable, "-m", "polydraft", "batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--json"),
        *("--model", "builtin:toy", "--backend", "reference", "--ray", address, "--workers", "2", *further),
    ]
    with (folder / "log").open("ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def written(folder):
    path = folder / "out.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(folder, process, count, seconds=300):
    deadline = time.monotonic() + seconds
    while written(folder) < count:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)


def at_work(raylet):
    """The workers of a node that hold a session."""
    found = psutil.Process(raylet).children(recursive=True)
    return [child for child in found if any("Worker" in part for part in child.cmdline()[:1])]


def test_nothing_is_lost_or_doubled_when_a_node_dies(tmp_path, cluster):
    made, node = cluster
    rows = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"Hi {number}", "max_tokens": 24, "ignore_eos": True},
        }
        for number in range(ROWS)
    ]
    rows[7]["body"]["model"] = "another"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    first = start(tmp_path, made.address)
    try:
        wait_for(tmp_path, first, 1)
        raylet = node.all_processes["raylet"][0].process.pid
        assert at_work(raylet), "Ray placed no worker on the node that is to die."
        os.kill(raylet, signal.SIGKILL)
        before = written(tmp_path)
        wait_for(tmp_path, first, before + 70)  # more than what the other worker had in hand
    finally:
        first.kill()
        first.wait()
    assert written(tmp_path) < ROWS, "It was done before it was killed: give it more rows."
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"id":"batch_req_')  # what an interruption in mid-write leaves

    second = start(tmp_path, made.address)
    out, _ = second.communicate(timeout=600)
    assert second.returncode == 1, (tmp_path / "log").read_text()[-3000:]
    counts = json.loads(out)
    assert (counts["total"], counts["completed"], counts["failed"]) == (ROWS, ROWS - 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(row["custom_id"] for row in rows)
    assert [line["custom_id"] for line in lines if line["response"]["status_code"] != 200] == ["r7"]
