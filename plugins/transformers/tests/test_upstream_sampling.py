"""The suite's statistical proof on a real subject that fails: Transformers' own loop with a Gemma 4 assistant.

``generate(assistant_model=, do_sample=True)`` drafts by argmax, and accepts by the drafter's probability of the draft,
as if it had been drawn from it: likely tokens come out too often. The same pair in a polydraft session passes.
"""

from collections import Counter
from random import Random

import polydraft
import pytest
from polydraft.contract import GenerationSettings

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")
proof = pytest.importorskip("polydraft_conformance.settings_proof", reason="the conformance suite is not installed")

pytestmark = pytest.mark.slow("hundreds of generations by upstream's loop; the proof has tests on made-up draws, too")

K = 4
DRAWS, NEW_TOKENS = 160, 24
"""Outputs, and tokens of each. Transformers 5.17 makes the first drafts of an output from the hidden state of the
prompt's first token: hardly one is accepted, so the bias shows in the later rounds only."""
SETTINGS = GenerationSettings(temperature=1.0)
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
    """Token ids of the outputs of ``generate(assistant_model=)``, one for each seed: shape (seeds, NEW_TOKENS)."""
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
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def trials(session, prompt, outputs):
    """The outputs with the target's logits along them, from one forward of the unchanged model.

    After the first token, which prefill chooses, any may have been drafted.
    """
    model = session.engine.target.model
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output] for output in outputs])).logits
    rows = logits[:, len(prompt) - 1 : -1].float().numpy()
    for output, row in zip(outputs, rows, strict=True):
        choices = [proof.Choice(token, tuple(output[:i]), row[i], None) for i, token in enumerate(output)]
        yield proof.Trial(SETTINGS, tuple(prompt), choices, frozenset(), 2e-3)


def prompt_ids(session):
    return [list(session.generate(text, max_new_tokens=1).prompt_token_ids) for text in PROMPTS]


@pytest.mark.skipif(
    not ((5, 17) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) <= (5, 22)),
    reason="known of 5.17 to 5.22: other versions are not judged here",
)
def test_upstream_s_sampling_is_biased(session):
    evidence = proof.Evidence(Random(1))
    for number, prompt in enumerate(prompt_ids(session)):
        seeds = range(1000 * number, 1000 * number + DRAWS // len(PROMPTS))
        for trial in trials(session, prompt, drawn_by_upstream(session, prompt, seeds)):
            evidence.add(trial)
    print(evidence.problem)
    assert evidence.problem


def test_our_own_sampling_is_not(session):
    evidence, tokens = proof.Evidence(Random(1)), Counter()
    for number, prompt in enumerate(prompt_ids(session)):
        outputs = []
        for seed in range(1000 * number, 1000 * number + DRAWS // len(PROMPTS)):
            result = session.generate(
                prompt, temperature=1.0, seed=seed, max_new_tokens=NEW_TOKENS, ignore_eos=True, speculate="on"
            )
            outputs.append(list(result.token_ids))
            tokens["drafted"] += result.stats.num_draft_tokens
            tokens["accepted"] += result.stats.num_accepted_tokens
        for trial in trials(session, prompt, outputs):
            evidence.add(trial)
    assert tokens["accepted"] > 0
    assert not evidence.problem
