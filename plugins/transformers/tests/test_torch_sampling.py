"""numpy and torch choose the same ids from the same logits."""

import numpy as np
import pytest
from polydraft.contract import GenerationSettings
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens

torch = pytest.importorskip("torch", reason="torch is not installed")

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 64, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_the_same_ids(given, spread):
    from polydraft_transformers.torch_ops import TorchOps

    settings = GenerationSettings(**given)
    for seed in range(20):
        logits = (np.random.default_rng(seed).normal(size=(5, 5000)) * spread).astype(np.float32)
        first = choose_tokens(NumpyOps(), logits, settings, seed, 0, 17)
        second = choose_tokens(TorchOps(), torch.from_numpy(logits), settings, seed, 0, 17)
        assert first.tolist() == second.tolist()
