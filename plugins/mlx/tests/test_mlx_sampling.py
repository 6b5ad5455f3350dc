"""numpy and MLX choose the same ids from the same logits."""

import numpy as np
import polydraft
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import EngineError, NonFiniteLogitsError
from polydraft.sampling._grammar import forbid
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft.sampling.rule import choose_tokens

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 64, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.8},
    {"temperature": 1.2, "top_k": 200, "min_p": 0.001, "typical_p": 0.5},
]


@pytest.fixture(params=["host", "device"])
def ops(request, monkeypatch):
    """As on a CPU, and as on a GPU, where the rule runs in MLX's operations."""
    from polydraft_mlx.array_ops import MlxOps

    if request.param == "device":
        monkeypatch.setattr(MlxOps, "host_view", lambda self, array: None)
    return MlxOps()


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_the_same_ids_from_mlx(given, spread, ops):
    settings = GenerationSettings(**given)
    for seed in range(12):
        logits = (np.random.default_rng(seed).normal(size=(5, 3000)) * spread).astype(np.float32)
        first = choose_tokens(NumpyOps(), logits, settings, seed, 0, 17)
        second = choose_tokens(ops, mx.array(logits), settings, seed, 0, 17)
        assert first.tolist() == second.tolist()


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_ties_and_bfloat16(given, ops):
    settings = GenerationSettings(**given)
    narrow = mx.array(np.random.default_rng(3).normal(size=(5, 5000)).astype(np.float32)).astype(mx.bfloat16)
    wide = np.array(narrow.astype(mx.float32))  # a few hundred values for 5000 columns: ties everywhere
    first = choose_tokens(NumpyOps(), wide, settings, 11, 2, 400)
    second = choose_tokens(ops, narrow, settings, 11, 2, 400)
    assert isinstance(second, mx.array)
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None], ids=str)
@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_rows_that_are_not_finite_are_refused(given, bad, dtype, ops):
    rows = np.full((3, 500), -np.inf, np.float32)
    rows[0, 7], rows[1, 8] = 1.0, 2.0  # -inf for the other tokens is sound
    if bad is not None:
        rows[2, 9], rows[2, 3] = 3.0, bad
    rows = mx.array(rows).astype(getattr(mx, dtype))
    request = TokenRequest(
        prompt_token_ids=(5, 6),
        settings=GenerationSettings(**given),
        seed=4,
        speculate=True,
        num_speculative_tokens=3,
        eos_token_ids=frozenset(),
        max_total_tokens=100,
    )
    sampler = RuleSampler(ops, request, "float16")
    assert sampler.choose(rows, 2, [6, 7, 8])[0] == [7, 8, -1]
    with pytest.raises(NonFiniteLogitsError, match="target"):
        sampler.choose(rows[2:], 4, [8])
    draft = sampler.choose_draft(rows[2:], 5)
    assert 0 <= int(draft) < 500
    with pytest.raises(NonFiniteLogitsError, match="drafter"):
        sampler.choose(rows[:2], 5, [9, 499])


@pytest.mark.parametrize("name", ["tiny-e2b", "tiny-llama"])
def test_greedy_drafts_do_not_wait_for_one_another(name, monkeypatch):
    """In numpy, each draft would be evaluated before the next one's step."""
    pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
    with polydraft.load(f"builtin:{name}", backend="mlx", dtype="float32", num_speculative_tokens=3) as session:
        wanted = session.generate("def add(a, b):", max_new_tokens=24, logit_bias={0: 0.0})
        assert wanted.stats.num_draft_tokens

        def refused(*_):
            raise AssertionError("asked the host for a draft")

        monkeypatch.setattr(RuleSampler, "choose_draft", refused)
        found = session.generate("def add(a, b):", max_new_tokens=24)
        assert found.token_ids == wanted.token_ids
        assert found.stats.num_accepted_tokens == wanted.stats.num_accepted_tokens
        with pytest.raises(EngineError, match="asked the host"):
            session.generate("def add(a, b):", max_new_tokens=24, temperature=1.0)


def test_noise_and_its_functions_have_the_same_bits():
    from polydraft.sampling.noise import exp_nonpositive, gumbel, log_positive, row_keys
    from polydraft_mlx.array_ops import MlxOps

    ids = np.arange(20_000, dtype=np.int64)[None].repeat(2, axis=0)
    keys = row_keys(2**63 - 1, 5, range(7, 9))
    noise = []
    for ops, array in ((NumpyOps(), ids), (MlxOps(), mx.array(ids))):
        columns = tuple(ops.column(key, array) for key in keys)
        noise.append(np.array(gumbel(ops, array, columns)))
    assert noise[0].tobytes() == noise[1].tobytes()
    values = np.geomspace(1e-30, 1e30, 20_000, dtype=np.float32)
    assert log_positive(NumpyOps(), values).tobytes() == np.array(log_positive(MlxOps(), mx.array(values))).tobytes()
    values = -np.geomspace(1e-7, 90, 20_000, dtype=np.float32)
    found = np.array(exp_nonpositive(MlxOps(), mx.array(values)))
    assert exp_nonpositive(NumpyOps(), values).tobytes() == found.tobytes()


def test_entries_leave_the_original():
    from polydraft_mlx.array_ops import MlxOps

    array = mx.zeros((2, 4))
    changed = MlxOps().with_entries(array, [0, 1], np.array([3, 0]), -np.inf)
    assert array.tolist() == [[0.0] * 4] * 2
    assert np.isneginf(np.array(changed)).sum() == 2
    assert np.isneginf(np.array(MlxOps().entries(changed, [0, 1], [3, 0]))).all()


def test_masks_are_the_same_on_a_device():
    from polydraft_mlx.array_ops import MlxOps

    random = np.random.default_rng(2)
    rows = random.normal(size=(3, 1000)).astype(np.float32)  # logits may be padded, or fewer than the mask's words
    for width in (1000, 1024, 990):
        masks = [random.integers(0, 256, 4 * -(-width // 32), dtype=np.uint8) for _ in range(3)]
        assert (np.array(forbid(MlxOps(), mx.array(rows), masks)) == forbid(NumpyOps(), rows, masks)).all()
