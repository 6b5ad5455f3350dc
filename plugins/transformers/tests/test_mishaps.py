"""A failure costs its own call only, and is reported by a typed error."""

import gc
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import polydraft
import pytest
from polydraft.errors import EngineError, ModelFormatError, NonFiniteLogitsError, OutOfMemoryError, UnsupportedError

torch = pytest.importorskip("torch", reason="torch is not installed")
pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

import polydraft_transformers.kv_cache  # noqa: E402
import polydraft_transformers.loading  # noqa: E402
import polydraft_transformers.memory  # noqa: E402
from polydraft.engine_parts.memory import MemoryEstimate  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GraniteConfig, GraniteForCausalLM  # noqa: E402

PROMPT = [2, *range(300, 340)]
LOCAL = {"backend": "transformers", "dtype": "float32", "device": "cpu"}


@pytest.fixture
def session():
    # Nothing is kept between calls: each takes its buffers from those that the last one gave back.
    with polydraft.load("builtin:tiny-e2b", prefix_cache_bytes=0, **LOCAL) as loaded:
        yield loaded


def tokens_of(session, prompt=PROMPT):
    return session.generate(prompt, max_new_tokens=8, ignore_eos=True).token_ids


def copied(name, folder):
    source = pairs.path(name)
    return shutil.copytree(source, folder / name)


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    folder = copied("tiny-llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match="down_proj"):
        polydraft.load(str(folder), drafter=None, **LOCAL)


def test_a_checkpoint_with_a_tensor_of_another_shape(tmp_path):
    folder = copied("tiny-llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match=r"lm_head\.weight \[100, 192\] instead of \[2048, 192\]"):
        polydraft.load(str(folder), drafter=None, **LOCAL)


def test_only_the_models_own_files_are_loaded(tmp_path, monkeypatch):
    """Whatever else is in its folder: Transformers would prefer a stale file to the index, and knows no other names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copied("tiny-llama", tmp_path / "a[1]")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 0 for name, value in weights.items()}, folder / "model.safetensors")
    names = [f"part-{number}.safetensors" for number in (0, 1)]
    for number, name in enumerate(names):
        save_file(dict(list(weights.items())[number::2]), folder / name)
    weight_map = {tensor: names[at % 2] for at, tensor in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "._tokenizer.json").write_bytes(b"\0")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    with polydraft.load("builtin:tiny-llama", **LOCAL) as wanted, polydraft.load(folder, **LOCAL) as loaded:
        assert tokens_of(loaded) == tokens_of(wanted)
        assert loaded.running.target == str(folder)
        note = f"Ignored, as not part of {folder}: adapter_config.json, model.safetensors."
        assert note in loaded.running.notes


def spoilt(name, folder, tensor, row, value):
    """A copy of a built-in model with one other number in a row of a tensor."""
    copy = copied(name, folder)
    weights = load_file(copy / "model.safetensors")
    weights[tensor][row, 5] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def test_a_token_whose_embedding_is_nan(tmp_path):
    """Logits are NaN after it: the error comes there, and does not touch the next call."""
    target = spoilt("tiny-e2b", tmp_path, "model.embed_tokens_per_layer.weight", 1999, torch.nan)
    with polydraft.load(target, drafter="builtin:tiny-e2b-assistant", **LOCAL) as session:
        wanted = tokens_of(session)
        for speculate in ("off", "on"):
            given = {"forced_token_ids": {4: 1999}, "max_new_tokens": 16, "ignore_eos": True, "speculate": speculate}
            stream = session.stream(PROMPT, **given)
            with pytest.raises(NonFiniteLogitsError, match=r"target's logits for position \d+ hold NaN .*float32"):
                list(stream)
            assert stream.result.token_ids == (*wanted[:4], 1999)
        assert tokens_of(session) == wanted


def test_an_infinite_logit_is_seen_behind_the_soft_cap(tmp_path):
    target = spoilt("tiny-e2b", tmp_path, "model.embed_tokens.weight", 1999, torch.inf)
    with polydraft.load(target, drafter=None, **LOCAL) as session, pytest.raises(NonFiniteLogitsError):
        session.generate(PROMPT, max_new_tokens=1)


def test_centroids_that_are_nan_are_the_drafters(tmp_path):
    drafter = spoilt("tiny-e2b-assistant", tmp_path, "masked_embedding.centroids.weight", 3, torch.nan)
    with polydraft.load("builtin:tiny-e2b", drafter=drafter, **LOCAL) as session:
        assert session.generate(PROMPT, max_new_tokens=8, speculate="off").token_ids
        with pytest.raises(NonFiniteLogitsError, match="drafter's logits"):
            session.generate(PROMPT, max_new_tokens=8, ignore_eos=True)


def test_broken_weights_are_named_by_the_check_at_load(tmp_path):
    broken = spoilt("tiny-llama-draft", tmp_path, "model.layers.0.mlp.down_proj.weight", 3, torch.nan)
    with pytest.raises(NonFiniteLogitsError, match="drafter's logits"):
        polydraft.load("builtin:tiny-llama", drafter=broken, **LOCAL)


def test_logits_that_are_scaled_after_the_head(tmp_path):
    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="granite"):
        polydraft.load(str(tmp_path), drafter=None, **LOCAL)


def test_quantized_weights_are_refused_before_they_are_read(tmp_path):
    folder = copied("tiny-llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(polydraft.errors.PolydraftError, match="gptq"):
        polydraft.load(str(folder), drafter=None, **LOCAL)


def test_memory_that_runs_out_in_one_call_does_not_hurt_the_next(session, monkeypatch):
    wanted = tokens_of(session, PROMPT * 10)
    tokens_of(session)
    empty = polydraft_transformers.kv_cache.KvCache._empty

    def full(like, kv_heads, slots, head_dim):
        if slots > 256:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory")
        return empty(like, kv_heads, slots, head_dim)

    session.engine.target._free.clear()
    with monkeypatch.context() as patch:
        patch.setattr(polydraft_transformers.kv_cache.KvCache, "_empty", staticmethod(full))
        with pytest.raises(OutOfMemoryError):
            tokens_of(session, PROMPT * 10)
    assert tokens_of(session, PROMPT * 10) == wanted


def test_what_is_not_finite_in_one_call_does_not_reach_the_next(session):
    wanted = tokens_of(session)
    for keys, values in session.engine.target._free[-1]._buffers.values():
        with torch.inference_mode():
            keys.fill_(torch.nan)
            values.fill_(torch.inf)
    assert tokens_of(session) == wanted


def test_a_failing_forward_spoils_its_cache_only(session, monkeypatch):
    wanted = tokens_of(session)
    target = session.engine.target

    def fail(*_):
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patch:
        patch.setattr(target.network, "run", fail)
        with pytest.raises(EngineError, match="a kernel failed"):
            tokens_of(session)
    assert not target._free
    assert tokens_of(session) == wanted


def test_a_stream_that_is_collected_during_a_forward(session):
    stream = session.stream(PROMPT, max_new_tokens=50, ignore_eos=True)
    next(stream)
    network, run = session.engine.target.network, session.engine.target.network.run
    circle = [stream]
    circle.append(circle)
    del stream

    def collecting(*arguments):
        circle.clear()
        gc.collect()
        return run(*arguments)

    network.run = collecting
    finished = threading.Event()

    def call():
        tokens_of(session)
        finished.set()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert finished.wait(60)
    del network.run


def test_a_cancel_takes_effect_between_the_chunks_of_a_prompt():
    with polydraft.load("builtin:tiny-e2b", **LOCAL, engine_options={"prefill_chunk_size": 8}) as session:
        target = session.engine.target
        chunks = 0
        stream = session.stream(PROMPT * 20, max_new_tokens=4)
        run = target.network.run

        def counting(token_ids, cache):
            nonlocal chunks
            chunks += 1
            if chunks == 3:
                stream.cancel()
            return run(token_ids, cache)

        target.network.run = counting
        list(stream)
        assert chunks == 3
        assert stream.result.finish_reason == "cancelled"


def test_a_short_call_does_not_wait_for_anothers_long_prompt():
    with polydraft.load("builtin:tiny-e2b", **LOCAL, engine_options={"prefill_chunk_size": 16}) as session:
        target = session.engine.target
        run, ended = target.network.run, []

        def slow(token_ids, cache):
            time.sleep(0.02)
            return run(token_ids, cache)

        target.network.run = slow

        def call(name, prompt):
            session.generate(prompt, max_new_tokens=1)
            ended.append(name)

        long = threading.Thread(target=call, args=("long", PROMPT * 60))
        long.start()
        time.sleep(0.1)
        call("short", PROMPT[:4])
        long.join()
        assert ended == ["short", "long"]


def test_caches_of_past_calls_are_few(session):
    barrier = threading.Barrier(6)

    def call():
        barrier.wait()
        tokens_of(session)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(session.engine.target._free) <= 2


def test_weights_are_counted_in_the_dtype_that_they_are_loaded_in(monkeypatch):
    # The file holds bfloat16: float32 takes twice its size, and bfloat16 its size.
    size = (pairs.path("tiny-llama") / "model.safetensors").stat().st_size
    monkeypatch.setattr(polydraft_transformers.memory, "available_memory", lambda _: int(1.5 * size))
    with pytest.raises(OutOfMemoryError, match="weights"):
        polydraft.load("builtin:tiny-llama", drafter=None, **LOCAL)
    polydraft.load("builtin:tiny-llama", drafter=None, **LOCAL | {"dtype": "bfloat16"}).close()


def test_a_context_that_is_larger_than_memory(monkeypatch):
    """Refused before the weights are read."""
    monkeypatch.setattr(polydraft_transformers.loading, "_model", lambda *_: pytest.fail("the weights are read"))
    size = (pairs.path("tiny-llama") / "model.safetensors").stat().st_size
    monkeypatch.setattr(polydraft_transformers.memory, "available_memory", lambda _: 2 * size + (1 << 20))
    with pytest.raises(OutOfMemoryError, match="8192 tokens"):
        polydraft.load("builtin:tiny-llama", drafter=None, context_length=8192, **LOCAL)


@pytest.mark.parametrize("pair", ["tiny-e2b", "tiny-26b"])
def test_memory_is_estimated_before_loading(pair, monkeypatch):
    said = []
    monkeypatch.setattr(MemoryEstimate, "announce", lambda self, *_: said.append(self))
    with polydraft.load(f"builtin:{pair}", context_length=1024, prefix_cache_bytes=0, **LOCAL) as session:
        session.generate([2, *(300 + i % 600 for i in range(999))], max_new_tokens=1)
        engine = session.engine
        modules = engine.target.model, engine.drafter_model
        weights = {one.data_ptr(): one.nbytes for module in modules for one in module.parameters()}
        kv = engine.target._free[0].num_bytes
    (estimate,) = said
    assert estimate.tokens == 1024
    assert estimate.weights == pytest.approx(sum(weights.values()), rel=0.02)
    assert estimate.weights + estimate.kv == pytest.approx(sum(weights.values()) + kv, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_pages_of_a_weight_file_are_let_go_and_its_numbers_stay(tmp_path):
    from polydraft_transformers.resources import drop_pages

    def resident():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssFile"].split()[0]) * 1024

    count, path = 6 << 20, tmp_path / "model.safetensors"
    numbers = torch.arange(count, dtype=torch.float32)
    path.write_bytes(numbers.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=count)
    assert mapped.sum() == numbers.sum()  # now all of it is in memory
    before = resident()
    drop_pages([mapped[100 : count - 100], numbers])
    assert before - resident() > 20 << 20
    assert torch.equal(mapped, numbers)
    assert numbers[-1] == count - 1
