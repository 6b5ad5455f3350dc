"""The promise, on the reference engine: whatever is drafted, the output is that of plain decoding.

Each property compares a speculative generation with a plain one of the same engine, and the counts in its statistics
with counts taken at the engine's methods.
"""

from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from polydraft import GenerationResult

pytest.importorskip("polydraft_reference", reason="the loop is tested on the reference engine: polydraft-reference")

# Prompts shorter than, across and past the toy's sliding window of 16; bytes and special tokens.
prompts = st.lists(st.integers(0, 278), min_size=1, max_size=40)
ks = st.integers(1, 8)
drafters = st.sampled_from(
    [("mtp", 0.0), ("mtp", 0.3), ("mtp", 0.7), ("mtp", 1.0), ("draft-model", None), ("ngram", None)]
)
greedy = st.just({})
sampled = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.3, 0.8, 1.0, 1.7]), "seed": st.integers(0, 2**63 - 1)},
    optional={
        "top_k": st.sampled_from([1, 3, 20]),
        "top_p": st.sampled_from([0.2, 0.7, 0.95]),
        "min_p": st.sampled_from([0.02, 0.3]),
        "typical_p": st.sampled_from([0.2, 0.9]),
    },
)
samplings = st.one_of(greedy, sampled)


def outcome(result):
    """The parts of a result that speculation must not change."""
    return (
        result.token_ids,
        result.text,
        result.raw_text,
        result.finish_reason,
        result.stop_match,
        result.thinking,
        result.tool_calls,
        result.logprobs,
    )


class Both(NamedTuple):
    """Two results of one prompt, each with what the engine was asked for."""

    speculative: GenerationResult
    log: Any
    plain: GenerationResult
    plain_log: Any


def both(kit, drafter, k, prompt, **settings):
    """A prompt decoded with speculation and plainly."""
    kind, agreement = drafter
    session = kit.shared(kind, k, agreement)
    kit.logs.clear()
    speculative = session.generate(prompt, **settings)
    plain = session.generate(prompt, speculate="off", **settings)
    first, second = kit.logs
    return Both(speculative, first, plain, second)


def check(found):
    """Equal outputs, true statistics, no ghosts in the KV cache."""
    speculative, log, plain, plain_log = found
    assert outcome(speculative) == outcome(plain)
    for result, its_log in ((speculative, log), (plain, plain_log)):
        check_statistics(result, its_log)
        check_stored(result, its_log)
    assert plain.stats.num_drafts == plain.stats.num_draft_tokens == plain.stats.num_accepted_tokens == 0
    assert all(len(run) == 1 for run, _ in plain_log.steps)


def check_statistics(result, log):
    stats = result.stats
    accepted = log.accepted(len(result.token_ids))
    assert stats.num_tokens == len(result.token_ids)
    assert stats.num_target_steps == len(log.steps)
    assert stats.num_drafts == len(accepted)
    assert stats.num_draft_tokens == sum(len(run) - 1 for run, _ in log.steps)
    assert stats.num_accepted_tokens == sum(accepted)
    longest = max((len(run) - 1 for run, _ in log.steps), default=0)
    counts = [sum(count > position for count in accepted) for position in range(longest)]
    assert list(stats.accepted_per_position)[:longest] == counts
    assert not any(stats.accepted_per_position[longest:])


def check_stored(result, log):
    """Only emitted tokens are left in the KV cache: all of them, or all but the last."""
    emitted = [*result.prompt_token_ids, *result.token_ids]
    assert log.closes == 1
    assert log.stored_at_end == emitted[: log.length_at_end]
    assert log.length_at_end >= len(emitted) - 1


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings, count=st.integers(1, 60))
def test_output_is_that_of_plain_decoding(kit, drafter, k, prompt, sampling, count):
    found = both(kit, drafter, k, prompt, max_new_tokens=count, **sampling)
    check(found)
    assert found.speculative.token_ids == kit.oracle(prompt, count, **sampling)


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings)
def test_past_eos_with_ignore_eos(kit, drafter, k, prompt, sampling):
    found = both(kit, drafter, k, prompt, max_new_tokens=70, ignore_eos=True, **sampling)
    check(found)
    assert found.speculative.finish_reason == "length"
    assert len(found.speculative.token_ids) == 70


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings, minimum=st.integers(0, 70))
def test_min_new_tokens(kit, drafter, k, prompt, sampling, minimum):
    found = both(kit, drafter, k, prompt, max_new_tokens=70, min_new_tokens=minimum, **sampling)
    check(found)
    eos = kit.shared("mtp", 1, 1.0).tokenizer.eos_token_ids
    assert not eos & set(found.speculative.token_ids[:minimum])
    assert len(found.speculative.token_ids) >= minimum


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings, data=st.data())
def test_eos_wherever_it_falls_in_a_draft(kit, drafter, k, prompt, sampling, data):
    """A token of the plain output is made a stop id: it may be the first, a draft, or the bonus token of a round."""
    session = kit.shared(*drafter_key(drafter, k))
    free = session.generate(prompt, speculate="off", ignore_eos=True, max_new_tokens=40, **sampling)
    stop_id = data.draw(st.sampled_from(free.token_ids))
    found = both(kit, drafter, k, prompt, max_new_tokens=40, ignore_eos=True, stop_token_ids=[stop_id], **sampling)
    check(found)
    at = free.token_ids.index(stop_id)
    assert found.speculative.token_ids == free.token_ids[: at + 1]
    assert (found.speculative.finish_reason, found.speculative.stop_match) == ("stop", stop_id)


def drafter_key(drafter, k):
    return drafter[0], k, drafter[1]


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings, data=st.data())
def test_stop_string_wherever_it_falls_in_a_draft(kit, drafter, k, prompt, sampling, data):
    session = kit.shared(*drafter_key(drafter, k))
    free = session.generate(prompt, speculate="off", max_new_tokens=50, **sampling)
    text = free.text
    assume(text and "\N{REPLACEMENT CHARACTER}" not in text)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    others = data.draw(st.lists(st.sampled_from(["ZZ", stop + "Z", "e" * 9]), max_size=2))
    found = both(kit, drafter, k, prompt, max_new_tokens=50, stop=[*others, stop], **sampling)
    check(found)
    result = found.speculative
    assert result.finish_reason == "stop"
    assert result.stop_match == stop
    assert result.text == text[: text.index(stop)]
    # The last token completed the match: without it nothing matches.
    assert result.token_ids == free.token_ids[: len(result.token_ids)]
    tokenizer = session.tokenizer
    with_last = b"".join(map(tokenizer.token_bytes, result.token_ids))
    without = b"".join(map(tokenizer.token_bytes, result.token_ids[:-1]))
    assert stop.encode() in with_last
    assert stop.encode() not in without


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings, room=st.integers(1, 12))
def test_context_limit_inside_a_draft(kit, drafter, k, prompt, sampling, room):
    kind, agreement = drafter
    session = kit.session(kind, k, agreement, context_length=len(prompt) + room)
    kit.logs.clear()
    speculative = session.generate(prompt, ignore_eos=True, max_new_tokens=500, **sampling)
    plain = session.generate(prompt, ignore_eos=True, max_new_tokens=500, speculate="off", **sampling)
    session.close()
    check(Both(speculative, kit.logs[0], plain, kit.logs[1]))
    assert speculative.finish_reason == "context"
    assert len(prompt) + len(speculative.token_ids) == session.running.context_length


@given(k=ks, prompt=prompts, sampling=samplings)
def test_always_right_is_always_accepted(kit, k, prompt, sampling):
    result, log, *_ = both(kit, ("mtp", 1.0), k, prompt, max_new_tokens=40, ignore_eos=True, **sampling)
    assert result.stats.num_accepted_tokens == result.stats.num_draft_tokens
    assert len(log.steps) == -(-39 // (k + 1))


@given(k=ks, prompt=prompts, sampling=samplings)
def test_always_wrong_is_never_accepted(kit, k, prompt, sampling):
    result, log, *_ = both(kit, ("mtp", 0.0), k, prompt, max_new_tokens=30, ignore_eos=True, **sampling)
    assert result.stats.num_accepted_tokens == 0
    assert len(log.steps) == 29


@given(drafter=drafters, k=ks, prompt=prompts, count=st.integers(1, 30))
def test_never_more_is_drafted_than_can_be_emitted(kit, drafter, k, prompt, count):
    log = both(kit, drafter, k, prompt, max_new_tokens=count, ignore_eos=True).log
    emitted = 1
    for run, chosen in log.steps:
        drafts = len(run) - 1
        assert drafts <= k
        assert drafts <= count - emitted - 1, "the bonus token ends the round: these drafts could not be emitted"
        right = 0
        while right < drafts and run[right + 1] == chosen[right]:
            right += 1
        emitted += right + 1


@given(prompt=prompts, sampling=sampled, first=ks, second=ks, drafter=drafters, other=drafters)
def test_a_seed_gives_the_same_tokens_for_every_k_and_drafter(kit, prompt, sampling, first, second, drafter, other):
    one = kit.shared(*drafter_key(drafter, first)).generate(prompt, max_new_tokens=40, **sampling)
    two = kit.shared(*drafter_key(other, second)).generate(prompt, max_new_tokens=40, **sampling)
    assert one.token_ids == two.token_ids


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings, top=st.integers(0, 5))
def test_logprobs_are_those_of_plain_decoding(kit, drafter, k, prompt, sampling, top):
    found = both(kit, drafter, k, prompt, max_new_tokens=25, logprobs=top, **sampling)
    check(found)
    logprobs = found.speculative.logprobs
    assert [entry.token_id for entry in logprobs] == list(found.speculative.token_ids)
    assert all(len(entry.top) == top for entry in logprobs)


@given(drafter=drafters, k=ks, prompt=prompts, sampling=samplings)
def test_a_stream_is_the_result_in_pieces(kit, drafter, k, prompt, sampling):
    session = kit.shared(*drafter_key(drafter, k))
    result = session.generate(prompt, max_new_tokens=50, **sampling)
    kit.logs.clear()
    chunks = list(session.stream(prompt, max_new_tokens=50, **sampling))
    (log,) = kit.logs
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == result.token_ids
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [result.finish_reason]
    assert chunks[-1].finish_reason == result.finish_reason
    assert sum(chunk.num_accepted_tokens for chunk in chunks) == result.stats.num_accepted_tokens
    for chunk in chunks:
        assert "".join(segment.text for segment in chunk.segments) == chunk.text
    check_stored(result, log)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["mtp", "draft-model", "ngram"])
def test_no_property_here_is_empty(kit, kind, sampling):
    """Some drafts are accepted and some rejected; otherwise the tests above would prove nothing."""
    drafted = accepted = 0
    for index in range(6):
        stats = (
            kit.shared(kind, 4)
            .generate(f"<bos>Number {index}: ", max_new_tokens=100, ignore_eos=True, **sampling)
            .stats
        )
        drafted += stats.num_draft_tokens
        accepted += stats.num_accepted_tokens
    assert 0 < accepted < drafted
