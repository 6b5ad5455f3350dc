"""Every sampling setting gives the tokens of its definition, in plain decoding and with any speculation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("polydraft_reference", reason="settings are tested on the reference engine: polydraft-reference")

VOCABULARY = 279
LENGTH = 24

# Few distinct tokens, special ones among them, so that penalties often apply.
tokens = st.integers(0, VOCABULARY - 1)
prompts = st.lists(st.one_of(st.integers(97, 104), tokens), min_size=1, max_size=30)
ks = st.integers(1, 8)
drafters = st.sampled_from([("mtp", 0.3), ("mtp", 0.8), ("draft-model", None), ("ngram", None)])
samplings = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.3, 1.0, 1.7]), "seed": st.integers(0, 2**63 - 1)},
        optional={"top_k": st.sampled_from([3, 40]), "top_p": st.sampled_from([0.5, 0.95])},
    ),
)


def discourage_twins(prefix, logits):
    """Pure: the last two tokens may not be repeated at once, and every fifth token is favoured."""
    logits[list(prefix[-2:])] -= 4
    logits[len(prefix) % 5 :: 5] += 1
    return logits


def only_neighbours(prefix, logits):
    """Pure, and a hard mask: only some tokens may follow a token."""
    masked = np.full_like(logits, -np.inf)
    allowed = (np.arange(40) * 7 + prefix[-1]) % VOCABULARY
    masked[allowed] = logits[allowed]
    return masked


SETTINGS = {
    "repetition_penalty": st.sampled_from([0.5, 1.1, 1.3, 5.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.7, 2.0]),
    "frequency_penalty": st.sampled_from([-1.0, 0.4, 2.0]),
    "logit_bias": st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=30),
    "banned_token_ids": st.lists(tokens, max_size=250).map(tuple),
    "forced_token_ids": st.dictionaries(st.integers(0, LENGTH - 1), tokens, max_size=8),
    "logits_processor": st.sampled_from([discourage_twins, only_neighbours]),
}


def check(toys, drafter, k, prompt, **given):
    given = {"max_new_tokens": LENGTH, "ignore_eos": True, **given}
    kind, agreement = drafter
    session = toys.session(kind, k, agreement)
    wanted = toys.by_definition(prompt, **given)
    assert session.generate(prompt, speculate="off", **given).token_ids == wanted
    result = session.generate(prompt, speculate="on", **given)
    assert result.token_ids == wanted
    streamed = [token for chunk in session.stream(prompt, **given) for token in chunk.token_ids]
    assert tuple(streamed) == wanted
    return result


@pytest.mark.parametrize("name", sorted(SETTINGS))
@given(data=st.data(), drafter=drafters, k=ks, prompt=prompts, sampling=samplings)
def test_each_setting(toys, name, data, drafter, k, prompt, sampling):
    result = check(toys, drafter, k, prompt, **sampling, **{name: data.draw(SETTINGS[name], label=name)})
    if name == "banned_token_ids":
        assert not set(result.token_ids) & set(result.settings.banned_token_ids)
    if name == "forced_token_ids":
        for index, token_id in result.settings.forced_token_ids.items():
            assert result.token_ids[index] == token_id


@given(
    drafter=drafters,
    k=ks,
    prompt=prompts,
    sampling=samplings,
    settings=st.fixed_dictionaries({}, optional={**SETTINGS, "min_new_tokens": st.integers(0, LENGTH)}),
    ignore_eos=st.booleans(),
)
def test_all_together(toys, drafter, k, prompt, sampling, settings, ignore_eos):
    forced = settings.get("forced_token_ids", {})
    settings["banned_token_ids"] = tuple(set(settings.get("banned_token_ids", ())) - set(forced.values()))
    if settings.get("logits_processor") is only_neighbours:
        settings["banned_token_ids"] = settings["banned_token_ids"][:30]  # 40 are allowed: some are left
        settings.pop("min_new_tokens", None)
    check(toys, drafter, k, prompt, **sampling, **settings, ignore_eos=ignore_eos)


@pytest.mark.parametrize("drafter", [("mtp", 0.6), ("ngram", None)], ids=str)
def test_a_history_of_many_different_tokens(toys, drafter):
    """More tokens than the table of penalties has room for at first, in the prompt and again in the output."""
    given = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "logit_bias": dict.fromkeys(range(10, 80), 0.5)}
    check(toys, drafter, 4, list(range(130, 279)), temperature=8.0, seed=2, **given, max_new_tokens=200)
    check(toys, drafter, 4, [97], temperature=8.0, seed=2, **given, max_new_tokens=200)


@given(prompt=prompts, sampling=samplings, first=drafters, second=drafters, k=ks, other=ks)
def test_every_k_and_drafter_gives_the_same(toys, prompt, sampling, first, second, k, other):
    given = {
        **sampling,
        "max_new_tokens": LENGTH,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "logit_bias": {101: 2.0},
        "logits_processor": discourage_twins,
    }
    one = toys.session(first[0], k, first[1]).generate(prompt, **given)
    two = toys.session(second[0], other, second[1]).generate(prompt, **given)
    assert one.token_ids == two.token_ids


@given(sampling=samplings, drafter=drafters)
def test_prompts_of_one_call_have_histories_of_their_own(toys, sampling, drafter):
    session = toys.session(drafter[0], 4, drafter[1])
    given = {"max_new_tokens": 16, "presence_penalty": 1.5, "repetition_penalty": 1.3, "seed": 5, **sampling}
    prompts = [[97, 98, 99], [100, 101], [97, 98, 99]]
    together = session.generate_many(prompts, **given)
    plain = session.generate_many(prompts, **given, speculate="off")
    assert [result.token_ids for result in together] == [result.token_ids for result in plain]
    assert together[0].token_ids == session.generate(prompts[0], **given).token_ids


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 1.0, "temperature": 1.0, "seed": 1},
        {"logits_processor": discourage_twins},
        {"logits_processor": only_neighbours, "temperature": 1.0, "seed": 1},
        {"forced_token_ids": {index: 97 + index for index in range(1, 20)}},
        {"logit_bias": dict.fromkeys(range(97, 123), 5.0), "temperature": 1.0, "seed": 1},
    ],
    ids=str,
)
def test_drafts_are_treated_alike(toys, given):
    """A drafter that equals the target is always right, so drafts see the same changed logits as the target's rows."""
    result = toys.session("mtp", 4, 1.0).generate([258, 97, 98], max_new_tokens=41, ignore_eos=True, **given)
    assert result.stats.num_accepted_tokens == result.stats.num_draft_tokens == 32
    plain = toys.session("mtp", 4, 1.0).generate([258, 97, 98], max_new_tokens=41, ignore_eos=True)
    assert plain.token_ids != result.token_ids


def test_penalties_of_output_only_spare_the_prompt(toys):
    """Only the repetition penalty discourages tokens of the prompt; the other two do not."""
    session = toys.session("mtp", 4, 0.8)
    candidates = ([258, *range(97, 123), 32, last] for last in range(97, 123))
    prompt, free = next(
        (prompt, free)
        for prompt in candidates
        if (free := session.generate(prompt, max_new_tokens=1).token_ids)[0] in prompt
    )
    assert session.generate(prompt, max_new_tokens=1, presence_penalty=2.0, frequency_penalty=2.0).token_ids == free
    assert session.generate(prompt, max_new_tokens=1, repetition_penalty=100.0).token_ids != free


def test_logprobs_stay_the_raw_ones(toys):
    session = toys.session("mtp", 4, 0.8)
    given = {"max_new_tokens": 6, "logprobs": 1, "ignore_eos": True}
    forced = {index: 200 + index for index in range(6)}
    result = session.generate([97, 98], forced_token_ids=forced, logit_bias={5: 100.0}, **given)
    assert [entry.token_id for entry in result.logprobs] == list(forced.values())
    assert all(entry.logprob < entry.top[0][1] for entry in result.logprobs)
    plain = session.generate([97, 98], forced_token_ids=forced, speculate="off", **given)
    assert result.logprobs == plain.logprobs
