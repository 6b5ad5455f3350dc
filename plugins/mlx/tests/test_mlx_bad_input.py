"""Bad input: typed errors, before work is lost."""

import json

import polydraft
import pytest
from polydraft.errors import (
    ContextLengthError,
    DeviceError,
    InvalidRequestError,
    ModelFormatError,
    OutOfMemoryError,
    PairMismatchError,
    PolydraftError,
    UnsupportedError,
)

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")


def load(target="builtin:tiny-e2b", **given):
    return polydraft.load(target, backend="mlx", **{"device": "cpu", **given})


def test_a_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(PolydraftError) as found:
        load(file)
    assert not isinstance(found.value, (KeyError, TypeError))
    assert found.value.hint


def test_a_shard_is_missing(copy_of):
    folder = copy_of("tiny-llama")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match="missing"):
        load(folder, drafter="ngram")


def test_a_file_is_cut_short(copy_of):
    folder = copy_of("tiny-llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ModelFormatError, match="cut short"):
        load(folder, drafter="ngram")


def test_a_weight_is_missing(copy_of):
    folder = copy_of("tiny-llama")
    weights = mx.load(str(folder / "model.safetensors"))
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelFormatError, match=r"model\.norm\.weight"):
        load(folder, drafter="ngram")


def test_an_architecture_that_mlx_lm_does_not_know(copy_of):
    with pytest.raises(ModelFormatError, match="not supported"):
        load(copy_of("tiny-llama", model_type="llama9"), drafter="ngram")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load"),
        ({"num_kv_shared_layers": 99}, "cannot load"),
        ({"num_attention_heads": 0}, "cannot load"),
        ({"hidden_activation": "relu"}, "relu"),
    ],
    ids=str,
)
def test_a_target_that_mlx_lm_was_not_written_for(change, words, copy_of):
    with pytest.raises(ModelFormatError, match=words):
        load(copy_of("tiny-e2b", **change), drafter="ngram")


def test_a_checkpoint_without_a_tokenizer(copy_of):
    folder = copy_of("tiny-e2b")
    for file in folder.glob("*token*"):
        file.unlink()
    with load(folder, drafter="builtin:tiny-e2b-assistant") as session:
        assert len(session.generate([2, 300], max_new_tokens=4, ignore_eos=True).token_ids) == 4
        assert any("no tokenizer" in note for note in session.running.notes)
        with pytest.raises(UnsupportedError, match="tokenizer"):
            session.generate("text")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="tokenizer"):
        load(folder, drafter="ngram")


def test_layers_that_cannot_be_rolled_back(copy_of):
    from polydraft_mlx.decoder import Decoder

    class Recurrent:
        """A model with the cache of mlx-lm's state-space models."""

        def make_cache(self):
            from mlx_lm.models.cache import ArraysCache

            return [ArraysCache(2)]

    with pytest.raises(UnsupportedError, match="ArraysCache"):
        Decoder(Recurrent(), "some/mamba", 5)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_a_drafter_quantized_for_others(method, copy_of):
    folder = copy_of("tiny-e2b-assistant", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelFormatError, match=method):
        load(drafter=folder)


def test_a_drafter_whose_packing_is_unknown(copy_of):
    folder = copy_of("tiny-e2b-assistant", quantization={"bits": 4, "group_size": 48})
    weights = mx.load(str(folder / "model.safetensors"))
    weights["pre_projection.weight"] = mx.zeros((96, 40), dtype=mx.uint32)
    weights["pre_projection.scales"] = mx.zeros((96, 7), dtype=mx.uint8)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelFormatError, match="pre_projection"):
        load(drafter=folder)


def test_a_drafter_of_an_unknown_dtype(copy_of):
    folder = copy_of("tiny-e2b-assistant")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole.replace(b'"BF16"', b'"BF99"', 1))
    with pytest.raises(ModelFormatError, match="BF99"):
        load(drafter=folder)


def test_a_centroid_head_with_ids_of_no_tokens(copy_of):
    """MLX does not check the ids, and a row that does not exist ends the process."""
    folder = copy_of("tiny-e2b-assistant")
    weights = mx.load(str(folder / "model.safetensors"))
    weights["masked_embedding.token_ordering"] += 10**6
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelFormatError, match="token_ordering"):
        load(drafter=folder)


@pytest.mark.parametrize("best", [0, 10**6])
def test_a_centroid_head_that_chooses_too_many(best, copy_of):
    with pytest.raises(ModelFormatError, match="centroid_intermediate_top_k"):
        load(drafter=copy_of("tiny-e2b-assistant", centroid_intermediate_top_k=best))


def test_a_drafter_for_another_target():
    with pytest.raises(PairMismatchError):
        load(drafter="builtin:tiny-31b-assistant")


def test_a_context_longer_than_memory(copy_of):
    folder = copy_of("tiny-e2b", max_position_embeddings=2**31 - 1)
    with pytest.raises(OutOfMemoryError, match="context of") as found:
        load(folder, drafter="ngram", context_length=2**31 - 1)
    assert "context_length=" in found.value.hint
    with load(folder, drafter="ngram") as session:  # its own context is as long, but was not asked for
        assert 256 < session.running.context_length < 2**31 - 1
        assert any("shortened" in note for note in session.running.notes)


def test_a_chunk_is_no_longer_than_the_context():
    with load(engine_options={"prefill_chunk_size": 10**9}) as session:
        assert session.running.context_length > 256


def test_memory_that_is_too_small(monkeypatch):
    monkeypatch.setattr("polydraft.hardware.free_memory", lambda: 900_000)
    with pytest.raises(OutOfMemoryError, match="free"):
        load()


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("dtype", "float99", InvalidRequestError),
        ("device", "no-such", DeviceError),
        ("device", "gpu:99", DeviceError),
        ("context_length", 10**9, ContextLengthError),
        ("engine_options", {"prefill_chunk": 1}, InvalidRequestError),
    ],
)
def test_bad_arguments(argument, value, error):
    with pytest.raises(error):
        load(**{argument: value})


def test_a_gpu_where_there_is_none():
    if mx.metal.is_available() or mx.cuda.is_available():
        with load(device="gpu") as session:
            assert session.running.device == "gpu"
        return
    with pytest.raises(DeviceError, match="gpu"):
        load(device="gpu")


def test_mlx_fails_in_the_middle():
    """MLX's errors become typed ones, and the session stays usable."""
    from polydraft.errors import EngineError
    from polydraft_mlx.resources import Runtime

    runtime = Runtime(mx.Device(mx.cpu, 0))
    narrow = mx.zeros((1, 2, 2), dtype=mx.float16)
    mx.eval(narrow)
    with pytest.raises(EngineError, match="A test ran"), runtime.use("A test ran"):
        mx.eval(mx.gather_mm(narrow, narrow, rhs_indices=mx.array([0])))
    with pytest.raises(RuntimeError, match="a processor's own"), runtime.use("A test ran"):
        raise RuntimeError("a processor's own")
    # As Metal says it. On the CPU, mlx 0.32.4 ends the process instead, so memory is checked at load.
    message = "[metal::malloc] Attempting to allocate 40000000000 bytes which is greater than the maximum allowed"
    with pytest.raises(OutOfMemoryError), runtime.use("A test ran"):
        raise RuntimeError(message)
    with runtime.use("A test ran"):
        assert mx.ones((2,)).sum().item() == 2
