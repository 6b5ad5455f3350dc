"""``exactness="bitwise"``: equal bits in low precision, on every processor."""

import os
import subprocess
import sys

import polydraft
import pytest
from polydraft.errors import InvalidRequestError, UnsupportedError

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_transformers.experts import MOST_ROWS, WHOLE_STEP, experts_implementation, set_experts  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

PROMPT = [2, *(300 + (7 * i) % 600 for i in range(50))]
NEW_TOKENS = 40  # crosses the window of 64


def output(pair, dtype, temperature, **options):
    with polydraft.load(
        f"builtin:{pair}", backend="transformers", device="cpu", dtype=dtype, exactness="bitwise", **options
    ) as session:
        result = session.generate(
            PROMPT, max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=temperature, seed=3, logprobs=0
        )
        assert session.running.exactness == "bitwise"
        return result.token_ids, [row.logprob for row in result.logprobs], result.stats.num_draft_tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("pair", "dtype"),
    [("tiny-e2b", "bfloat16"), ("tiny-31b", "float32"), ("tiny-26b", "float32"), ("tiny-llama", "float32")],
)
def test_sessions_of_every_k_and_without_a_drafter_give_equal_bits(pair, dtype, temperature):
    tokens, logprobs, drafted = output(pair, dtype, temperature, drafter=None)
    assert drafted in (0, None)
    for options in ({"num_speculative_tokens": 2}, {"num_speculative_tokens": 7}, {"drafter": "ngram"}):
        other_tokens, other_logprobs, _ = output(pair, dtype, temperature, **options)
        assert other_tokens == tokens
        assert other_logprobs == logprobs


# One machine tests others: what torch's own kernels, oneDNN's and MKL's are held down to.
INSTRUCTION_SETS = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # without what bfloat16 and tiles have of their own
    "all": {},
}
COMPARED = ["tiny-26b,bfloat16", "tiny-26b,float32", "tiny-e2b,bfloat16", "tiny-llama,float32", "tiny-llama,bfloat16"]
COMPARE = """
import sys
import polydraft

prompt = "import os\\n\\n\\nclass Reader:\\n    def __init__(self, path):\\n        self.path = path\\n"
for pair, dtype in (given.split(",") for given in sys.argv[1:]):
    try:
        session = polydraft.load(
            f"builtin:{pair}", backend="transformers", device="cpu", dtype=dtype, exactness="bitwise"
        )
    except polydraft.errors.UnsupportedError as error:
        print(pair, dtype, "refused:", error)
        continue
    different = compared = 0
    with session:
        for temperature in (0.0, 1.0):
            plain, speculative = (
                session.generate(prompt, max_new_tokens=60, ignore_eos=True, temperature=temperature, seed=3,
                                 logprobs=0, speculate=way)
                for way in ("off", "on")
            )
            assert speculative.stats.num_draft_tokens > 0
            compared += len(plain.logprobs)
            different += sum(a != b for a, b in zip(plain.logprobs, speculative.logprobs, strict=True))
    print(pair, dtype, f"{different} of {compared}")
"""


@pytest.mark.parametrize("limits", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS)
def test_log_probabilities_are_the_plain_ones_under_every_instruction_set(limits):
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, *COMPARED],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Rows are independent by construction, so nothing is refused either.
    assert done.stdout.splitlines() == [f"{one.replace(',', ' ')} 0 of 120" for one in COMPARED]


@pytest.mark.parametrize("named", ["grouped_mm", "eager"])
def test_experts_that_mix_the_rows_are_refused(named):
    with pytest.raises(UnsupportedError, match="experts_implementation"):
        polydraft.load(
            "builtin:tiny-26b",
            backend="transformers",
            device="cpu",
            exactness="bitwise",
            engine_options={"experts_implementation": named},
        )


def test_experts_of_a_model_that_has_none():
    with pytest.raises(
        InvalidRequestError, match="experts_implementation has no effect: builtin:tiny-e2b is no mixture"
    ):
        polydraft.load(
            "builtin:tiny-e2b",
            backend="transformers",
            device="cpu",
            engine_options={"experts_implementation": "batched_mm"},
        )


def test_experts_whose_config_names_them_in_another_way():
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    config = Ernie4_5_MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=0,
    )
    model = Ernie4_5_MoeForCausalLM(config)
    found = [module for module in model.modules() if hasattr(module, "is_transposed")]
    assert found
    assert {module.config._experts_implementation for module in found} != {WHOLE_STEP}
    assert experts_implementation(None, torch.float32, torch.device("cpu"), fixed=True) == WHOLE_STEP
    set_experts(model, WHOLE_STEP, "ernie", mixture=True)
    assert {module.config._experts_implementation for module in found} == {WHOLE_STEP}


def test_experts_that_run_in_their_own_way_only_are_refused():
    with pytest.raises(UnsupportedError, match="own code"):
        set_experts(torch.nn.Linear(2, 2), WHOLE_STEP, "a mixture", mixture=True)


def test_steps_are_smaller_than_prompts():
    from polydraft_transformers.backend import TransformersBackend
    from polydraft_transformers.decoder import fixed_rows

    assert fixed_rows(TransformersBackend().capabilities().max_speculative_tokens) <= MOST_ROWS


@pytest.fixture(scope="module")
def experts():
    """Transformers' module of the experts of a small mixture."""
    with polydraft.load(
        "builtin:tiny-26b", backend="transformers", device="cpu", dtype="float32", exactness="bitwise"
    ) as session:
        return session.engine.target.model.model.layers[0].experts


def routed(experts, rows, seed):
    """Random rows, with two experts for each."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, experts.hidden_dim, generator=generator)
    chosen = torch.stack([torch.randperm(experts.num_experts, generator=generator)[:2] for _ in range(rows)])
    return hidden, chosen, torch.rand(rows, 2, generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_experts_over_a_whole_step_give_what_transformers_does(experts, seed):
    given = routed(experts, 8, seed)
    with torch.inference_mode():
        ours = ALL_EXPERTS_FUNCTIONS[WHOLE_STEP](experts, *given)
        theirs = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, *given)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_experts_does_not_depend_on_its_neighbours(experts, dtype):
    module = experts if dtype == torch.float32 else type(experts).to(experts, dtype)
    hidden, chosen, weights = (part.to(dtype) if part.is_floating_point() else part for part in routed(module, 8, 7))
    with torch.inference_mode():
        together = ALL_EXPERTS_FUNCTIONS[WHOLE_STEP](module, hidden, chosen, weights)
        for row in range(8):
            other = routed(module, 8, 100 + row)
            mixed = [part.to(mine.dtype) for part, mine in zip(other, (hidden, chosen, weights), strict=True)]
            for part, mine in zip(mixed, (hidden, chosen, weights), strict=True):
                part[row] = mine[row]
            assert torch.equal(ALL_EXPERTS_FUNCTIONS[WHOLE_STEP](module, *mixed)[row], together[row])


def test_a_rollback_of_a_whole_step_forgets_the_padding_rows_of_single_steps():
    """Single steps of 16 rows write 15 slots beyond their token, in a ring that holds a window of 64."""
    from polydraft_conformance.testing import GreedySampler

    tokens = [2, *(300 + (11 * i) % 500 for i in range(330))]

    def bits(step):
        return step.logits.numpy().tobytes()

    with polydraft.load(
        "builtin:tiny-26b",
        backend="transformers",
        device="cpu",
        dtype="float32",
        exactness="bitwise",
        num_speculative_tokens=15,
    ) as session:
        engine = session.engine
        sampler, sequence = GreedySampler(engine), engine.open_sequence()
        sequence.prefill(tokens[:240], sampler)
        first = []
        for token in tokens[240:]:  # across position 256, where a step is cut in two
            first.append(bits(sequence.verify([token], sampler, keep_logits=True)))
            if sequence.length % 7 == 0:  # back by k+1 tokens, and forward again
                start = sequence.length - 16
                if start < 240:
                    continue
                sequence.rollback(start)
                again = [
                    bits(sequence.verify([known], sampler, keep_logits=True)) for known in tokens[start : start + 16]
                ]
                assert again == first[start - 240 : start - 240 + 16], start
        sequence.close()
