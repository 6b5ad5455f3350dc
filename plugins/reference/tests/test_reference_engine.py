"""The engine's primitives: rows, rollback, drafters, errors."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import EngineError
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft_reference.backend import ReferenceBackend
from polydraft_reference.toys import toy_request, toy_source

fast = settings(max_examples=25, deadline=None)
prompts = st.lists(st.integers(0, 278), min_size=1, max_size=40)
WINDOW = toy_source("toy").config["sliding_window"]


def engine(*arguments, **keywords):
    return ReferenceBackend().load_engine(toy_request(*arguments, **keywords))


def sampler(seed=0, **values):
    request = TokenRequest(
        prompt_token_ids=(0,),
        settings=GenerationSettings(**values),
        seed=seed,
        speculate=True,
        num_speculative_tokens=4,
        eos_token_ids=frozenset(),
        max_total_tokens=1024,
    )
    return RuleSampler(NumpyOps(), request)


GREEDY = sampler()


def prefilled(toy, prompt):
    sequence = toy.open_sequence()
    step = sequence.prefill(prompt, GREEDY, keep_logits=True)
    return sequence, step


def plain(toy, prompt, count, choose=GREEDY):
    """Tokens and logits rows of plain decoding."""
    sequence = toy.open_sequence()
    step = sequence.prefill(prompt, choose, keep_logits=True)
    tokens, rows = list(step.token_ids), [step.logits.numpy()[0]]
    while len(tokens) < count:
        step = sequence.verify(tokens[-1:], choose, keep_logits=True)
        tokens += step.token_ids
        rows.append(step.logits.numpy()[0])
    return tokens, rows


# Rows


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@fast
@given(prompt=prompts, block=st.integers(1, 17))
def test_rows_are_bitwise_equal_in_blocks_of_any_size(dtype, prompt, block):
    toy = engine(k=16, dtype=dtype)
    tokens, rows = plain(toy, prompt, 40)
    sequence, _ = prefilled(toy, prompt)
    for start in range(0, 39, block):
        step = sequence.verify(tokens[start : start + block][: 39 - start], GREEDY, keep_logits=True)
        for offset, row in enumerate(step.logits.numpy()):
            assert row.tobytes() == rows[start + 1 + offset].tobytes()


def test_rows_do_not_depend_on_the_rows_after_them():
    toy = engine(k=4)
    sequence, step = prefilled(toy, [1, 2, 3])
    first = sequence.verify([*step.token_ids, 5, 6, 7], GREEDY, keep_logits=True).logits.numpy()
    sequence.rollback(3)
    second = sequence.verify([*step.token_ids, 5, 200, 100], GREEDY, keep_logits=True).logits.numpy()
    assert first[:2].tobytes() == second[:2].tobytes()
    assert not np.array_equal(first[2], second[2])


def test_prefill_equals_steps():
    toy = engine()
    prompt = list(b"The window is sixteen tokens long.")
    _, step = prefilled(toy, prompt)
    sequence, _ = prefilled(toy, prompt[:1])
    for token_id in prompt[1:]:
        last = sequence.verify([token_id], GREEDY, keep_logits=True)
    assert last.logits.numpy().tobytes() == step.logits.numpy().tobytes()


def test_positions_given_to_the_sampler_are_one_past_the_row():
    asked = []

    class Spy(RuleSampler):
        def choose(self, logits, first_position, run_token_ids, *, keep_logprobs=True):
            asked.append((first_position, list(run_token_ids), logits.shape[0]))
            return super().choose(logits, first_position, run_token_ids, keep_logprobs=keep_logprobs)

        def choose_draft(self, logits, position, run_token_ids=None):
            asked.append(position)
            return super().choose_draft(logits, position, run_token_ids)

    spy = Spy(NumpyOps(), TokenRequest(prompt_token_ids=(0,), settings=GenerationSettings(), seed=0, speculate=True,
        num_speculative_tokens=4, eos_token_ids=frozenset(), max_total_tokens=99))  # fmt: skip
    sequence = engine(agreement=1.0).open_sequence()
    (newest,) = sequence.prefill([65, 66, 67], spy).token_ids
    drafts = sequence.propose(newest, 2, spy).token_ids
    sequence.verify([newest, *drafts], spy)
    # The prompt has the positions 0..2, the newest token 3, the drafts 4 and 5.
    assert asked == [(3, [67], 1), 4, 5, (4, [newest, *drafts], 3)]


# Rollback


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("length", [1, 2, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 8, 3 * WINDOW])
def test_after_rollback_the_next_step_equals_a_fresh_prefill(length, k):
    toy = engine(k=k)
    text = [(7 * index + 3) % 256 for index in range(length)]
    for keep in range(k + 2):
        sequence, _ = prefilled(toy, text)
        sequence.verify([(11 * index + 60) % 256 for index in range(k + 1)], GREEDY)
        sequence.rollback(length + keep)
        kept = text + [(11 * index + 60) % 256 for index in range(keep)]
        assert (sequence.length, sequence.token_ids) == (len(kept), kept)
        after = sequence.verify([99], GREEDY, keep_logits=True).logits.numpy()
        _, fresh = prefilled(toy, [*kept, 99])
        assert after.tobytes() == fresh.logits.numpy().tobytes()


@fast
@given(data=st.data(), prompt=prompts, kind=st.sampled_from(["mtp", "draft-model"]))
def test_any_series_of_steps_and_rollbacks_equals_a_fresh_prefill(data, prompt, kind):
    toy = engine(kind, 4)
    sequence, _ = prefilled(toy, prompt)
    expected = list(prompt)
    for _ in range(data.draw(st.integers(1, 8))):
        sequence.propose(5, data.draw(st.integers(0, 4)), GREEDY)
        block = data.draw(st.lists(st.integers(0, 278), min_size=1, max_size=5))
        sequence.verify(block, GREEDY)
        kept = data.draw(st.integers(0, len(block)))
        sequence.rollback(len(expected) + kept)
        expected += block[:kept]
    after = sequence.verify([65], GREEDY, keep_logits=True).logits.numpy()
    _, fresh = prefilled(toy, [*expected, 65])
    assert after.tobytes() == fresh.logits.numpy().tobytes()


def test_a_ring_without_slack_would_lose_rows():
    """The case that bites: the ring's slack is needed, and is just enough."""
    toy = engine(k=4)
    sequence, _ = prefilled(toy, list(range(40)))
    sequence.verify([1, 2, 3, 4, 5], GREEDY)
    assert sequence.cache.layers[0].capacity == WINDOW + 5
    sequence.rollback(40)
    with pytest.raises(EngineError, match="rolled back"):
        sequence.rollback(38)


@pytest.mark.parametrize("length", [-1, 6])
def test_rollback_out_of_range(length):
    sequence, _ = prefilled(engine(), [1, 2, 3, 4, 5])
    with pytest.raises(EngineError, match="rolled back"):
        sequence.rollback(length)
    assert sequence.length == 5


def test_one_wrong_kv_row_changes_the_text():
    """The toy must be sensitive, or tests built on it would miss a wrong rollback."""
    toy = engine(k=4)
    prompt = list(b"It was a dark and stormy night; the rain fell.")
    changed = 0
    for layer in (0, 1):
        for back in range(1, 11):
            good, step = prefilled(toy, prompt)
            bad, _ = prefilled(toy, prompt)
            cache = bad.cache.layers[layer]
            cache.keys[(cache.length - back) % cache.capacity] = 0
            cache.values[(cache.length - back) % cache.capacity] = 0
            newest = other = step.token_ids
            for _ in range(24):
                newest = good.verify(newest, GREEDY).token_ids
                other = bad.verify(other, GREEDY).token_ids
                if newest != other:
                    changed += 1
                    break
    assert changed >= 8, f"only {changed} of 20 zeroed rows changed the next 24 tokens"


# Drafters


def agreement_of(toy, prompt, count, k, choose):
    """(drafts that the target would choose, drafts): in rounds along the target's own text."""
    tokens, _ = plain(toy, prompt, count + k, choose)
    sequence = toy.open_sequence()
    sequence.prefill(prompt, choose)
    right = made = 0
    for index in range(count - 1):
        drafts = sequence.propose(tokens[index], k, choose).token_ids
        right += sum(draft == token for draft, token in zip(drafts[:1], tokens[index + 1 :], strict=False))
        made += 1
        sequence.verify([tokens[index]], choose)
    return right, made


CHOOSERS = {
    "greedy": GREEDY,
    "sampled": sampler(5, temperature=1.0),
    "filtered": sampler(6, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)
def test_agreement_of_0_is_always_wrong_and_1_always_right(choose):
    prompt = list(b"Hello")
    assert agreement_of(engine(agreement=0.0), prompt, 40, 4, choose) == (0, 39)
    assert agreement_of(engine(agreement=1.0), prompt, 40, 4, choose) == (39, 39)


@pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)
def test_agreement_between(choose):
    right, made = agreement_of(engine(agreement=0.5), list(b"Hello"), 120, 1, choose)
    assert 0.3 * made < right < 0.7 * made


def test_the_shipped_draft_model_is_right_now_and_then():
    right, made = agreement_of(engine("draft-model"), list(b"Hello"), 120, 1, GREEDY)
    assert 0.2 * made < right < 0.9 * made


def test_the_target_as_its_own_draft_model_is_always_right():
    request = toy_request("draft-model")
    plan = request.plan.model_copy(update={"drafter": toy_source("toy")})
    toy = ReferenceBackend().load_engine(request.model_copy(update={"plan": plan}))
    assert agreement_of(toy, list(b"Hello"), 60, 4, GREEDY) == (59, 59)


@pytest.mark.parametrize("kind", ["mtp", "draft-model"])
@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 5])
def test_proposing_leaves_the_target_as_it_was(kind, length):
    sequence, step = prefilled(engine(kind, 4), list(range(60, 60 + length)))
    layers = getattr(sequence, "target", sequence).cache.layers
    before = [(cache.keys.tobytes(), cache.values.tobytes(), cache.length) for cache in layers]
    first = sequence.propose(step.token_ids[0], 4, GREEDY, keep_logits=True)
    again = sequence.propose(step.token_ids[0], 4, GREEDY, keep_logits=True)
    assert first.token_ids == again.token_ids
    assert first.logits.numpy().tobytes() == again.logits.numpy().tobytes()
    assert sequence.length == length
    assert before == [(cache.keys.tobytes(), cache.values.tobytes(), cache.length) for cache in layers]


@fast
@given(data=st.data(), prompt=prompts)
def test_a_draft_models_cache_does_not_depend_on_the_rounds_before(data, prompt):
    toy = engine("draft-model", 4)
    sequence, _ = prefilled(toy, prompt)
    expected = list(prompt)
    for _ in range(data.draw(st.integers(1, 6))):
        drafts = sequence.propose(70, data.draw(st.integers(0, 4)), GREEDY).token_ids
        sequence.verify([70, *drafts], GREEDY)
        kept = data.draw(st.integers(1, 1 + len(drafts)))
        sequence.rollback(len(expected) + kept)
        expected += [70, *drafts][:kept]
    fresh, _ = prefilled(toy, expected)
    one = sequence.propose(71, 4, GREEDY, keep_logits=True)
    other = fresh.propose(71, 4, GREEDY, keep_logits=True)
    assert one.token_ids == other.token_ids
    assert one.logits.numpy().tobytes() == other.logits.numpy().tobytes()


def test_no_drafter_proposes_nothing():
    for kind in ("ngram", None):
        sequence, step = prefilled(engine(kind), [1, 2, 3])
        assert sequence.propose(step.token_ids[0], 4, GREEDY).token_ids == []


def test_proposals_keep_within_k_and_context():
    toy = engine(k=4, context_length=6)
    sequence, step = prefilled(toy, [1, 2, 3])
    assert len(sequence.propose(step.token_ids[0], 9, GREEDY).token_ids) == 3
    assert sequence.propose(step.token_ids[0], 0, GREEDY).token_ids == []
    sequence.verify([1, 2, 3], GREEDY)
    assert sequence.propose(4, 4, GREEDY).token_ids == []


# A whole round, as the contract's docstring writes it


def speculative(toy, prompt, count, k, choose):
    sequence = toy.open_sequence()
    tokens = list(sequence.prefill(prompt, choose).token_ids)
    while len(tokens) < count:
        length = sequence.length
        drafts = sequence.propose(tokens[-1], k, choose).token_ids
        step = sequence.verify([tokens[-1], *drafts], choose)
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == step.token_ids[accepted]:
            accepted += 1
        sequence.rollback(length + 1 + accepted)
        tokens += step.token_ids[: accepted + 1]
    return tokens[:count]


@pytest.mark.parametrize("kind", ["mtp", "draft-model"])
@fast
@given(
    prompt=prompts,
    k=st.integers(1, 8),
    agreement=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    name=st.sampled_from(list(CHOOSERS)),
)
def test_rounds_give_what_plain_decoding_gives(kind, prompt, k, agreement, name):
    toy = engine(kind, k, agreement=agreement)
    assert speculative(toy, prompt, 40, k, CHOOSERS[name]) == plain(toy, prompt, 40, CHOOSERS[name])[0]


def test_the_readmes_mutant_changes_the_output():
    readme = Path(__file__).parents[1] / "README.md"
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if "class" in block)
    namespace = {}
    exec(code, namespace)
    toy = engine("draft-model", 4)
    prompt = list(b"Hello")
    good = speculative(toy, prompt, 40, 4, GREEDY)
    toy.sequence_class = namespace["Unverified"]
    assert speculative(toy, prompt, 40, 4, GREEDY) != good


# Life of a sequence


def test_misuse_of_a_sequence():
    toy = engine(k=2, context_length=8)
    sequence, _ = prefilled(toy, [1, 2, 3])
    with pytest.raises(EngineError, match="at least one"):
        toy.open_sequence().prefill([], GREEDY)
    for block in ([], [1, 2, 3, 4]):
        with pytest.raises(EngineError, match="max_draft_tokens"):
            sequence.verify(block, GREEDY)
    for token_id in (-1, 279):
        with pytest.raises(EngineError, match="vocabulary"):
            sequence.verify([token_id], GREEDY)
    sequence.verify([1, 2, 3], GREEDY)
    with pytest.raises(EngineError, match="context"):
        sequence.verify([1, 2, 3], GREEDY)
    assert sequence.length == 6


def test_close_twice_and_use_after_close():
    sequence, _ = prefilled(engine(), [1, 2, 3])
    sequence.close()
    sequence.close()
    for use in (
        lambda: sequence.verify([1], GREEDY),
        lambda: sequence.propose(1, 2, GREEDY),
        lambda: sequence.rollback(1),
    ):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_sequences_share_nothing_but_weights():
    toy = engine()
    prompts_ = [list(b"one"), list(b"another, longer one that crosses the window")]
    expected = [plain(toy, prompt, 30)[0] for prompt in prompts_]
    sequences = [prefilled(toy, prompt) for prompt in prompts_]
    texts = [list(step.token_ids) for _, step in sequences]
    for _ in range(29):
        for (sequence, _), text in zip(sequences, texts, strict=True):
            text.extend(sequence.verify(text[-1:], GREEDY).token_ids)
    assert texts == expected


def test_threads():
    toy = engine()
    prompts_ = [list(f"thread {index}".encode()) for index in range(4)]
    expected = [plain(toy, prompt, 30)[0] for prompt in prompts_]
    found = {}
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: plain(toy, prompts_[index], 30)[0]}))
        for index in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [found[index] for index in range(4)] == expected


def test_weights_cannot_be_changed_by_accident():
    toy = engine()
    for array in (toy.target.embedding, toy.target.bigrams, toy.target.layers[0].projections):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_longer_context_leaves_the_weights_as_they_are():
    short = ReferenceBackend().load_engine(toy_request(target=toy_source("toy", max_position_embeddings=64)))
    assert plain(short, [1, 2, 3], 40)[0] == plain(engine(), [1, 2, 3], 40)[0]


# Text


def texts(count=12, **values):
    toy = engine()
    for index in range(count):
        yield toy.tokenizer, plain(toy, list(f"<{index}> Once".encode()), 150, sampler(index, **values))[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_output_looks_like_text(temperature):
    ended = multibyte = 0
    for tokenizer, tokens in texts(temperature=temperature):
        ends = [index for index, token in enumerate(tokens) if token in tokenizer.eos_token_ids]
        ended += bool(ends)
        text = b"".join(map(tokenizer.token_bytes, tokens[: ends[0] if ends else None])).decode(errors="replace")
        assert "\N{REPLACEMENT CHARACTER}" not in text[:-1]
        multibyte += any(ord(character) > 127 for character in text)
        assert all(character.isprintable() or character == "\n" for character in text)
    assert multibyte >= 6
    assert ended >= 4, "EOS should come by itself now and then"


def test_greedy_output_is_not_periodic():
    for _, tokens in texts(4):
        assert all(tokens[-period:] != tokens[-2 * period : -period] for period in range(1, 50))
