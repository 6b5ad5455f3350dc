"""The pairs: the core's list is complete and well formed; the user's file comes first and is checked."""

import pytest
from polydraft._plugins import PluginHost
from polydraft._registry.pairs import PairRegistry, base_name
from polydraft._registry.tables import core_table, expand
from polydraft.contract import BackendRecord, PairRecord, hookimpl
from polydraft.errors import InvalidRequestError

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def registry():
    return PairRegistry.of(PluginHost({}))


def drafters(registry, target, **options):
    return [entry.pair.drafter for entry in registry.find(target, **options)]


# --- the core's list -------------------------------------------------------------------------------------------------
SIZES = ["E2B", "E4B", "12B", "26B-A4B", "31B"]


@pytest.mark.parametrize("size", SIZES)
def test_gemma_4(registry, size):
    first = registry.find(f"google/gemma-4-{size}-it")[0]
    assert first.pair.drafter == f"google/gemma-4-{size}-it-assistant"
    assert (first.pair.kind, first.pair.format, first.origin) == ("mtp", "safetensors", "core")
    assert first.num_speculative_tokens("anything") == (2 if size == "E2B" else 4)
    assert first.pair.k_source


@pytest.mark.parametrize("size", ["e2b", "e4b", "12B", "26b-a4b", "31b"])
@pytest.mark.parametrize("quant", ["bf16", "8bit", "6bit", "5bit", "4bit", "mxfp8", "mxfp4", "nvfp4"])
def test_gemma_4_mlx(registry, size, quant):
    (entry,) = registry.find(f"mlx-community/gemma-4-{size}-it-{quant}")
    assert entry.pair.drafter.lower() == f"mlx-community/gemma-4-{size}-it-assistant-bf16".lower()
    assert (entry.pair.kind, entry.pair.format) == ("mtp", "mlx")


@pytest.mark.parametrize(
    ("target", "file"),
    [
        *((f"unsloth/gemma-4-{s}-it-GGUF", f"MTP/mtp-gemma-4-{s}-it-BF16.gguf") for s in SIZES if s != "12B"),
        ("unsloth/gemma-4-12b-it-GGUF", "MTP/mtp-gemma-4-12[bB]-it-BF16.gguf"),
        *((f"google/gemma-4-{s}-it-qat-q4_0-gguf", f"mtp-gemma-4-{s}-it.gguf") for s in SIZES),
        *((f"unsloth/gemma-4-{s}-it-qat-GGUF", f"mtp-gemma-4-{s}-it.gguf") for s in SIZES if s != "26B-A4B"),
    ],
)
def test_gemma_4_gguf(registry, target, file):
    (entry,) = registry.find(target)
    assert (entry.pair.drafter, entry.pair.drafter_file) == (target, file)
    assert (entry.pair.kind, entry.pair.format) == ("mtp", "gguf")


@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_gemma_4_litert(registry, size):
    (entry,) = registry.find(f"litert-community/gemma-4-{size}-it-litert-lm")
    assert (entry.pair.drafter, entry.pair.kind, entry.pair.format) == (None, "mtp", "litertlm")


@pytest.mark.parametrize(
    ("target", "drafter", "kind"),
    [
        ("google/gemma-4-31B-it", "RedHatAI/gemma-4-31B-it-speculator.eagle3", "eagle3"),
        ("google/gemma-4-31B-it", "RedHatAI/gemma-4-31B-it-speculator.dflash", "dflash"),
        ("google/gemma-4-31B-it", "z-lab/gemma-4-31B-it-DFlash", "dflash"),
        ("google/gemma-4-26B-A4B-it", "RedHatAI/gemma-4-26B-A4B-it-speculator.eagle3", "eagle3"),
        ("google/gemma-4-26B-A4B-it", "z-lab/gemma-4-26B-A4B-it-DFlash", "dflash"),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B", "draft-model"),
        ("Qwen/Qwen3-32B", "Qwen/Qwen3-0.6B", "draft-model"),
        ("Qwen/Qwen3-8B", "RedHatAI/Qwen3-8B-speculator.eagle3", "eagle3"),
        ("Qwen/Qwen3-32B", "RedHatAI/Qwen3-32B-speculator.eagle3", "eagle3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3", "eagle3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "eagle3"),
        ("meta-llama/Llama-3.3-70B-Instruct", "RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3", "eagle3"),
        ("openai/gpt-oss-20b", "RedHatAI/gpt-oss-20b-speculator.eagle3", "eagle3"),
    ],
)
def test_other_pairs(registry, target, drafter, kind):
    assert (drafter, kind) in [(entry.pair.drafter, entry.pair.kind) for entry in registry.find(target)]


def test_every_entry_is_concrete(registry):
    for entry in registry.entries:
        assert "{" not in f"{entry.pair.target}{entry.pair.drafter}{entry.pair.drafter_file}"
    assert len({(e.pair.target, e.pair.drafter, e.pair.kind) for e in registry.entries}) == len(registry.entries)
    assert core_table("pair"), "the data file is shipped"


# --- look-up ---------------------------------------------------------------------------------------------------------
def test_letter_case(registry):
    assert drafters(registry, "GOOGLE/gemma-4-e4b-IT")[0] == "google/gemma-4-E4B-it-assistant"


@pytest.mark.parametrize(
    "name",
    [
        "google/gemma-4-E2B-it",
        "mlx-community/gemma-4-e2b-it-4bit",
        "unsloth/gemma-4-E2B-it-qat-GGUF",
        "google/gemma-4-E2B-it-qat-q4_0-gguf",
        "org/gemma-4-E2B-it-unsloth-bnb-4bit",
        "org/gemma-4-E2B-it-FP8-Dynamic",
        "org/gemma-4-E2B-it-quantized.w4a16",
        "org/gemma-4-e2b-it-UD-MLX-4bit",
        "org/gemma-4-E2B-it-GGUF:Q4_K_M",
        "gemma-4-E2B-it",
    ],
)
def test_base_name(name):
    assert base_name(name) == "gemma-4-e2b-it"


@pytest.mark.parametrize("name", ["google/gemma-4-E2B", "org/my-gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"])
def test_other_models_are_not_variants(name, registry):
    assert base_name(name) != "gemma-4-e2b-it"
    assert registry.find(name) == []


def test_variants_are_of_the_same_format(registry):
    assert drafters(registry, "me/gemma-4-E4B-it-AWQ", format="safetensors") == ["google/gemma-4-E4B-it-assistant"]
    assert drafters(registry, "me/gemma-4-E4B-it-OptiQ-4bit", format="mlx") == [
        "mlx-community/gemma-4-E4B-it-assistant-bf16"
    ]
    assert all(entry.variant for entry in registry.find("me/gemma-4-E4B-it-AWQ"))
    assert not any(entry.variant for entry in registry.find("google/gemma-4-E4B-it"))


def test_unknown_target(registry):
    assert registry.find("someone/else") == []
    assert registry.find("builtin:nothing") == []


# --- groups ----------------------------------------------------------------------------------------------------------
def test_expand():
    assert list(expand("a", None)) == [("a", None)]
    assert list(expand("t-{1,2}", "d-{x, y}")) == [("t-1", "d-x"), ("t-2", "d-y")]
    with pytest.raises(ValueError, match="one"):
        list(expand("{a,b}-{c,d}"))
    with pytest.raises(ValueError, match="equally many"):
        list(expand("{a,b}", "{c,d,e}"))


# --- order: user, plugin, core ---------------------------------------------------------------------------------------
class Plugin:
    @hookimpl
    def polydraft_pairs(self):
        yield PairRecord(target="google/gemma-4-E4B-it", drafter="plugin/{a,b}", kind="draft-model")

    @hookimpl
    def polydraft_backends(self):
        yield BackendRecord(
            name="b",
            factory="a:b",
            summary="",
            formats={"x"},
            drafter_kinds={"ngram"},
            engine="b",
            install_hint="b",
        )


USER = """
# mine
[[pair]]
target = "google/gemma-4-E4B-it"
drafter = "user/one"
kind = "draft-model"
num_speculative_tokens = { transformers = 7, "*" = 3 }

[[pair]]
target = "google/gemma-4-E2B-it"
kind = "ngram"
"""


def test_order(tmp_path):
    named = tmp_path / "mine.toml"
    named.write_text(USER)
    default = tmp_path / "config-home/polydraft/pairs.toml"
    default.parent.mkdir(parents=True)
    default.write_text(USER.replace("user/one", "user/two"))
    registry = PairRegistry.of(PluginHost({"p": Plugin}), environ={"POLYDRAFT_PAIRS": str(named)})
    found = registry.find("google/gemma-4-E4B-it")
    assert [(entry.pair.drafter, entry.origin) for entry in found] == [
        ("user/one", "user"),
        ("user/two", "user"),
        ("plugin/a", "plugin"),
        ("plugin/b", "plugin"),
        ("google/gemma-4-E4B-it-assistant", "core"),
    ]
    assert found[0].source == str(named)
    assert found[2].source == "p"
    assert [found[0].num_speculative_tokens(name) for name in ("transformers", "vllm")] == [7, 3]
    assert found[2].num_speculative_tokens("vllm") is None
    assert registry.find("google/gemma-4-E2B-it")[0].pair.kind == "ngram"


def test_environment_variable_is_read(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(USER)
    monkeypatch.setenv("POLYDRAFT_PAIRS", str(tmp_path / "mine.toml"))
    assert drafters(PairRegistry.of(PluginHost({})), "google/gemma-4-E4B-it")[0] == "user/one"
    monkeypatch.setenv("POLYDRAFT_PAIRS", "")
    assert drafters(PairRegistry.of(PluginHost({})), "google/gemma-4-E4B-it")[0].startswith("google/")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[pair]]\ntarget = \n", "not valid TOML: .*line 2"),
        ('[[pair]]\ntarget = "a/b"\n', r"line 1: \[\[pair\]\] number 1 is wrong: kind: Field required"),
        (
            '[[pair]]\ntarget="a"\nkind="ngram"\n\n[[pair]]\ntarget="a"\nkind="magic"\n',
            r"line 5: \[\[pair\]\] number 2 is wrong: kind: Input should be",
        ),
        ('[[pair]]\ntarget="a"\nkind="ngram"\ndraftr="x"\n', "draftr: Extra inputs"),
        ('[[pair]]\ntarget="a"\nkind="mtp"\nnum_speculative_tokens=4\n', "num_speculative_tokens"),
        ('[[pair]]\ntarget="a"\nkind="ngram"\nnum_speculative_tokens={"*"=0}\n', "recommends 0 tokens"),
        ('[[pair]]\ntarget="a"\nkind="mtp"\nmin_versions={x="latest"}\n', "'latest'"),
        ('[[pairs]]\ntarget="a"\n', "holds 'pairs'"),
        ("pair = 3\n", "not a list of tables"),
        ('[[pair]]\ntarget="{a,b}{c,d}"\nkind="ngram"\n', "one {A,B} group"),
    ],
)
def test_broken_user_file(tmp_path, content, said):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match=said) as error:
        PairRegistry.of(PluginHost({}), environ={"POLYDRAFT_PAIRS": str(path)})
    assert str(path) in error.value.message
    assert error.value.hint


def test_user_file_that_is_not_there(tmp_path):
    with pytest.raises(InvalidRequestError, match="POLYDRAFT_PAIRS names"):
        PairRegistry.of(PluginHost({}), environ={"POLYDRAFT_PAIRS": str(tmp_path / "none")})


def test_user_file_that_is_no_text(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        PairRegistry.of(PluginHost({}), environ={"POLYDRAFT_PAIRS": str(tmp_path / "mine.toml")})
