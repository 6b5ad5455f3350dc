"""NVIDIA's AIPerf reads the drafts from the usage, from vLLM's metrics of an answer, and from `/metrics`."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROMPTS = ["Tell me a story.", "Once upon a time", "def main():", "What is a draft?"]


def test_it_reads_what_the_drafts_did(toy, tmp_path):
    program = os.environ.get("POLYDRAFT_AIPERF") or shutil.which("aiperf")
    if program is None:
        pytest.skip("there is no aiperf: `nox -s clients`, or set POLYDRAFT_AIPERF to its path")
    pairs = pytest.importorskip("polydraft_builtin_pairs", reason="a tokenizer comes from polydraft-builtin-pairs")
    tokenizer = str(Path(pairs.__file__).parent / "data" / "tiny-llama-draft")
    server, session = toy
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    options = {
        "model": "builtin:toy",
        "url": server.url.removesuffix("/v1"),
        "endpoint-type": "chat",
        "input-file": str(asked),
        "custom-dataset-type": "single_turn",
        "request-count": str(len(PROMPTS)),
        "concurrency": "2",
        "tokenizer": tokenizer,
        "extra-inputs": json.dumps({"max_tokens": 40, "ignore_eos": True}),
        "ui": "none",
        "artifact-dir": str(tmp_path / "out"),
    }
    command = [program, "profile", "--streaming", "--use-server-token-count"]
    for name, value in options.items():
        command += [f"--{name}", value]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it has its own packages
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())

    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    stats = [session.generate(chat, max_new_tokens=40, ignore_eos=True).stats for chat in chats]
    accepted, drafted = (
        sum(getattr(one, name) for one in stats) for name in ("num_accepted_tokens", "num_draft_tokens")
    )
    rounds = sum(one.num_drafts for one in stats)
    assert found["total_usage_accepted_prediction_tokens"]["avg"] == accepted
    assert found["total_usage_rejected_prediction_tokens"]["avg"] == drafted - accepted
    assert found["total_spec_decode_steps"]["avg"] == rounds
    assert found["spec_decode_overall_draft_acceptance_rate"]["avg"] == pytest.approx(100 * accepted / drafted)
    histogram = {int(count): many for count, many in found["pooled_spec_decode_acceptance_histogram"].items()}
    assert sum(count * many for count, many in histogram.items()) == accepted

    with (tmp_path / "out" / "server_metrics_export.csv").open(newline="") as lines:
        rows = list(csv.reader(lines))
    counted = {}
    for row in rows:
        if len(row) > 4 and row[2].startswith("vllm:spec_decode"):
            counted.setdefault(row[2], []).append(float(row[4]))
    assert counted["vllm:spec_decode_num_drafts"] == [rounds]
    assert counted["vllm:spec_decode_num_accepted_tokens"] == [accepted]
    per_position = [sum(column) for column in zip(*(one.accepted_per_position for one in stats), strict=True)]
    assert counted["vllm:spec_decode_num_accepted_tokens_per_pos"] == per_position
