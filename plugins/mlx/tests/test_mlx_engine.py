"""The engine on the built-in pairs, against mlx-lm's own loop."""

import threading

import numpy as np
import polydraft
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

PROMPT = [2, *range(300, 340)]
LONG = [2, *(300 + (7 * i) % 600 for i in range(200))]  # past the window of 64


@pytest.fixture(scope="module", params=["tiny-e2b", "tiny-31b", "tiny-26b", "tiny-llama"])
def session(request):
    with polydraft.load(f"builtin:{request.param}", backend="mlx", dtype="float32", device="cpu") as loaded:
        yield loaded


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["short", "long"])
def test_greedy_equals_mlx_lms_plain_loop(session, prompt):
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    model = session.engine.target.model
    with session.engine._runtime.use("mlx-lm ran"):
        cache = [KVCache() for _ in make_prompt_cache(model)]
        wanted = [int(mx.argmax(model(mx.array([prompt]), cache=cache)[0, -1]))]
        while len(wanted) < 24:
            wanted.append(int(mx.argmax(model(mx.array([wanted[-1:]]), cache=cache)[0, -1])))
    result = session.generate(prompt, max_new_tokens=24, ignore_eos=True)
    assert list(result.token_ids) == wanted
    assert result.stats.num_draft_tokens > 0


@pytest.mark.parametrize("length", [64, 65, 260])
def test_after_a_rollback_the_logits_are_those_of_a_fresh_prefill(session, length, greedy):
    tokens = (LONG * 4)[: length + 1]
    used, fresh = session.engine.open_sequence(), session.engine.open_sequence()
    used.prefill(tokens[:length], greedy)
    used.verify([5, 6, 7, 8, 9], greedy)
    used.rollback(length)
    got = used.verify(tokens[length:], greedy, keep_logits=True).logits.numpy()
    want = fresh.prefill(tokens, greedy, keep_logits=True).logits.numpy()
    assert abs(got - want).max() < 1e-3


def test_a_drafter_sees_one_row_more_than_the_window(greedy):
    """That row of the sliding layers changes the drafts' logits; rows before it do not."""
    with polydraft.load("builtin:tiny-31b", backend="mlx", dtype="float32", device="cpu") as loaded:
        sequence = loaded.engine.open_sequence()
        newest = sequence.prefill(LONG, greedy).token_ids[0]
        clean = sequence.propose(newest, 1, greedy, keep_logits=True).logits.numpy()
        changed = {}
        for distance in (65, 66):
            for layer in sequence._cache.layers:
                if hasattr(layer, "window"):
                    slot = (sequence.length - distance) % layer.capacity
                    layer.values[..., slot, :] = layer.values[..., slot, :] + 1.0
            found = sequence.propose(newest, 1, greedy, keep_logits=True).logits.numpy()
            changed[distance] = not np.array_equal(found, clean)
            clean = found
        assert changed == {65: True, 66: False}


def test_chunks_of_a_prompt_make_no_difference(greedy):
    logits = []
    for chunk in (3, 64, 4096):
        with polydraft.load(
            "builtin:tiny-e2b", backend="mlx", dtype="float32", device="cpu",
            engine_options={"prefill_chunk_size": chunk},
        ) as loaded:  # fmt: skip
            step = loaded.engine.open_sequence().prefill(LONG, greedy, keep_logits=True)
            logits.append(step.logits.numpy())
    assert abs(logits[0] - logits[2]).max() < 1e-4
    assert abs(logits[1] - logits[2]).max() < 1e-4


def test_the_last_token_of_a_long_chunk_runs_alone_where_layers_store_no_kv(greedy, monkeypatch):
    """Nothing needs those layers for the other tokens, and MLX runs only what is needed."""
    with polydraft.load("builtin:tiny-e2b", backend="mlx", dtype="float32", device="cpu") as session:
        target, runs = session.engine.target, []
        forward = target._forward
        monkeypatch.setattr(
            target, "_forward", lambda cache, tokens: runs.append(tokens.shape[1]) or forward(cache, tokens)
        )
        for length in (1, 63, 64, 65, 127, 128, 129, 192):
            tokens = LONG[:length]
            got = session.engine.open_sequence().prefill(tokens, greedy, keep_logits=True).logits.numpy()
            assert runs == ([length] if length < 64 else [length - 1, 1])
            runs.clear()
            with session.engine._runtime.use("mlx-lm ran"):
                want = np.array(target.model(mx.array([tokens]))[0, -1:])
            assert abs(got - want).max() < 1e-3, length


def test_weights_stored_by_columns_give_the_same_bits(session, greedy):
    """``lay_by_columns`` changes nothing on other platforms; this test then compares equal layouts."""
    engine = session.engine
    step = engine.open_sequence().prefill(LONG, greedy, keep_logits=True).logits.numpy()
    with engine._runtime.use("A test ran"):
        for module in engine.target.model.modules():
            if "weight" in module:
                module.weight = mx.contiguous(module.weight)
        mx.eval(engine.target.model.parameters())
    assert np.array_equal(engine.open_sequence().prefill(LONG, greedy, keep_logits=True).logits.numpy(), step)


def test_threads_that_did_not_load_it_use_it(session):
    """An ordinary stream of MLX belongs to one thread."""
    wanted = session.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(session.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 3


def test_what_runs_and_what_it_takes(session):
    from mlx.utils import tree_flatten

    running = session.running
    assert (running.backend, running.engine, running.dtype, running.device) == ("mlx", "mlx-lm", "float32", "cpu")
    assert any("Weights take" in note for note in running.notes)
    session.engine.reset_peak_memory()
    session.generate(PROMPT, max_new_tokens=4)
    weights = sum(array.nbytes for _, array in tree_flatten(session.engine.target.model.parameters()))
    assert session.engine.peak_memory_bytes() > weights


def test_processors_and_penalties_reach_drafts_on_the_device(session):
    settings = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0.8, "seed": 3, "banned_token_ids": (300, 301)}
    speculative = session.generate(PROMPT, **settings)
    plain = session.generate(PROMPT, speculate="off", **settings)
    assert speculative.token_ids == plain.token_ids
    assert not {300, 301} & set(speculative.token_ids)


def test_the_experts_of_a_bfloat16_mixture_run_on_the_cpu():
    with polydraft.load("builtin:tiny-26b", backend="mlx", dtype="bfloat16", device="cpu") as loaded:
        assert loaded.running.dtype == "bfloat16"
        assert any("experts run in float32" in note for note in loaded.running.notes)
        assert len(loaded.generate(PROMPT, max_new_tokens=8, ignore_eos=True).token_ids) == 8


def test_products_of_float32_are_seen_to_be_rounded(monkeypatch):
    from polydraft_mlx import resources

    with mx.stream(mx.cpu):
        assert resources.matmul_precision("float32") is None
        assert resources.matmul_precision("bfloat16") is None
        # As TF32 rounds: to 10 bits after the point.
        monkeypatch.setattr(mx, "full", lambda shape, value, dtype: mx.ones(shape, dtype) * round(value * 1024) / 1024)
        assert resources.matmul_precision("float32") == "tf32"
