"""Near ties of engines that show log-probabilities only: measured through ``generate``."""

import functools

import numpy as np
import polydraft
import pytest
from polydraft.verification import judge, tie_from_logprobs
from polydraft_reference.sequence import ReferenceSequence

PROMPT = list(b"the quick brown fox jumps over the lazy dog")
SETTINGS = {"speculate": "off", "temperature": 0.0, "ignore_eos": True}


class Distinguishing(ReferenceSequence):
    """Knows whether rows are those of a prefill."""

    prefilling = False

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.prefilling = True
        try:
            return super().prefill(token_ids, sampler, keep_logits=keep_logits)
        finally:
            self.prefilling = False


class OtherPrefill(Distinguishing):
    """A prefill's rows are off by a little: even tokens gain."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, ::2] += 0.3 * self.prefilling
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.fixture
def session(broken):
    broken(OtherPrefill)
    with polydraft.load("builtin:toy", backend="reference") as session:
        yield session


@pytest.fixture
def plain(session):
    return list(session.generate(PROMPT, max_new_tokens=100, **SETTINGS).token_ids)


def prefilled(session, plain, index):
    return session.generate([*PROMPT, *plain[:index]], max_new_tokens=1, **SETTINGS).token_ids[0]


def verdict(session, plain, position, other, **settings):
    found = [*plain[:position], other, *plain[position + 1 :]]
    return judge(plain, found, lambda index: tie_from_logprobs(session, PROMPT, plain, found, index, **settings))


def test_what_one_prefill_flips_too_is_a_near_tie(session, plain):
    flipped = [index for index in range(20, 100) if prefilled(session, plain, index) != plain[index]]
    assert flipped, "the toy has no near tie here"
    judgement = verdict(session, plain, flipped[0], prefilled(session, plain, flipped[0]))
    assert judgement.verdict == "NEAR_TIE"
    assert judgement.tie.source == "logprobs"
    assert 0 < judgement.tie.margin <= 2 * judgement.tie.noise
    assert 0.05 < judgement.tie.noise < 0.6


def test_what_the_control_does_not_flip_is_a_defect(session, plain):
    held = next(index for index in range(20, 100) if prefilled(session, plain, index) == plain[index])
    judgement = verdict(session, plain, held, (plain[held] + 1) % 256)
    assert judgement.verdict == "DIVERGED"


def test_a_plain_output_that_does_not_repeat_cannot_be_measured(session, plain):
    other = [*plain[:10], (plain[10] + 1) % 256, *plain[11:]]
    assert "does not repeat itself" in tie_from_logprobs(session, PROMPT, other, plain, 20)


def test_a_difference_at_the_second_token_is_measured_by_later_ones(session, plain):
    for end in range(100):
        prompt = [*PROMPT, *plain[:end]]
        rest = list(session.generate(prompt, max_new_tokens=30, **SETTINGS).token_ids)
        other = session.generate([*prompt, rest[0]], max_new_tokens=1, **SETTINGS).token_ids[0]
        if other != rest[1]:
            break
    found = [rest[0], other]
    judgement = judge(rest, found, lambda index: tie_from_logprobs(session, prompt, rest, found, index))
    assert judgement.verdict == "NEAR_TIE", judgement.reason
    assert 0.05 < judgement.tie.noise < 0.6


@pytest.mark.parametrize("forbids", ["banned_token_ids", "guided"])
def test_settings_that_forbid_tokens_leave_near_ties(session, forbids):
    """The prefill chooses between the two tokens that may come, whatever is best without the setting."""
    letters = set(b"abcdefghijklmnopqrstuvwxyz")
    value = [token for token in range(256) if token not in letters]
    if forbids == "guided":
        value = {"regex": "[a-z]{60}"}
    given = {**SETTINGS, "ignore_eos": False, forbids: value}
    result = session.generate(PROMPT, max_new_tokens=61, **given)
    output = result.token_ids[:60]
    assert letters.issuperset(output)
    verdicts = {}
    for position in range(2, 50):
        scores = session.generate([*PROMPT, *output[:position]], max_new_tokens=1, logprobs=20, **SETTINGS).logprobs[0]
        ranked = [token for token, _ in scores.top if token in letters]
        other = next(token for token in ranked if token != output[position])
        judgement = verdict(session, list(output), position, other, settings=result.settings)
        verdicts.setdefault(judgement.verdict, []).append((ranked[0] == other, judgement))
    # What the prefill prefers, and lies within the noise, is a near tie; nothing else is.
    assert verdicts["NEAR_TIE"]
    assert all(preferred for preferred, _ in verdicts["NEAR_TIE"])
    assert all(judgement.tie.noise < 0.6 for _, judgement in verdicts["NEAR_TIE"])
    assert not all(preferred for preferred, _ in verdicts["DIVERGED"])


class OtherSums(ReferenceSequence):
    """Single steps are off by a little, which depends on the length of the prefill before them: even tokens gain."""

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.shift = 0.0
        step = super().prefill(token_ids, sampler, keep_logits=keep_logits)
        self.shift = 0.2 if len(self.token_ids) % 3 == len(PROMPT) % 3 else -0.2
        return step

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, ::2] += self.shift
        return super().choose(logits, token_ids, sampler, keep_logits)


def flips(session, plain):
    """Where the prefill chooses as plain decoding does, and decoding after another prefill does not."""
    for position in range(20, 100):
        for back in (1, 2, 3):
            prompt = [*PROMPT, *plain[: position - back]]
            other = session.generate(prompt, max_new_tokens=back + 1, **SETTINGS).token_ids
            repeats = list(other[:back]) == plain[position - back : position]
            if repeats and other[back] != plain[position] == prefilled(session, plain, position):
                yield position, other[back]


def test_what_decoding_after_another_prefill_flips_is_a_near_tie(broken):
    broken(OtherSums)
    with polydraft.load("builtin:toy", backend="reference") as session:
        plain = list(session.generate(PROMPT, max_new_tokens=100, **SETTINGS).token_ids)
        for position, other in flips(session, plain):
            judgement = verdict(session, plain, position, other)
            assert judgement.verdict == ("NEAR_TIE" if judgement.tie.margin <= 2 * judgement.tie.noise else "DIVERGED")
            assert judgement.tie.noise_alone is None
            if judgement.verdict == "NEAR_TIE":
                break
        else:
            pytest.fail("the toy has no near tie of this kind")


def test_only_a_mixture_of_experts_is_given_the_noise_of_single_steps_at_the_place(broken, monkeypatch):
    """Rounding may have sent this token to other experts, and not those around it."""
    broken(OtherSums)
    monkeypatch.setattr("polydraft.verification._logprobs.reroutes", lambda precision: True)
    with polydraft.load("builtin:toy", backend="reference") as session:
        plain = list(session.generate(PROMPT, max_new_tokens=100, **SETTINGS).token_ids)
        monkeypatch.setattr("polydraft.verification._logprobs.MARGIN_LIMIT", -1.0)  # as if the noise were nothing
        position, other = next(iter(flips(session, plain)))
        for experts in (False, True):
            monkeypatch.setattr(session, "_running", session.running.model_copy(update={"has_experts": experts}))
            tie = verdict(session, plain, position, other).tie
            assert (tie.noise_alone is not None) == experts
            assert (other in tie.control) == experts
        assert 0.05 < tie.noise_alone < 0.6


class WrongFrom(Distinguishing):
    """Single steps are far off from a length on."""

    first = len(PROMPT) + 60

    def choose(self, logits, token_ids, sampler, keep_logits):
        if self.length >= self.first and not self.prefilling:
            off = np.random.default_rng(self.length).normal(size=logits.shape)
            logits = logits + (1.5 * off).astype(logits.dtype)
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.mark.parametrize("experts", [False, True])
def test_what_is_wrong_from_a_position_on_does_not_set_its_own_tolerance(broken, monkeypatch, experts):
    broken(WrongFrom)
    monkeypatch.setattr("polydraft.verification._logprobs.reroutes", lambda precision: True)
    differing = 0
    with polydraft.load("builtin:toy", backend="reference") as session:
        monkeypatch.setattr(session, "_running", session.running.model_copy(update={"has_experts": experts}))
        for start in range(30):
            prompt = PROMPT[start:]
            position = WrongFrom.first - len(prompt)
            plain = list(session.generate(prompt, max_new_tokens=position + 1, **SETTINGS).token_ids)
            other = session.generate([*prompt, *plain[:position]], max_new_tokens=1, **SETTINGS).token_ids[0]
            if other != plain[position]:
                found = [*plain[:position], other]
                tie = functools.partial(tie_from_logprobs, session, prompt, plain, found)
                assert judge(plain, found, tie).verdict == "DIVERGED"
                differing += 1
    assert differing > 5


@pytest.mark.parametrize("settings", [{"banned_token_ids": (32,)}, {"min_new_tokens": 30, "stop_token_ids": (32,)}])
def test_a_token_that_may_not_come_is_no_near_tie(session, settings):
    result = session.generate(PROMPT, max_new_tokens=40, **{**SETTINGS, "ignore_eos": False}, **settings)
    plain = list(result.token_ids)
    judgement = verdict(session, plain, 12, 32, settings=result.settings)
    assert (judgement.verdict, judgement.tie) == ("DIVERGED", None)
    assert "the settings forbid" in judgement.reason


def test_stop_ids_are_kept_out_before_the_minimum(session):
    """Plain decoding repeats itself only if the control forbids them, too."""
    bare = session.generate(PROMPT, max_new_tokens=40, **SETTINGS).token_ids
    settings = {"min_new_tokens": 30, "stop_token_ids": (bare[5], bare[8])}
    result = session.generate(PROMPT, max_new_tokens=40, **SETTINGS, **settings)
    plain = list(result.token_ids)
    assert plain[5] != bare[5]
    other = next(token for token in range(97, 123) if token not in (plain[12], *settings["stop_token_ids"]))
    assert "does not repeat" not in verdict(session, plain, 12, other, settings=result.settings).reason


class WrongAfterLongPrefills(ReferenceSequence):
    """Single steps are far off after a prefill of many tokens: those of the control, too."""

    off = 0.0

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.off = 0.0
        step = super().prefill(token_ids, sampler, keep_logits=keep_logits)
        self.off = 1.5 * (len(token_ids) > len(PROMPT) + 20)
        return step

    def choose(self, logits, token_ids, sampler, keep_logits):
        shift = self.off * np.random.default_rng(self.length).normal(size=logits.shape)
        return super().choose(logits + shift.astype(logits.dtype), token_ids, sampler, keep_logits)


def test_experts_do_not_excuse_what_other_prefills_get_wrong(broken, monkeypatch):
    broken(WrongAfterLongPrefills)
    monkeypatch.setattr("polydraft.verification._logprobs.reroutes", lambda precision: True)
    with polydraft.load("builtin:toy", backend="reference", prefix_cache_bytes=0) as session:
        monkeypatch.setattr(session, "_running", session.running.model_copy(update={"has_experts": True}))
        plain = list(session.generate(PROMPT, max_new_tokens=80, **SETTINGS).token_ids)
        differing = 0
        for start in range(22, 70, 4):
            found = session.generate([*PROMPT, *plain[:start]], max_new_tokens=9, **SETTINGS).token_ids
            place = next(index for index in range(10) if found[index : index + 1] != tuple(plain[start + index :][:1]))
            if 0 < place < 9:
                assert verdict(session, plain, start + place, found[place]).verdict == "DIVERGED"
                differing += 1
        assert differing > 2


def test_a_token_that_a_grammar_forbids_is_no_near_tie(session, plain):
    """Plain decoding chose the other one from behind. The control knows no grammar, and chooses what is forbidden."""
    space = ord(" ")
    forbidden = 0
    for start in range(60):
        prompt = [*PROMPT, *plain[:start]]
        result = session.generate(
            prompt, max_new_tokens=12, **{**SETTINGS, "ignore_eos": False}, guided={"regex": "[a-z]{40}"}, logprobs=20
        )
        output = list(result.token_ids)
        for position, entry in enumerate(result.logprobs[2:], 2):
            ahead = dict(entry.top).get(space, -99.0) - entry.logprob
            if 0 < ahead < 0.6:  # within the noise
                found = [*output[:position], space]
                tie = functools.partial(tie_from_logprobs, session, prompt, output, found, settings=result.settings)
                judgement = judge(output, found, tie)
                assert (judgement.verdict, judgement.tie) == ("DIVERGED", None)
                assert "the settings forbid" in judgement.reason
                forbidden += 1
    assert forbidden > 3


def test_the_noise_is_measured_where_the_model_would_have_ended_at_once(session, plain):
    """``min_new_tokens`` forbids EOS; without it the text that the noise is measured on had no other position."""
    first = plain[0]
    given = {**SETTINGS, "ignore_eos": False, "stop_token_ids": (first,), "min_new_tokens": 20}
    result = session.generate(PROMPT, max_new_tokens=30, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session.tokenizer), "eos_token_ids", frozenset({first}))
        output = list(result.token_ids)
        judgement = verdict(session, output, 9, (output[9] + 1) % 256, settings=result.settings)
    assert judgement.tie.noise > 0.05


def test_ids_of_eos_may_come_where_eos_is_ignored(session, plain):
    """``min_new_tokens`` forbids an engine what would end the output, and these do not."""
    settings = session.generate(PROMPT, max_new_tokens=30, **SETTINGS, min_new_tokens=20).settings
    eos = min(session.tokenizer.eos_token_ids)
    assert eos != plain[9]
    assert "the settings forbid" not in verdict(session, plain[:30], 9, eos, settings=settings).reason
