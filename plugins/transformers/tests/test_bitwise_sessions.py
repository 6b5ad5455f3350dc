"""``exactness="bitwise"``: equal bits in low precision, measured when a pair is loaded."""

import polydraft
import pytest
from polydraft.errors import UnsupportedError

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

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
    ("pair", "dtype"), [("tiny-e2b", "bfloat16"), ("tiny-31b", "float32"), ("tiny-26b", "float32")]
)
def test_sessions_of_every_k_and_without_a_drafter_give_equal_bits(pair, dtype, temperature):
    tokens, logprobs, drafted = output(pair, dtype, temperature, drafter=None)
    assert drafted in (0, None)
    for options in ({"num_speculative_tokens": 2}, {"num_speculative_tokens": 7}, {"drafter": "ngram"}):
        other_tokens, other_logprobs, _ = output(pair, dtype, temperature, **options)
        assert other_tokens == tokens
        assert other_logprobs == logprobs


def test_a_row_that_depends_on_its_neighbours_is_found_when_loading():
    # In float32 on CPUs this way of running experts sums a token's experts in an order that its neighbours decide.
    with pytest.raises(UnsupportedError, match="row"):
        polydraft.load(
            "builtin:tiny-26b",
            backend="transformers",
            device="cpu",
            dtype="float32",
            exactness="bitwise",
            engine_options={"experts_implementation": "grouped_mm"},
        )
