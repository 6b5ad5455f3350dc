"""The same greedy output and acceptance as the Transformers backend's, on the same checkpoints in float32.

(The suite compares the logits of target and drafter: test_target_logits_equal_reference, test_drafter_...)
"""

import importlib.util
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

HERE = Path(__file__).parent


def script():
    spec = importlib.util.spec_from_file_location("record_peer", HERE.parent / "scripts" / "record_peer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_transformers(target):
    """Computed if Transformers is installed, else read from the record."""
    try:
        version("polydraft-transformers")
    except PackageNotFoundError:
        return json.loads((HERE / "data" / "transformers_greedy.json").read_text())["outputs"][target]
    return script().outputs("transformers", target)


@pytest.mark.parametrize("target", ["tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama"])
def test_output_and_acceptance_are_those_of_transformers(target):
    theirs, ours = of_transformers(target), script().outputs("mlx", target)
    assert [entry["token_ids"] for entry in ours] == [entry["token_ids"] for entry in theirs]
    assert len(ours[-1]["prompt_token_ids"]) > 64
    rates = [sum(e["accepted"] for e in side) / sum(e["drafted"] for e in side) for side in (ours, theirs)]
    assert abs(rates[0] - rates[1]) < 0.02
