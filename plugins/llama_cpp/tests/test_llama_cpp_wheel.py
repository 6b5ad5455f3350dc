"""The library of xllamacpp's wheel in place of llama-cpp-python: in a process of its own, as both may be installed."""

import json
import subprocess
import sys

import pytest
from polydraft_llama_cpp import wheel

pytest.importorskip("xllamacpp", reason="the wheel is not installed")

PROGRAM = """
import json, sys
from polydraft_llama_cpp import bindings
bindings.COMPILED = "no-such-distribution"
import polydraft
prompt, found = [2, *range(300, 340)], []
for target, drafter in (("tiny-e2b", "tiny-e2b-assistant"), ("tiny-llama", "tiny-llama-draft")):
    pair = {"backend": "llama_cpp", "drafter": f"builtin:{drafter}", "dtype": "bfloat16", "device": "cpu"}
    options = {"mmap": False}
    with polydraft.load(
        f"builtin:{target}", **pair, context_length=256, exactness="bitwise", engine_options=options
    ) as session:
        for settings in ({}, {"temperature": 1.0, "seed": 3}):
            call = {"max_new_tokens": 40, "ignore_eos": True, **settings}
            speculative = session.generate(prompt, **call)
            plain = session.generate(prompt, **call, speculate="off")
            found.append([speculative.token_ids == plain.token_ids, speculative.stats.num_accepted_tokens > 0])
    found.append(session.running.engine)
print(json.dumps(found))
"""


def test_the_stepping_engine_runs_on_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[True, True], [True, True], "xllamacpp"] * 2


def test_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(wheel, "version", lambda _: "2026.11.1")
    with pytest.raises(ImportError, match=r"known for 2026\.10\.11549 only"):
        wheel.library.__wrapped__()


@pytest.mark.parametrize(
    ("defaults", "field"), [("_MODEL_DEFAULTS", "lazy_mode"), ("_CONTEXT_DEFAULTS", "defrag_thold")]
)
def test_other_structs_are_noticed(monkeypatch, defaults, field):
    monkeypatch.setattr(wheel, defaults, {**getattr(wheel, defaults), field: 77})
    with pytest.raises(ImportError, match=f"structs are not those of llama.cpp's build: {field}"):
        wheel.library.__wrapped__()
