"""exactness="bitwise": a step's rows have the same bits however many are padding, and whatever was rolled back."""

import random

import numpy as np
import polydraft
import pytest
from polydraft.contract import DeviceRecord
from polydraft.errors import UnsupportedError
from polydraft_conformance.testing import GreedySampler
from polydraft_llama_cpp.context import Context
from polydraft_llama_cpp.resources import Device

PROMPT = [2, *(300 + (7 * i) % 600 for i in range(200))]
LENGTH = 130  # across position 256, where llama.cpp's attention takes a longer cache, and far past the window of 64


def one_by_one(engine, tokens):
    sequence, greedy = engine.open_sequence(), GreedySampler(engine)
    sequence.prefill(PROMPT, greedy)
    rows = [sequence.verify([token], greedy, keep_logits=True).logits.numpy()[0] for token in tokens]
    sequence.close()
    return np.stack(rows)


def in_blocks(engine, tokens, k):
    """Logits from blocks of 1 to k+1 tokens, of which a random number is right; the others are rolled back."""
    choose, rows, at = random.Random(k), [], 0
    sequence, greedy = engine.open_sequence(), GreedySampler(engine)
    sequence.prefill(PROMPT, greedy)
    while at < len(tokens):
        right = choose.randint(1, min(k + 1, len(tokens) - at))
        wrong = [choose.randrange(2, 2000) for _ in range(choose.randint(0, k + 1 - right))]
        sequence.propose(tokens[at], k, greedy)
        step = sequence.verify([*tokens[at : at + right], *wrong], greedy, keep_logits=True)
        rows.extend(step.logits.numpy()[:right])
        at += right
        sequence.rollback(len(PROMPT) + at)
    sequence.close()
    return np.stack(rows)


CASES = [
    *(
        (name, weights, 4)
        for name in ("tiny-e2b", "tiny-26b", "tiny-llama")
        for weights in ("f32", "f16", "bf16", "q8_0")
    ),
    # Processors with AVX2 or more repack these weights: rows beyond a multiple of four use another kernel.
    *(("tiny-26b", weights, k) for weights in ("q4_0", "q4_k") for k in (4, 6)),
    *(case for k in (1, 7, 12) for case in (("tiny-e2b", "f32", k), ("tiny-26b", "bf16", k))),
]


@pytest.mark.parametrize(("name", "weights", "k"), CASES)
def test_bits(gguf, name, weights, k):
    drafter = "tiny-llama-draft" if name == "tiny-llama" else f"{name}-assistant"
    tokens = [300 + (11 * i) % 500 for i in range(LENGTH)]
    draft_weights = "f32" if weights.startswith("q4") else weights
    arguments = {"drafter": gguf(drafter, draft_weights), "num_speculative_tokens": k, "device": "cpu"}
    with polydraft.load(gguf(name, weights), backend="llama_cpp", exactness="bitwise", **arguments) as session:
        assert session.running.exactness == "bitwise"
        plain = one_by_one(session.engine, tokens)
        blocks = in_blocks(session.engine, tokens, k)
    assert plain.tobytes() == blocks.tobytes(), f"{np.flatnonzero((plain != blocks).any(axis=1))[:5]}"


@pytest.mark.parametrize(("exactness", "rows"), [("bitwise", {8}), ("standard", {1, 2, 3, 4, 5})])
def test_the_rows_of_a_step(gguf, monkeypatch, exactness, rows):
    """Bitwise steps all run the same number of rows, a multiple of four."""
    arguments = {"drafter": "ngram", "num_speculative_tokens": 4, "device": "cpu"}
    tokens = [300 + (11 * i) % 500 for i in range(40)]
    with polydraft.load(gguf("tiny-e2b"), backend="llama_cpp", exactness=exactness, **arguments) as session:
        run, decode = [], Context.decode

        def counted(self, token_ids, first, *, all_rows):
            run.append(len(token_ids))
            return decode(self, token_ids, first, all_rows=all_rows)

        monkeypatch.setattr(Context, "decode", counted)
        one_by_one(session.engine, tokens)
        in_blocks(session.engine, tokens, 4)
    assert set(run) - {len(PROMPT)} == rows


def test_refused_where_it_was_not_measured(gguf, monkeypatch):
    gpu = Device(DeviceRecord(name="cuda:0"), 1, is_cpu=False)
    monkeypatch.setattr("polydraft_llama_cpp.loading.find_device", lambda name: gpu)
    with pytest.raises(UnsupportedError, match="on the CPU only"):
        polydraft.load(gguf("tiny-e2b"), backend="llama_cpp", drafter=None, exactness="bitwise")
