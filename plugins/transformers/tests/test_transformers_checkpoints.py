"""Checkpoints as users have them: sharded, wrapped, untied, damaged, without tokenizer or generation config."""

import json
import shutil

import polydraft
import pytest
from polydraft.errors import InvalidRequestError, ModelFormatError, OutOfMemoryError, UnsupportedError

torch = pytest.importorskip("torch", reason="torch is not installed")
pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

PROMPT = [2, *range(300, 330)]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def copy(tmp_path):
    """Copy a built-in pair into a folder of the user's; returns the target's folder."""

    def make(name="tiny-e2b"):
        for part in (name, f"{name}-assistant"):
            shutil.copytree(pairs.path(part), tmp_path / part.replace(name, "model"))
        return tmp_path / "model"

    return make


def save_again(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    return model, lambda: model.save_pretrained(folder, **options)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def load(folder):
    return polydraft.load(folder, backend="transformers", dtype="float32", device="cpu")


def same_as_transformers(folder, count=16, prompt=PROMPT, kind=transformers.AutoModelForCausalLM):
    """Generate with the pair, compare with Transformers' own ``generate``; returns the result."""
    model = kind.from_pretrained(folder, dtype=torch.float32)
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()
    with load(folder) as session:
        assert session.running.method == "mtp", session.running
        result = session.generate(prompt, max_new_tokens=count)
    assert list(result.token_ids) == wanted
    assert result.stats.num_draft_tokens > 0
    return result


def test_without_tokenizer(copy):
    folder = copy()
    for name in TOKENIZER:
        (folder / name).unlink()
    result = same_as_transformers(folder)
    assert (result.text, result.raw_text) == ("", "")
    assert any("no tokenizer" in note for note in result.running.notes)
    with load(folder) as session:
        assert session.tokenizer.eos_token_ids == {1, 5, 13}
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            session.generate("Hi")
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            session.generate([{"role": "user", "content": "Hi"}])
        with pytest.raises(UnsupportedError, match="Stop strings"):
            session.generate(PROMPT, stop="Hi")
        assert session.generate(PROMPT, stop_token_ids=[result.token_ids[3]]).finish_reason == "stop"


def test_a_damaged_tokenizer(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("content", [[1], {"tokenizer_class": [1]}, {"bos_token": [1]}, {"added_tokens_decoder": [1]}])
def test_a_tokenizer_config_of_wrong_types(copy, content):
    folder = copy()
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match=r"cannot load the tokenizer|tokenizer_config\.json .* holds a list"):
        load(folder)


def test_without_template_and_generation_config(copy):
    folder = copy()
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=[1, 5, 13])
    same_as_transformers(folder)
    with load(folder) as session:
        assert session.tokenizer.eos_token_ids == {1, 5, 13}
        with pytest.raises(UnsupportedError, match="chat template"):
            session.generate([{"role": "user", "content": "Hi"}])


def test_shards(copy):
    folder = copy("tiny-31b")
    save_again(folder, max_shard_size="500KB")[1]()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    same_as_transformers(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ModelFormatError, match=shard.name):
        load(folder)
    shard.unlink()
    with pytest.raises(ModelFormatError, match=shard.name):
        load(folder)


def test_a_head_of_its_own(copy):
    folder = copy()
    model, save = save_again(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    save()
    assert "lm_head.weight" in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    same_as_transformers(folder)


@pytest.mark.parametrize("name", ["tiny-e2b", "tiny-31b"])
def test_a_target_for_images_too(copy, name):
    """As Gemma 4 is published. The token where an image would go is run as padding: so does Transformers."""
    folder = copy(name)
    image, kind = 16, transformers.Gemma4ForConditionalGeneration
    text, _ = save_again(folder)
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=4,
        position_embedding_size=64,
        pooling_kernel_size=2,
    )
    media = {f"{medium}_token_id": image + index for index, medium in enumerate(("image", "audio", "video"))}
    model = kind(transformers.Gemma4Config(text_config=text.config, vision_config=vision, audio_config=None, **media))
    rows = text.model.embed_tokens.weight.data
    rows[image : image + 3] = -3 * rows[PROMPT[1:4]]  # so that it matters
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.generation_config = text.generation_config
    model.save_pretrained(folder)
    same_as_transformers(folder, kind=kind)
    inside = [*PROMPT, image, 301, image + 2]
    result = same_as_transformers(folder, prompt=inside, kind=kind)
    text.save_pretrained(folder)  # where these tokens are like others
    assert same_as_transformers(folder, prompt=inside).token_ids != result.token_ids


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_code_that_a_config_names_is_ignored(copy, field):
    """Transformers would fetch these kernels from the Hub, and run them."""
    folder = copy()
    for part in (folder, folder.with_name("model-assistant")):
        change_config(part, **{field: "somebody/kernel"})
    with load(folder) as session:
        assert len(session.generate(PROMPT, max_new_tokens=4).token_ids) == 4


@pytest.mark.parametrize(("name", "drafter"), [("tiny-31b", "tiny-31b-assistant"), ("tiny-llama", "tiny-llama-draft")])
def test_a_target_with_further_tokens(name, drafter, tmp_path):
    """Its drafter has no rows for them: they are run and chosen, and never drafted."""
    from polydraft_conformance.changed_checkpoints import NEW_TOKENS, more_tokens

    folder = more_tokens(pairs.path(name), tmp_path / "target")
    given = {"backend": "transformers", "dtype": "float32", "device": "cpu"}
    with polydraft.load(folder, drafter=f"builtin:{drafter}", **given) as session:
        new = session.tokenizer.token_id(NEW_TOKENS[1])
        for settings in ({}, {"temperature": 1.0, "seed": 3, "logit_bias": {new: 5.0}}):
            settings.update(max_new_tokens=32, ignore_eos=True, forced_token_ids={3: new})
            speculative = session.generate([*PROMPT, new], **settings)
            assert speculative.token_ids == session.generate([*PROMPT, new], speculate="off", **settings).token_ids
            assert speculative.stats.num_accepted_tokens > 0


def test_more_rows_than_tokens(copy):
    """Ids that the model has and its tokenizer does not are prompts and output like others; they have no text."""
    folder = copy("tiny-31b")
    model, save = save_again(folder)
    model.resize_token_embeddings(2100)
    save()
    shutil.rmtree(folder.with_name("model-assistant"))  # its vocabulary is another one now
    with load(folder) as session:
        assert session.generate([2, 2050, 2099], max_new_tokens=2).prompt_token_ids == (2, 2050, 2099)
        with pytest.raises(InvalidRequestError, match="2100"):
            session.generate([2, 2100])


@pytest.mark.parametrize("size", [900, 2500])
def test_a_draft_model_padded_to_another_size(size, tmp_path):
    """Ids that one of the two models has no rows for are neither drafted nor looked up."""
    folder = tmp_path / "draft"
    shutil.copytree(pairs.path("tiny-llama-draft"), folder)
    model, save = save_again(folder)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[2048:] = 2 * model.get_output_embeddings().weight[0]
    save()
    prompt = [2, 300, 1990, 2047, 302]
    given = {"backend": "transformers", "dtype": "float32", "device": "cpu"}
    with polydraft.load("builtin:tiny-llama", drafter=folder, **given) as session:
        for settings in (
            {},
            {"temperature": 1.5, "seed": 3},
            {"repetition_penalty": 1.2, "banned_token_ids": [1990]},
            {"forced_token_ids": {3: 1999}, "logit_bias": {2000: 5.0}},
        ):
            settings.update(max_new_tokens=32, ignore_eos=True)
            speculative = session.generate(prompt, **settings)
            assert speculative.token_ids == session.generate(prompt, speculate="off", **settings).token_ids
            assert speculative.stats.num_accepted_tokens > 0


def test_too_little_memory(copy, monkeypatch):
    monkeypatch.setattr("polydraft_transformers.memory.available_memory", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match=r"need about .* MiB, and cpu has 1000 bytes free"):
        load(copy())


def test_nothing_is_printed_while_loading(copy, capfd):
    load(copy()).close()
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_tensors_that_the_model_does_not_have_are_not_reported(copy, capfd):
    """Transformers' LOAD REPORT names them."""
    from safetensors.torch import load_file, save_file

    folder = copy()
    save_file({**load_file(folder / "model.safetensors"), "further": torch.ones(3)}, folder / "model.safetensors")
    load(folder).close()
    assert capfd.readouterr().err == ""


def chosen(folder):
    """Greedy tokens, and the notes of the session."""
    with polydraft.load(
        folder, drafter=None, backend="transformers", device="cpu", context_length=128, dtype="float32"
    ) as session:
        result = session.generate([2, *range(300, 330)], max_new_tokens=8, ignore_eos=True)
        return result.token_ids, session.running.notes


@pytest.mark.parametrize("name", ["tiny-31b"])
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
