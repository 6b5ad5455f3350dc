"""Steps on a CPU that are recorded: the bits of those that are not, and nothing that outlives its sequence."""

import gc
import threading
import warnings
import weakref

import polydraft
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_transformers import traced  # noqa: E402
from polydraft_transformers.experts import MOST_ROWS  # noqa: E402
from polydraft_transformers.kv_cache import KvCache  # noqa: E402
from polydraft_transformers.sequence import TransformersSequence  # noqa: E402
from polydraft_transformers.step_experts import mix_all, mix_by_definition  # noqa: E402

PROMPT = [2, *(300 + (7 * i) % 600 for i in range(40))]
PAIRS = ["tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama"]


def load(pair, **options):
    return polydraft.load(f"builtin:{pair}", backend="transformers", device="cpu", num_speculative_tokens=4, **options)


def recorded(session):
    """By decoder: what is recorded, by the first two parts of its form."""
    engine = session.engine
    decoders = [decoder for decoder in (engine.target, engine._drafter) if hasattr(decoder, "traced")]
    return [{form[:2]: found for form, found in decoder.traced._recorded.items()} for decoder in decoders]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_outputs_and_logits_are_those_of_steps_that_are_not_recorded(pair, dtype, monkeypatch):
    def outputs(uses):
        monkeypatch.setattr(traced, "_USES", uses)
        with load(pair, dtype=dtype) as session:
            asked = {"max_new_tokens": 240, "ignore_eos": True, "logprobs": 2, "temperature": 1.0, "seed": 5}
            found = session.generate(PROMPT, **asked)  # crosses the window, and the first capacity
            return found.token_ids, found.logprobs, ("step", 5) in recorded(session)[0]

    *wanted, never = outputs(1 << 30)
    assert not never
    *found, once = outputs(2)
    assert found == wanted
    # In bfloat16 Transformers' experts run, which look at values.
    assert once is ((pair, dtype) != ("tiny-26b", "bfloat16"))


@pytest.mark.parametrize("pair", PAIRS)
def test_forms_are_recorded_once_and_keep_no_cache(pair, monkeypatch):
    monkeypatch.setattr(traced, "_USES", 1)
    with load(pair, dtype="float32") as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        for speculate in ("on", "off"):
            session.generate(PROMPT, max_new_tokens=60, ignore_eos=True, speculate=speculate)
        before = recorded(session)
        assert ("step", 5) in before[0]
        assert ("step", 1) in before[0]
        target = session.engine.target
        with torch.inference_mode():
            sequence = TransformersSequence(target, 512, threading.Lock())
            sequence.run_prompt(PROMPT)
            for _ in range(3):
                sequence.run_step([7, 8, 9])
        cache = weakref.ref(sequence.cache)
        assert ("step", 3) in recorded(session)[0]
        del sequence
        gc.collect()
        assert cache() is None
        assert all(before[0][form] is recorded(session)[0][form] for form in before[0])


def test_steps_of_a_fixed_shape_are_not_recorded():
    with load("tiny-e2b", dtype="float32", exactness="bitwise") as session:
        assert session.engine.target.traced is None


@pytest.mark.parametrize("windows", [[None, None], [64, None], [24, None, 24], [1, None], [600, None]])
@pytest.mark.parametrize("most", [1, 5, 17])
def test_masks_that_are_looked_up_are_those_that_are_computed(windows, most):
    def masks(cache, *given, **named):
        cache.begin_step(*given, **named)
        return cache.layout.masks

    def same(wanted, found):
        assert wanted.keys() == found.keys()
        for kind, mask in wanted.items():
            assert (mask is found[kind] is None) or torch.equal(mask, found[kind])

    looked_up, computed = (KvCache(windows, most, torch.float32) for _ in range(2))
    for first in [*range(1, 140), 255, 256, 300, 599, 600, 601, 604, 700, 1023, 1024, 1500]:
        for rows in {1, min(2, most), most}:
            positions = torch.arange(first, first + rows)
            given = positions, first + rows, positions
            same(masks(computed, *given), masks(looked_up, *given, first=first))
        at = positions[:1]
        same(masks(computed, at, first, all_seen=True), masks(looked_up, at, first, all_seen=True, first=first))


@pytest.mark.parametrize("rows", [1, 5, MOST_ROWS])
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "silu"])
def test_all_experts_are_those_that_rows_chose(rows, activation):
    torch.manual_seed(rows)
    hidden, gate_up, down = torch.randn(rows, 24), torch.randn(6, 32, 24), torch.randn(6, 24, 16)
    weights, chosen = torch.rand(rows, 6).topk(2)
    wanted = mix_by_definition(hidden, gate_up, down, weights, chosen, activation).sum(1)
    found = mix_all(hidden, gate_up, down, weights, chosen, activation)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_experts_that_the_user_names_are_transformers_own():
    with load("tiny-26b", dtype="float32", engine_options={"experts_implementation": "grouped_mm"}) as session:
        assert not session.engine.target.network.traceable(5)
        named = session.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids
    with load("tiny-26b", dtype="float32") as session:
        assert session.engine.target.network.traceable(5)
        assert session.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids == named


def test_without_torchscript_steps_run_as_they_are(monkeypatch):
    monkeypatch.setattr(traced, "_USES", 1)
    asked = {"max_new_tokens": 40, "ignore_eos": True}
    with load("tiny-e2b", dtype="float32") as session:
        wanted = session.generate(PROMPT, **asked).token_ids

    def gone(*_, **__):
        raise NotImplementedError("TorchScript is not supported")

    monkeypatch.setattr(torch.jit, "trace", gone)
    with load("tiny-e2b", dtype="float32") as session:
        assert session.generate(PROMPT, **asked).token_ids == wanted
        assert recorded(session)[0]
