"""numpy and torch choose the same ids from the same logits: on a device, where torch itself chooses, and on a host."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import NonFiniteLogitsError
from polydraft.sampling._grammar import forbid
from polydraft.sampling._host import choose_on_host
from polydraft.sampling._sampler import RuleSampler
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
    {"temperature": 1.0, "typical_p": 0.8},
    {"temperature": 1.2, "top_k": 200, "min_p": 0.001, "typical_p": 0.5},
]


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_the_same_ids(given, spread):
    from polydraft_transformers.array_ops import TorchOps

    settings = GenerationSettings(**given)
    for seed in range(20):
        logits = (np.random.default_rng(seed).normal(size=(5, 5000)) * spread).astype(np.float32)
        first = choose_on_host(logits, settings, seed, 0, 17)
        second = choose_tokens(TorchOps(), torch.from_numpy(logits), settings, seed, 0, 17)
        assert first.tolist() == second.tolist()


def test_noise_bits():
    from polydraft_transformers.array_ops import TorchOps

    ids = np.arange(0, 262_144, 7)[None]
    for seed in range(20):
        low, high = row_keys(seed, seed, range(seed, seed + 1))
        wanted = generic_noise_bits(NumpyOps(), ids, np.array([low]), np.array([high]))
        found = TorchOps().noise_bits(torch.from_numpy(ids), torch.tensor([low]), torch.tensor([high]))
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_typical_p_keeps_the_tokens_that_transformers_keeps(share, spread):
    """Upstream compares floats and keeps ties; tokens nearer to the cut than the rule's fixed point may differ."""
    from polydraft.sampling._host import kept_on_host
    from transformers import TypicalLogitsWarper

    rows = torch.from_numpy(np.random.default_rng(8).normal(size=(20, 3000)).astype(np.float32) * spread)
    scores = TypicalLogitsWarper(mass=share)(torch.empty(20, 0, dtype=torch.long), rows)
    settings = GenerationSettings(temperature=1.0, typical_p=share)
    for row, score in zip(rows.numpy(), scores, strict=True):
        upstream = set(torch.isfinite(score).nonzero()[:, 0].tolist())
        ours = set(kept_on_host(row, settings)[1].tolist())
        probabilities = np.exp(row) / np.exp(row).sum()
        assert probabilities[sorted(upstream ^ ours)].sum() < 0.01


def test_masks_are_the_same_on_a_device():
    from polydraft_transformers.array_ops import TorchOps

    random = np.random.default_rng(2)
    rows = random.normal(size=(3, 1000)).astype(np.float32)  # logits may be padded, or fewer than the mask's words
    for width in (1000, 1024, 990):
        masks = [random.integers(0, 256, 4 * -(-width // 32), dtype=np.uint8) for _ in range(3)]
        found = forbid(TorchOps(), torch.from_numpy(rows), masks).numpy()
        assert (found == forbid(NumpyOps(), rows, masks)).all()
        bits = np.unpackbits(masks[1], bitorder="little")
        assert ((found[1, : len(bits)] == rows[1, : len(bits)]) == bits[: found.shape[1]].astype(bool)).all()


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
    ids=" ".join,  # a processor's own text holds an address, which differs between processes
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_sampler_on_torch_chooses_as_one_on_numpy(given, dtype, on_device):
    """The same steps and drafts; as a device, the CPU has torch do everything."""
    from polydraft_transformers.array_ops import TorchOps

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
    ours, theirs = RuleSampler(NumpyOps(), request), RuleSampler(Device(), request)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None], ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_rows_that_are_not_finite_are_refused(bad, dtype, on_device):
    from polydraft_transformers.array_ops import TorchOps

    class Device(TorchOps):
        def host_view(self, array):
            return None if on_device else super().host_view(array)

    rows = torch.full((3, 500), -torch.inf, dtype=dtype)
    rows[0, 7], rows[1, 8] = 1.0, 2.0  # -inf for the other tokens is sound
    if bad is not None:
        rows[2, 9], rows[2, 3] = 3.0, bad
    for given in ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 4, "top_p": 0.9}):
        request = TokenRequest(
            prompt_token_ids=(5, 6),
            settings=GenerationSettings(**given),
            seed=4,
            speculate=True,
            num_speculative_tokens=3,
            eos_token_ids=frozenset(),
            max_total_tokens=100,
        )
        sampler = RuleSampler(Device(), request, "float16")
        assert sampler.choose(rows, 2, [6, 7, 8])[0] == [7, 8, -1]
        with pytest.raises(NonFiniteLogitsError, match="target"):
            sampler.choose(rows[2:], 4, [8])
        draft = sampler.choose_draft(rows[2:], 5)
        assert 0 <= int(draft) < 500
        with pytest.raises(NonFiniteLogitsError, match="drafter"):
            sampler.choose(rows[:2], 5, [9, 499])


def test_the_fused_kernel_is_the_same_noise(tmp_path):
    """Its source, compiled for the CPU with the intrinsics' meaning: the bits of the separate operations."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    from polydraft_transformers.fused_noise import _source
    from torch.cuda.jiterator import _CodeParser

    assert _CodeParser(_source()).function_name == "polydraft_gumbel"
    (tmp_path / "noise.cc").write_text(
        "#include <cstring>\n"
        "static float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }\n"
        "static int __float_as_int(float f) { int i; memcpy(&i, &f, 4); return i; }\n"
        "static float __fmul_rn(float a, float b) { return a * b; }\n"
        "static float __fadd_rn(float a, float b) { return a + b; }\n"
        + _source()
        + 'extern "C" void run(const int *ids, int low, int high, int *out, int n) {'
        "  for (int i = 0; i < n; ++i) out[i] = polydraft_gumbel<int>(ids[i], low, high);\n}\n"
    )
    arguments = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "noise.cc", "-o", "noise.so"]
    subprocess.run([compiler, *arguments], cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "noise.so"))
    ids = np.arange(0, 2**21, 3, dtype=np.int32)
    found = np.empty_like(ids)
    ops = NumpyOps()
    for position in range(4):
        low, high = row_keys(77 * position, 0, range(position, position + 1))
        pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int)) for array in (ids, found)]
        keys = [ctypes.c_int(key[0] - (key[0] >> 31 << 32)) for key in (low, high)]
        library.run(pointers[0], *keys, pointers[1], len(ids))
        wanted = ops.gumbel(ids.astype(np.int64)[None], np.array([low]), np.array([high]))[0]
        assert np.array_equal(found, wanted.view(np.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    """The kernel is used, chooses as numpy does, and a draft waits for nothing."""
    from polydraft_transformers.array_ops import TorchOps, separate_gumbel
    from polydraft_transformers.fused_noise import fused_gumbel

    assert fused_gumbel(torch.device("cuda", 0), separate_gumbel) is not None
    logits = (np.random.default_rng(1).normal(size=(5, 50_000)) * 4).astype(np.float32)
    on_device = torch.from_numpy(logits).cuda()
    for given in SETTINGS:
        settings = GenerationSettings(**given)
        wanted = choose_on_host(logits, settings, 3, 0, 17)
        assert choose_tokens(TorchOps(), on_device, settings, 3, 0, 17).tolist() == wanted.tolist()
        torch.cuda.set_sync_debug_mode("error")
        try:
            choose_tokens(TorchOps(), on_device[:1], settings, 3, 0, 17)
        finally:
            torch.cuda.set_sync_debug_mode("default")
