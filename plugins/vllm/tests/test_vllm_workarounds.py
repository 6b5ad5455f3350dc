"""Each workaround is needed, and works. A test here fails once upstream no longer needs one."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet
from polydraft.errors import ModelFormatError
from polydraft_vllm.versions import installed_vllm

pytest.importorskip("vllm")

from polydraft_vllm import older_models, patches, seeds
from polydraft_vllm.workarounds import WORKAROUNDS

# In a process of its own: a workaround stays applied, and this engine must never have had one.
BARE = """
import warnings; warnings.simplefilter("ignore")
import sys
from polydraft_vllm.environment import prepare_environment
prepare_environment(cpu=True)
import polydraft_vllm.workarounds as workarounds
ALL = workarounds.WORKAROUNDS
workarounds.WORKAROUNDS = ()

def main():
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    # What gives kernels their CPU versions; before 0.31 a method of the runner, which does not look at it.
    replace_kernels = current_platform.register_triton_kernel_overrides or (
        lambda: CPUModelRunner._postprocess_triton(None)  # before 0.31 platforms answer None to unknown names
    )
    replace_kernels()
    workarounds.apply_workarounds()
    from polydraft_vllm.self_test import sampling_fault
    print("FAULT:", sampling_fault())

    import torch
    from types import SimpleNamespace
    from vllm.v1.sample import rejection_sampler
    settings = SimpleNamespace(all_greedy=False, temperature=torch.ones(1), top_k=torch.tensor([3]), top_p=None)
    try:
        rejection_sampler.apply_sampling_constraints(torch.empty(0, 8), torch.zeros(1, dtype=torch.int32), settings)
        print("NO ROWS ARE FINE")
    except (RuntimeError, TypeError) as error:
        print("NO ROWS:", error)

    from vllm.model_executor.layers.vocab_parallel_embedding import get_masked_input_and_mask
    from vllm.v1.sample.sampler import batched_count_greater_than
    for function in (batched_count_greater_than, get_masked_input_and_mask):
        print("COMPILED:", hasattr(function, "_torchdynamo_orig_callable"))

    import numba
    try:
        replace_kernels()
        print("REGISTERED")
    except AttributeError as error:
        print("DIED:", error)

    import polydraft
    workarounds.WORKAROUNDS = tuple(one for one in ALL if one.name not in ("cpu-centroid-head", "cpu-seeds"))
    options = {"kv_cache_memory_bytes": 1 << 26, "max_num_batched_tokens": 64}
    with polydraft.load("builtin:tiny-e2b", backend="vllm", dtype="float32", drafter=None, context_length=512,
                        engine_options=options) as session:
        try:
            session.generate("def f(x):\\n" * 20, temperature=1.0, seed=1, max_new_tokens=2)
            print("SEEDS ARE FINE")
        except polydraft.errors.EngineError as error:
            print("SEEDS:", error)
    polydraft.load("builtin:tiny-e2b", backend="vllm", dtype="float32", num_speculative_tokens=2,
                   context_length=512, engine_options={"kv_cache_memory_bytes": 1 << 26}).close()
    print("STARTED")

if __name__ == "__main__":
    main()
"""


def needed(name):
    """Skip the test unless the installed version needs the workaround."""
    versions = next(one.versions for one in WORKAROUNDS if one.name == name)
    if installed_vllm().release not in SpecifierSet(versions):
        pytest.skip(f"{name} is for {versions}")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """What the bare engine said."""
    script = tmp_path_factory.mktemp("bare") / "script.py"
    script.write_text(BARE)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
    return done.stdout + done.stderr[-3000:]


def test_upstream_still_samples_wrongly(bare):
    assert "FAULT: None" not in bare, "vLLM samples correctly now: the workaround cpu-sampling can go for this version."
    assert "FAULT: " in bare


def test_upstream_still_dies_of_a_step_without_drafts(bare):
    assert "NO ROWS ARE FINE" not in bare, "Steps without drafts take a top_k now: the workaround cpu-top-k can go."
    assert "NO ROWS: max()" in bare or "NO ROWS: Cannot inspect" in bare  # 0.30: see cpu-kernels-of-the-verifier


def test_upstream_still_dies_of_a_seed_and_a_prompt_in_parts(bare):
    assert "SEEDS ARE FINE" not in bare, "Prompts in parts take a seed now: the workaround cpu-seeds can go."
    assert "CPU Generator does not use offset" in bare


def test_upstream_still_compiles_small_functions(bare):
    says = "vLLM compiles fewer of its functions in eager mode: the workaround cpu-compiled-helpers is to be cut."
    assert bare.count("COMPILED: True") == 2, says


def test_upstream_still_starts_no_engine_after_numba(bare):
    needed("cpu-kernels-after-numba")
    assert "REGISTERED" not in bare, "Engines start after numba now: the workaround cpu-kernels-after-numba can go."
    assert "DIED: '_lib_fn_wrapper'" in bare


def test_upstream_still_dies_of_a_centroid_head(bare):
    """With the workaround it runs: the shared session of these tests has such a drafter."""
    assert "STARTED" not in bare, "Centroid heads start on CPU now: the workaround cpu-centroid-head can go."
    assert "CUDAGraph" in bare


def test_with_the_workarounds_it_samples_correctly_and_starts_after_numba(mtp):
    import numba  # noqa: F401
    from polydraft_vllm.self_test import sampling_fault
    from vllm.platforms import current_platform

    if register := current_platform.register_triton_kernel_overrides:
        register()
    assert sampling_fault() is None


def test_with_the_workarounds_logprobs_need_no_compiler(mtp):
    """The helper is vLLM's own, uncompiled."""
    import torch
    from vllm.v1.sample import sampler

    assert not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")
    logits = torch.tensor([[0.5, 0.1, 0.9]])
    assert sampler.batched_count_greater_than(logits, torch.tensor([[0.5]])).tolist() == [2]
    assert len(mtp.generate("def f(x):\n", max_new_tokens=4, logprobs=2).logprobs) == 4


def test_expanded_values():
    import torch
    from polydraft_vllm.workarounds import expand_batch_to_tokens

    values, ends = torch.tensor([0.0, 0.7, 1.0]), torch.tensor([2, 2, 5], dtype=torch.int32)
    found = expand_batch_to_tokens(values, ends, 5, replace_from=0, replace_to=1)
    assert found.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]
    assert expand_batch_to_tokens(torch.tensor([3, 9], dtype=torch.int32), torch.tensor([1, 3]), 3).tolist() == [
        3,
        9,
        9,
    ]
    assert expand_batch_to_tokens(values, ends, 5).dtype == values.dtype


def test_upstream_still_counts_no_infinities(mtp):
    needed("nan-counts")
    import torch
    from polydraft_vllm.patches import upstream

    count = upstream("vllm.v1.worker.gpu_model_runner.count_nans_per_row")
    assert count(torch.tensor([[0.0, torch.nan], [0.0, torch.inf]])).tolist() == [1, 0]


def test_tokens_before_the_first_bad_row_are_counted():
    import torch
    from polydraft_vllm.soundness import unsound_tokens

    nan, inf = torch.nan, torch.inf
    tokens = torch.tensor([[5], [6], [7]])
    assert unsound_tokens(torch.tensor([1.0, nan, -inf]), tokens != -1, None).tolist() == [0, 1, 1]
    # Three requests with three, one and two rows. A bad row behind the emitted tokens is that of a rejected draft.
    largest = torch.tensor([1.0, 1.0, inf, 2.0, 1.0, nan])
    tokens = torch.tensor([[5, 6, -1], [7, -1, -1], [8, 9, -1]])
    assert unsound_tokens(largest, tokens != -1, torch.tensor([3, 4, 6])).tolist() == [0, 0, 2]
    tokens[0, 2] = 3
    assert unsound_tokens(largest, tokens != -1, torch.tensor([3, 4, 6])).tolist() == [3, 0, 2]


@pytest.mark.parametrize("counted", [True, False])
def test_rows_of_drafts_are_counted_for_their_own_request_on_gpus(monkeypatch, counted):
    """The second model runner's samplers, which need a GPU; stood in for by one that only gives tokens."""
    import torch
    from polydraft_vllm import soundness

    own = torch.arange(6) if counted else None
    tokens = torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 0]])
    num_sampled, seen = torch.tensor([2, 1, 2], dtype=torch.int32), []

    def spoil(self, logits, input_batch, *further):
        seen.append(further)
        logits.zero_()
        return SimpleNamespace(sampled_token_ids=tokens, num_sampled=num_sampled, num_nans=own)

    batch = SimpleNamespace(cu_num_logits=torch.tensor([0, 3, 4, 6], dtype=torch.int32))
    monkeypatch.setitem(patches._originals, soundness.REJECTION_SAMPLER, spoil)
    logits = torch.zeros(6, 8)
    logits[1, 3], logits[2, 0], logits[5, 7] = torch.nan, torch.inf, torch.inf
    found = soundness.verify_rows(None, logits, batch, "drafts").num_nans
    assert seen == [("drafts",)]
    assert (None if found is None else found.tolist()) == ([2, 0, 2] if counted else None)
    # A chunk of a prompt gives no token.
    batch.cu_num_logits, tokens, num_sampled = torch.arange(3), torch.tensor([[5], [6]]), torch.tensor([0, 1])
    monkeypatch.setitem(patches._originals, soundness.SAMPLER, spoil)
    logits = torch.full((2, 8), torch.nan)
    found = soundness.sample_rows(None, logits, batch).num_nans
    assert (None if found is None else found.tolist()) == ([0, 1] if counted else None)


def test_replaced_samplers_of_gpus_exist():
    """They are replaced on GPUs only."""
    from pkgutil import resolve_name

    for workaround in WORKAROUNDS:
        if workaround.platform == "gpu" and installed_vllm().release in SpecifierSet(workaround.versions):
            assert all(callable(resolve_name(path)) for path in workaround.replacements)


def test_seeds_beside_requests_without_one(monkeypatch):
    import torch

    path, given = "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu", []
    monkeypatch.setitem(patches._originals, path, lambda self, *arguments: given.append(arguments))
    own = torch.Generator()
    seeds.sample_each(None, torch.zeros(3, 8), {1: own}, None, None)
    seeds.sample_each(None, torch.zeros(3, 8), {}, None, None)
    assert given[0][1] == {0: torch.default_generator, 1: own, 2: torch.default_generator}
    assert given[1][1] == {}


LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 32, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({"1": {"head_dim": 64}, "3": {"head_dim": 64}}, (64, 2)),
        ({"01": {"head_dim": 64}, "03": {"head_dim": 64}}, (64, 2)),
        ({1: {"head_dim": 64, "num_key_value_heads": 1}, 3: {"head_dim": 64, "num_key_value_heads": 1}}, (64, 1)),
        ({}, (32, 2)),
        (None, (None, None)),
        ({"1": {"head_dim": 64}}, None),
        ({"0": {"head_dim": 64}, "3": {"head_dim": 64}}, None),
        ({"1": {"head_dim": 64}, "3": {"head_dim": 96}}, None),
        ({"1": {"intermediate_size": 8}, "3": {"intermediate_size": 8}}, None),
    ],
    ids=str,
)
def test_configs_of_newer_transformers(monkeypatch, own, wanted):
    path, fields = "transformers.models.gemma4.configuration_gemma4.Gemma4TextConfig.__init__", {}
    monkeypatch.setitem(patches._originals, path, lambda self, **given: fields.update(given))
    if wanted is None:
        with pytest.raises(ModelFormatError, match="per_layer_config"):
            older_models.initialize_text_config(None, per_layer_config=own, **LAYERS)
        return
    older_models.initialize_text_config(None, per_layer_config=own, **LAYERS)
    assert (fields.get("global_head_dim"), fields.get("num_global_key_value_heads")) == wanted
    assert fields["head_dim"] == 32
    assert "per_layer_config" not in fields


def test_a_client_of_a_server_reads_configs_of_newer_transformers():
    """Its process has no engine, and so none of the workarounds."""
    script = (
        "import polydraft_builtin_pairs as pairs\n"
        "from polydraft._load import prepare\n"
        "from polydraft_vllm.tokenizer import load_tokenizer\n"
        "request = prepare('builtin:tiny-e2b', backend='vllm-server', drafter=None).request\n"
        "print(load_tokenizer(pairs.path('tiny-e2b'), request).encode('def'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_norms_that_are_not_used_need_no_weights(monkeypatch):
    path = "vllm.model_executor.models.gemma4.Gemma4ForCausalLM.load_weights"
    monkeypatch.setitem(patches._originals, path, lambda self, weights: set(weights))
    modules = [("model.layers.0.self_attn", False), ("model.layers.1.self_attn", True)]
    modules = [(name, SimpleNamespace(is_kv_shared_layer=shared)) for name, shared in modules]
    model = SimpleNamespace(named_modules=lambda: [("", SimpleNamespace()), *modules])
    assert older_models.load_weights(model, ["a"]) == {"a", "model.layers.1.self_attn.k_norm.weight"}


def test_sampling_settings_are_applied_in_float32(monkeypatch):
    """Of vLLM 0.26 on GPUs, where this has not run: what is given on to vLLM, and what comes back."""
    import torch
    from polydraft_vllm import patches, workarounds

    seen = []

    def upstream(self, logits, mapping, *, skip_top_k_top_p):
        seen.append((self, logits.dtype, mapping, skip_top_k_top_p))
        return logits.div_(3)

    monkeypatch.setitem(patches._originals, workarounds._SAMPLING_PARAMS, upstream)
    logits = torch.ones(1, 4, dtype=torch.bfloat16)
    found = workarounds.apply_sampling_params("sampler", logits, "mapping", skip_top_k_top_p=True)
    assert seen == [("sampler", torch.float32, "mapping", True)]
    assert torch.equal(found, torch.ones(1, 4) / 3)
    assert torch.equal(logits, torch.ones_like(logits))
