"""Checkpoints in every common form, made from the built-in ones."""

import json
import shutil

import numpy as np
import polydraft
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

PROMPT = [2, *range(300, 340)]
WANTED = {"max_new_tokens": 16, "ignore_eos": True}


def tokens(target, drafter="auto", **given):
    given = {"dtype": "float32", **given}  # of what is not quantized
    with polydraft.load(target, drafter=drafter, backend="mlx", device="cpu", **given) as session:
        speculative = session.generate(PROMPT, **WANTED)
        plain = session.generate(PROMPT, speculate="off", **WANTED)
        assert speculative.token_ids == plain.token_ids
        return speculative, session.running


def quantize(folder, **given):
    """As mlx_lm.convert does: pack the model, and record it in the config."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model
    from polydraft_mlx.config import overrides

    config = json.loads((folder / "config.json").read_text())
    model, loaded = load_model(folder, model_config=overrides(config, "x"))
    model, loaded = quantize_model(model, loaded, **given)
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    save_config(loaded, folder / "config.json")
    return folder


@pytest.mark.parametrize(
    "given",
    [
        *({"bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)),
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        {"bits": 8, "group_size": 32, "mode": "mxfp8"},
        {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    ],
    ids=lambda given: f"{given.get('mode', 'affine')}-{given['bits']}",
)
def test_quantized_conversions(given, copy_of):
    target = quantize(copy_of("tiny-31b"), **given)
    found, running = tokens(target, "builtin:tiny-31b-assistant")
    assert found.stats.num_draft_tokens > 0
    assert any(f"{given['bits']} bits ({given.get('mode', 'affine')}" in note for note in running.notes)


def test_a_quantized_mixture_of_experts(copy_of):
    found, _ = tokens(
        quantize(copy_of("tiny-26b"), bits=8, group_size=32, quant_predicate=lambda *_: True),
        "builtin:tiny-26b-assistant",
    )
    assert found.stats.num_draft_tokens > 0


def test_eight_bits_choose_nearly_what_the_original_chooses(copy_of, greedy):
    logits = []
    for target in ("builtin:tiny-31b", quantize(copy_of("tiny-31b"), bits=8, group_size=32)):
        with polydraft.load(target, drafter=None, backend="mlx", device="cpu") as session:
            step = session.engine.open_sequence().prefill(PROMPT, greedy, keep_logits=True)
            logits.append(step.logits.numpy()[0])
    assert np.corrcoef(*logits)[0, 1] > 0.99


def test_the_old_layout_of_configs(copy_of):
    new, _ = tokens("builtin:tiny-31b", "builtin:tiny-31b-assistant", dtype="float32")
    folder = copy_of("tiny-31b")
    config = json.loads((folder / "config.json").read_text())
    config.pop("per_layer_config")
    config.update(global_head_dim=64, num_global_key_value_heads=1)
    (folder / "config.json").write_text(json.dumps(config))
    old, _ = tokens(folder, "builtin:tiny-31b-assistant", dtype="float32")
    assert (old.token_ids, old.stats.num_accepted_tokens) == (new.token_ids, new.stats.num_accepted_tokens)


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
@pytest.mark.parametrize("layout", ["transformers", "mlx-vlm"])
def test_the_multimodal_wrapper(model_type, layout, copy_of, tmp_path):
    """The text model's weights have other names; those of other modalities are left out."""
    folder = copy_of("tiny-e2b")
    text = json.loads((folder / "config.json").read_text())
    text.pop("architectures")
    weights = mx.load(str(folder / "model.safetensors"))
    prefix = {"transformers": "model.language_model.", "mlx-vlm": "language_model.model."}[layout]
    named = {prefix + name.removeprefix("model."): value for name, value in weights.items()}
    tower = {"transformers": "model.vision_tower.", "mlx-vlm": "vision_tower."}[layout]
    named[f"{tower}encoder.layers.0.weight"] = mx.zeros((4, 4))
    mx.save_safetensors(str(folder / "model.safetensors"), named, metadata={"format": "pt"})
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": model_type,
        "text_config": text,
        "vision_config": {"model_type": "gemma4_vision"},
        "eos_token_id": [1, 106],
    }
    (folder / "config.json").write_text(json.dumps(config))
    drafter = copy_of("tiny-e2b-assistant", model_type=f"{model_type}_assistant")
    wanted, _ = tokens("builtin:tiny-e2b", dtype="float32")
    found, running = tokens(folder, drafter, dtype="float32")
    assert running.method == "mtp"
    assert found.token_ids == wanted.token_ids
    assert found.stats.num_accepted_tokens == wanted.stats.num_accepted_tokens


def test_shards(copy_of):
    folder = copy_of("tiny-llama")
    weights = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = names[number - 1 :: 2]
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    wanted, _ = tokens("builtin:tiny-llama", drafter="ngram", dtype="float32")
    found, _ = tokens(folder, drafter="ngram", dtype="float32")
    assert found.token_ids == wanted.token_ids


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tiny-e2b-assistant", {"bits": 8, "group_size": 32}),
        ("tiny-31b-assistant", {"bits": 4, "group_size": 32}),
        ("tiny-e2b-assistant", {"bits": 8, "group_size": 32, "mode": "mxfp8"}),
    ],
    ids=str,
)
def test_a_quantized_drafter(name, given, copy_of):
    """The centroid head reads rows of the packed table."""
    from mlx.utils import tree_flatten
    from polydraft.checkpoints._names import KnownNames
    from polydraft.checkpoints._resolve import resolve
    from polydraft_mlx.assistant import load_assistant

    target = f"builtin:{name.removesuffix('-assistant')}"
    folder = copy_of(name, folder="quantized")
    network = load_assistant(resolve(pairs.path(name), role="drafter", known=KnownNames()), pairs.path(name), None)
    from mlx import nn

    nn.quantize(
        network,
        **given,
        class_predicate=lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0,
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())), {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": given}))
    found, _ = tokens(target, folder)
    original, _ = tokens(target)
    assert found.token_ids == original.token_ids
    assert found.stats.num_accepted_tokens >= original.stats.num_accepted_tokens // 2 > 0


@pytest.mark.parametrize("size", [900, 2500])
def test_a_draft_model_padded_to_another_size(size, copy_of):
    """Ids for which one of the two models has no row are neither drafted nor looked up."""
    folder = copy_of("tiny-llama-draft", vocab_size=size)
    weights = mx.load(str(folder / "model.safetensors"))
    for name, value in weights.items():
        if value.shape[0] == 2048:
            again = mx.broadcast_to(value[:1] * 2, (max(size - 2048, 0), value.shape[1]))
            weights[name] = mx.concatenate([value, again])[:size]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    prompt = [2, 300, 1990, 2047, 302]
    with polydraft.load("builtin:tiny-llama", drafter=folder, backend="mlx", dtype="float32", device="cpu") as session:
        for given in (
            {},
            {"temperature": 1.5, "seed": 3},
            {"repetition_penalty": 1.2, "banned_token_ids": [1990]},
            {"forced_token_ids": {3: 1999}, "logit_bias": {2000: 5.0}},
        ):
            settings = {"max_new_tokens": 32, "ignore_eos": True, **given}
            speculative = session.generate(prompt, **settings)
            assert speculative.token_ids == session.generate(prompt, speculate="off", **settings).token_ids
            assert speculative.stats.num_accepted_tokens > 0


def test_a_gemma_without_drafter_speculates_with_ngrams(copy_of):
    folder = copy_of("tiny-e2b", folder="alone")
    shutil.rmtree(folder.parent / "tiny-e2b", ignore_errors=True)
    _, running = tokens(folder, drafter="ngram")
    assert running.method == "ngram"


@pytest.mark.parametrize(("name", "drafter"), [("tiny-31b", "tiny-31b-assistant"), ("tiny-llama", "tiny-llama-draft")])
def test_a_target_with_further_tokens(name, drafter, tmp_path):
    """Its drafter has no rows for them: they are run and chosen, and never drafted."""
    from polydraft_conformance.changed_checkpoints import NEW_TOKENS, more_tokens

    folder = more_tokens(pairs.path(name), tmp_path / "target")
    given = {"backend": "mlx", "dtype": "float32", "device": "cpu", "context_length": 256}
    with polydraft.load(folder, drafter=f"builtin:{drafter}", **given) as session:
        new = session.tokenizer.token_id(NEW_TOKENS[1])
        for settings in ({}, {"temperature": 1.0, "seed": 3, "logit_bias": {new: 5.0}}):
            settings.update(max_new_tokens=32, ignore_eos=True, forced_token_ids={3: new})
            speculative = session.generate([*PROMPT, new], **settings)
            assert speculative.token_ids == session.generate([*PROMPT, new], speculate="off", **settings).token_ids
            assert speculative.stats.num_accepted_tokens > 0


def test_only_the_models_own_files_are_loaded(copy_of, tmp_path, monkeypatch):
    """Whatever else lies in its folder: mlx-lm would load every model*.safetensors, and none below a ``[``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drafter = copy_of("tiny-llama-draft", "d[1]")
    folder = copy_of("tiny-llama", "m[1]")
    for other in (folder, drafter):
        weights = mx.load(str(other / "model.safetensors"))
        zeros = {name: mx.zeros_like(value) for name, value in weights.items()}
        mx.save_safetensors(str(other / "model-00002-of-00002.safetensors"), zeros)
        (other / "._model.safetensors").write_bytes(b"")
    found, running = tokens(folder, drafter)
    wanted, _ = tokens("builtin:tiny-llama")
    assert found.token_ids == wanted.token_ids
    assert found.stats.num_accepted_tokens == wanted.stats.num_accepted_tokens
    assert running.target == str(folder)
    assert f"Ignored, as not part of {drafter}: model-00002-of-00002.safetensors." in running.notes


def chosen(folder):
    """Greedy tokens, and the notes of the session."""
    with polydraft.load(
        folder, drafter=None, backend="mlx", device="cpu", context_length=128, dtype="float32"
    ) as session:
        result = session.generate([2, *range(300, 330)], max_new_tokens=8, ignore_eos=True)
        return result.token_ids, session.running.notes


@pytest.mark.parametrize("name", ["tiny-31b", "tiny-llama"])
def test_the_weights_decide_whether_the_head_is_the_embedding(name, tmp_path):
    """Whatever ``tie_word_embeddings`` says, and a note tells it."""
    from polydraft_conformance.changed_checkpoints import change_config, own_head

    found, notes = {}, {}
    for case, equal, tied in (("untied", False, False), ("hidden", False, True), ("equal", True, True)):
        folder = own_head(pairs.path(name), tmp_path / case, equal=equal, tied=tied)
        found[case], notes[case] = chosen(folder)
    folder = tmp_path / "none"
    shutil.copytree(pairs.path(name), folder)
    change_config(folder, tie_word_embeddings=False)
    found["none"], notes["none"] = chosen(folder)
    assert found["untied"] == found["hidden"] != found["equal"] == found["none"]
    said = {case: [note for note in notes[case] if "output head" in note] for case in notes}
    assert [len(said[case]) for case in ("untied", "hidden", "equal", "none")] == [0, 1, 1, 1]
