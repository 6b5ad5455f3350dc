"""Greedy speculation equals plain decoding in f32 and f16; with other weights every difference is a near tie."""

import polydraft
import pytest
from polydraft.verification import judge_outputs
from polydraft_builtin_pairs import prompts
from polydraft_llama_cpp.bindings import library

NEW = 96
FTYPES = {"q4_0": 2, "q4_k_m": 15}


@pytest.fixture(scope="session")
def quantized(gguf):
    """A function: a built-in model, quantized by llama.cpp."""

    def make(name, weights):
        source = gguf(name)
        file = source.with_name(f"{name}-{weights}.gguf")
        if not file.is_file():
            lib = library()
            params = lib.llama_model_quantize_default_params()
            params.ftype, params.nthread = FTYPES[weights], 1
            assert lib.llama_model_quantize(str(source).encode(), str(file).encode(), params) == 0
        return file

    return make


def verdicts(target, drafter, count=6):
    """The verdict on each prompt, and the accepted drafts."""
    found, accepted = [], 0
    texts = [prompt.text for prompt in prompts() if prompt.text][:count]
    claims = polydraft.default_host().backend("llama_cpp").capabilities()
    with polydraft.load(target, backend="llama_cpp", drafter=drafter, device="cpu") as session:
        for text in texts:
            plain = session.generate(text, max_new_tokens=NEW, speculate="off")
            fast = session.generate(text, max_new_tokens=NEW)
            accepted += fast.stats.num_accepted_tokens
            prompt = plain.prompt_token_ids
            judgement = judge_outputs(session, claims, prompt, plain.settings, plain.token_ids, fast.token_ids)
            found.append(judgement.verdict)
    return found, accepted


@pytest.mark.parametrize("weights", ["f32", "f16"])
@pytest.mark.parametrize("name", ["tiny-e2b", "tiny-31b", "tiny-26b"])
def test_equal(gguf, name, weights):
    found, accepted = verdicts(gguf(name, weights), gguf(f"{name}-assistant", weights))
    assert accepted > 0
    assert "DIVERGED" not in found
    assert found.count("EXACT") > len(found) / 2  # near ties are rare, though not equally on all processors


def test_a_difference_is_measured_where_kv_is_kept(gguf):
    """llama.cpp's cache holds one sequence, and the one of the last call is kept for the next turn."""
    claims = polydraft.default_host().backend("llama_cpp").capabilities()
    with polydraft.load(gguf("tiny-e2b", "f32"), backend="llama_cpp", device="cpu") as session:
        plain = session.generate("def add(a, b):", max_new_tokens=8, speculate="off", ignore_eos=True)
        other = [*plain.token_ids[:4], (plain.token_ids[4] + 1) % session.tokenizer.vocab_size]
        prompt, settings = plain.prompt_token_ids, plain.settings
        judgement = judge_outputs(session, claims, prompt, settings, plain.token_ids[:5], other)
    assert (judgement.verdict, judgement.position) == ("DIVERGED", 4)
    assert judgement.tie is not None


@pytest.mark.parametrize("weights", ["bf16", "q8_0"])
@pytest.mark.parametrize("name", ["tiny-e2b", "tiny-26b"])
def test_no_difference_but_near_ties(gguf, name, weights):
    found, accepted = verdicts(gguf(name, weights), gguf(f"{name}-assistant", "bf16"))
    assert accepted > 0
    assert "DIVERGED" not in found


@pytest.mark.parametrize("weights", list(FTYPES))
def test_quantized_by_llama_cpp(gguf, quantized, weights):
    file = quantized("tiny-31b", weights)
    found, accepted = verdicts(file, gguf("tiny-31b-assistant", "bf16"))
    assert accepted > 0
    assert "DIVERGED" not in found
    with polydraft.load(file, backend="llama_cpp", drafter=None) as session:
        assert session.running.dtype == weights
