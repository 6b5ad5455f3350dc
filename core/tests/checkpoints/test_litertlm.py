"""Headers of ``.litertlm`` files: what they say, and what is refused."""

import json
import random
from contextlib import suppress

import pytest
from litertlm_writer import METADATA, SECTIONS, litertlm, tflite
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve
from polydraft.checkpoints.litertlm import DRAFTER_INSIDE, read_litertlm, read_section
from polydraft.checkpoints.litertlm_files import choose_file
from polydraft.errors import ModelFormatError

WITHOUT_DRAFTER = SECTIONS[:2]
HUGE = 2**63


@pytest.fixture
def write(tmp_path):
    def write(data, name="m.litertlm"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def test_what_a_file_says(write):
    found = read_litertlm(write(litertlm()))
    assert (found.version, found.has_drafter, found.num_speculative_tokens) == ((1, 5, 0), True, 4)
    assert (found.cache_length, found.weights_dtype) == (512, "int8")
    said = found.metadata
    assert (said.start_token, said.stop_tokens) == ("<bos>", ((1,), (106, 10), "<turn|>"))
    assert (said.max_num_tokens, said.model_type, said.chat_template) == (480, "gemma4", "{{ messages }}")
    assert said.affixes == {"user": ("U:", "\n"), "model": ("M:", "")}
    assert said.min_runtime_version == "0.11.0"
    section = found.section("metadata")
    assert read_section(found, section) == METADATA
    assert found.section("hf_tokenizer", "sentencepiece") is None


def test_its_config(write):
    drafter = {"kind": "mtp", "num_speculative_tokens": 4}
    config = {"model_type": "gemma4", "max_position_embeddings": 480, DRAFTER_INSIDE: drafter}
    path = write(litertlm())
    for name in (path, path.parent):
        source = resolve(name, known=KnownNames())
        assert (source.format, source.config) == ("litertlm", config)
    without_suffix = path.rename(path.with_name("sha256-0"))
    assert resolve(without_suffix, known=KnownNames()).config == config
    plain = resolve(write(litertlm(WITHOUT_DRAFTER)), known=KnownNames())
    assert DRAFTER_INSIDE not in plain.config


def test_a_config_next_to_it_says_nothing_of_its_drafter(write):
    path = write(litertlm(WITHOUT_DRAFTER))
    (path.parent / "config.json").write_text(json.dumps({"vocab_size": 9, DRAFTER_INSIDE: {"kind": 7}}))
    config = resolve(path.parent, known=KnownNames()).config
    assert config == {"vocab_size": 9, "model_type": "gemma4", "max_position_embeddings": 480}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a LiteRT-LM file"),
        (b"version https://git-lfs", "not a LiteRT-LM file"),
        (b"LITERTLM", "cut short: it has 8 of 32 bytes"),
        (litertlm(version=(2, 0, 0)), r"version 2\.0\.0"),
        (litertlm(version=(0, 9, 1)), r"version 0\.9\.1"),
        (litertlm()[:200], "cut short"),
        (litertlm()[:-1], "cut short"),
        (litertlm(header_end=HUGE), "cut short"),
        (litertlm(header_end=2**64 - 1), "cut short"),
        (litertlm(header_end=0), "damaged: its header ends at byte 0"),
        (litertlm(header_end=32), "damaged: its header ends at byte 32"),
        (litertlm(header_end=40), "damaged: its header cannot be read"),
        (litertlm(places={0: (16384, HUGE)}), "cut short"),
        (litertlm(places={1: (HUGE, 2**64 - 1)}), "cut short"),
        (litertlm(places={0: (17000, 16384)}), "damaged: a section goes from byte 17000 to 16384"),
        (litertlm(places={0: (16384, 16384)}), "damaged: a section"),
        (litertlm(places={0: (0, 64)}), "damaged: a section"),
        (litertlm(SECTIONS[:1]), "holds no language model"),
        (litertlm([]), "holds no language model"),
        (litertlm([(3, {"model_type": "tf_lite_prefill_decode"}, b"\xff" * 64)]), "its model cannot be read"),
    ],
)
def test_what_is_refused_before_an_engine_is_made(write, data, message):
    with pytest.raises(ModelFormatError, match=message):
        resolve(write(data), known=KnownNames())


def test_damage_anywhere_is_a_typed_error_or_none(write):
    """Bytes are changed in the header, the metadata and the model: offsets and lengths among them."""
    whole, dice = litertlm(), random.Random(5)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 8))):
            place = dice.choice((dice.randrange(32, 700), dice.randrange(16384, len(data))))
            data[place] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        with suppress(ModelFormatError):
            read_litertlm(write(bytes(data)))


def test_a_list_that_claims_to_be_longer_than_any_model(write):
    model = bytearray(tflite())
    at = model.index(b"\x02\x00\x00\x00", 60)
    model[at : at + 4] = b"\xff\xff\xff\x7f"
    sections = [(3, {"model_type": "tf_lite_prefill_decode"}, bytes(model))]
    with pytest.raises(ModelFormatError, match="its model cannot be read"):
        read_litertlm(write(litertlm(sections)))


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["m.litertlm", "README.md"], None, "m.litertlm"),
        (["gemma-4-E2B-it.litertlm", "gemma-4-E2B-it_qualcomm_sm8750.litertlm"], None, "gemma-4-E2B-it.litertlm"),
        (["a.litertlm", "sub/b.litertlm"], "b.litertlm", "sub/b.litertlm"),
        (["a-web.litertlm", "b.litertlm"], "*web*", "a-web.litertlm"),
    ],
)
def test_the_file_of_a_repository(names, wanted, chosen):
    assert choose_file(names, wanted, "litert-community/gemma-4-E2B-it-litert-lm") == chosen


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        ([], None, "no LiteRT-LM file; there are: none"),
        (["a.litertlm", "b.litertlm"], None, "2 models that fit: a.litertlm, b.litertlm"),
        (["a.litertlm"], "c.litertlm", "no LiteRT-LM file 'c.litertlm'; there are: a.litertlm"),
    ],
)
def test_a_file_that_is_not_certain(names, wanted, message):
    with pytest.raises(ModelFormatError, match=message):
        choose_file(names, wanted, "org/name")
