"""numpy and torch choose the same ids from the same logits: on a device, where torch itself chooses, and on a host."""

import numpy as np
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling.chooser import RuleChooser
from polydraft.sampling.host import choose_on_host
from polydraft.sampling.noise import generic_noise_bits, row_keys
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
        first = choose_on_host(logits, settings, seed, 0, 17)
        second = choose_tokens(TorchOps(), torch.from_numpy(logits), settings, seed, 0, 17)
        assert first.tolist() == second.tolist()


def test_noise_bits():
    from polydraft_transformers.torch_ops import TorchOps

    ids = np.arange(0, 262_144, 7)[None]
    for seed in range(20):
        low, high = row_keys(seed, seed, range(seed, seed + 1))
        wanted = generic_noise_bits(NumpyOps(), ids, np.array([low]), np.array([high]))
        found = TorchOps().noise_bits(torch.from_numpy(ids), torch.tensor([low]), torch.tensor([high]))
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"logit_bias": {5: 9.0, 900: -3.0}, "banned_token_ids": (7, 8)},
        {"temperature": 0.9, "repetition_penalty": 0.8, "logit_bias": {3: 4.0}, "banned_token_ids": (2,), "top_k": 30},
        {"temperature": 1.0, "forced_token_ids": {2: 11}, "min_new_tokens": 9},
        {"temperature": 1.0, "logits_processor": lambda prefix, logits: logits - logits[prefix[-1]] * 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_chooser_on_torch_chooses_as_one_on_numpy(given, dtype, on_device):
    """The same steps and drafts; as a device, the CPU has torch do everything."""
    from polydraft_transformers.torch_ops import TorchOps

    class Device(TorchOps):
        def host_view(self, array):
            return None if on_device else super().host_view(array)

    settings = GenerationSettings(**given)
    request = TokenRequest(
        prompt_token_ids=(5, 6, 5),
        settings=settings,
        seed=4,
        speculate=True,
        num_speculative_tokens=3,
        eos_token_ids=frozenset({1}),
        max_total_tokens=100,
    )
    ours, theirs = RuleChooser(NumpyOps(), request), RuleChooser(Device(), request)
    rows = torch.from_numpy(np.random.default_rng(3).normal(size=(12, 1000)) * 4).to(dtype)
    wide = rows.float().numpy()
    assert ours.choose(wide[:1], 3, [5]) == theirs.choose(rows[:1], 3, [5])
    run = [9]
    for position in (4, 5, 6):
        prefix = run if ours.needs_prefix else None
        draft = ours.choose_draft(wide[position : position + 1], position, prefix)
        found = theirs.choose_draft(rows[position : position + 1], position, prefix)
        assert isinstance(found, torch.Tensor)
        assert found.tolist() == draft.tolist()
        run.append(int(found))
    assert ours.choose(wide[4:8], 4, run) == theirs.choose(rows[4:8], 4, run)
