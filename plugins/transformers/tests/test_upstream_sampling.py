"""The suite's statistical proof on a real subject that fails: Transformers' own loop with a Gemma 4 assistant.

``generate(assistant_model=, do_sample=True)`` drafts by argmax, and accepts by the drafter's probability of the draft,
as if it had been drawn from it: likely tokens come out too often. The same pair in a polydraft session passes.
"""

from collections import Counter

import polydraft
import pytest
from polydraft.sampling._logprobs import token_logprobs

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
distribution = pytest.importorskip(
    "polydraft_conformance.distribution", reason="the conformance suite is not installed"
)

pytestmark = pytest.mark.slow("hundreds of generations by upstream's loop; the proof has tests on made-up draws, too")

K = 4
DRAWS = distribution.QUICK_DRAWS  # as many as a quick run of the suite makes
PROMPTS = (
    'def read_lines(path):\n    """Return',
    "class Stack:\n    def __init__(self):\n",
    "The function returns a list of",
    "import os\n\n\ndef main(",
)


@pytest.fixture(scope="module")
def session():
    with polydraft.load(
        "builtin:tiny-e2b",
        drafter="builtin:tiny-e2b-assistant",
        backend="transformers",
        num_speculative_tokens=K,
        dtype="float32",
        device="cpu",
    ) as loaded:
        yield loaded


def drawn_by_upstream(session, prompt, seeds):
    """Token ids of the outputs of ``generate(assistant_model=)``, one for each seed: shape (seeds, K + 2)."""
    target = session.engine.target.model
    assistant = session.engine.drafter_model
    assistant.generation_config.num_assistant_tokens = K
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    outputs = []
    for seed in seeds:
        torch.manual_seed(seed)
        output = target.generate(
            torch.tensor([prompt]),
            assistant_model=assistant,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=K + 2,
            eos_token_id=None,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def scored(session, prompt, outputs):
    """The target's log-probabilities along the outputs, from one forward of the unchanged model."""
    model = session.engine.target.model
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output] for output in outputs])).logits
    rows = logits[:, len(prompt) - 1 : -1].float().numpy()
    return [token_logprobs(row, output, distribution.BEST) for row, output in zip(rows, outputs, strict=True)]


def prompt_ids(session):
    return [list(session.generate(text, max_new_tokens=1).prompt_token_ids) for text in PROMPTS]


@pytest.mark.skipif(
    not ((5, 17) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) <= (5, 22)),
    reason="known of 5.17 to 5.22: other versions are not judged here",
)
def test_upstream_s_sampling_is_biased(session):
    draws = []
    for number, prompt in enumerate(prompt_ids(session)):
        seeds = range(1000 * number, 1000 * number + DRAWS // len(PROMPTS))
        draws += scored(session, prompt, drawn_by_upstream(session, prompt, seeds))
    proof = distribution.judge_draws(draws)
    print(proof.in_words())
    assert proof.biased, proof.in_words()
    found, expected = proof.best_token
    assert found > expected + 0.05, proof.in_words()


def test_our_own_sampling_is_not(session):
    draws, tokens = [], Counter()
    for number, prompt in enumerate(prompt_ids(session)):
        for seed in range(1000 * number, 1000 * number + DRAWS // len(PROMPTS)):
            result = session.generate(
                prompt,
                temperature=1.0,
                seed=seed,
                max_new_tokens=K + 2,
                ignore_eos=True,
                logprobs=distribution.BEST,
                speculate="on",
            )
            draws.append(result.logprobs)
            tokens["drafted"] += result.stats.num_draft_tokens
            tokens["accepted"] += result.stats.num_accepted_tokens
    proof = distribution.judge_draws(draws)
    print(proof.in_words())
    assert tokens["accepted"] > 0
    assert not proof.biased, proof.in_words()


def test_scores_are_those_of_the_session(session):
    """What the proof compares with is one thing, computed in two ways."""
    prompt = prompt_ids(session)[0]
    result = session.generate(prompt, max_new_tokens=K + 2, ignore_eos=True, logprobs=distribution.BEST)
    (other,) = scored(session, prompt, [list(result.token_ids)])
    for mine, theirs in zip(result.logprobs, other, strict=True):
        assert mine.token_id == theirs.token_id
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
