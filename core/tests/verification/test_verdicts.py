"""Verdicts on made-up measurements, and on real ones of the reference engine."""

import json

import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling.numpy_ops import NumpyLogits
from polydraft.verification import Noise, Tie, first_difference, judge, measure_noise, measure_tie
from polydraft_reference.sequence import ReferenceSequence

PROMPT = tuple(b"the quick brown fox jumps over the lazy dog")


def tie(**changes):
    values = {"source": "logits", "values": (2.0, 1.9), "margin": 0.1, "noise": 0.06, "control": (7, 8)}
    return Tie(**{**values, **changes})


def test_equal_outputs_are_exact_and_not_measured():
    judgement = judge([1, 2], [1, 2], lambda _: pytest.fail("nothing to measure"))
    assert (judgement.verdict, judgement.position, judgement.reason) == ("EXACT", None, "")


@pytest.mark.parametrize(
    ("expected", "found", "position"),
    [([], [], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0), ([1, 2], [1, 2], None)],
)
def test_first_difference(expected, found, position):
    assert first_difference(expected, found) == position


def test_a_reproduced_tie_within_the_noise_passes():
    judgement = judge([5, 7], [5, 8], lambda position: tie() if position == 1 else "not here")
    assert (judgement.verdict, judgement.position, judgement.tokens) == ("NEAR_TIE", 1, (7, 8))
    assert judgement.margin_in_noise == pytest.approx(0.1 / 0.06)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"margin": 0.13}, "apart in logits, but the numeric noise"),
        ({"margin": -0.13}, "apart in logits, but the numeric noise"),
        ({"control": (7, 7, 9)}, "never chooses the other one"),
        ({"margin": None, "values": (2.0, None)}, "no finite logit"),
        ({"margin": None, "values": (2.0, None), "source": "logprobs"}, "nothing shows that it was near"),
        ({"margin": float("inf"), "values": (2.0, float("-inf"))}, "no finite logit"),
        ({"margin": float("nan")}, "no finite logit"),
        ({"noise": float("nan")}, "no other position"),
        ({"noise": None}, "no other position"),
        ({"noise": 0.0, "margin": 1e-6}, "numeric noise measured around them is 0"),
        ({"margin": 0.13, "noise_here": 0.13}, "(0.13 at this position, which does not count)"),
        ({"explained": 0.05, "noise_here": 0.0}, "more than rounding explains (0.05)"),
        ({"explained": 0.07, "noise_here": float("inf")}, "more than rounding explains (0.07)"),
        ({"explained": 0.07, "noise_here": 0.08}, "more than rounding explains (0.07)"),
    ],
)
def test_every_other_difference_is_a_defect(changes, why):
    judgement = judge([5, 7], [5, 8], lambda _: tie(**changes))
    assert judgement.verdict == "DIVERGED"
    assert why in judgement.reason


def test_evidence_is_json_whatever_the_engine_gave():
    judgement = judge([5, 7], [5, 8], lambda _: tie(margin=float("nan"), values=(2.0, float("-inf"))))
    assert json.loads(json.dumps(judgement.model_dump(mode="json"), allow_nan=False))["tie"]["values"] == [2.0, None]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.2, "temperature": 0.8},
        {"logit_bias": {101: 1.5}, "banned_token_ids": (32,)},
        {"min_new_tokens": 30},
        {"forced_token_ids": {4: 65}},
        {"logits_processor": lambda prefix, logits: logits - 0.01 * (len(prefix) % 3)},
    ],
)
def test_what_changes_logits_is_in_the_replay(session, settings):
    plain = session.generate(list(PROMPT), speculate="off", max_new_tokens=40, ignore_eos=True, seed=3, **settings)
    output = plain.token_ids
    for position in (9, 20):
        found = [*output[:position], (output[position] + 1) % 256, *output[position + 1 :]]
        measured = measure_tie(session.engine, request(**settings), output, found, position, 4)
        # What the rule chooses from these logits is what plain decoding chose.
        assert set(measured.control) == {output[position]}
        assert measured.margin is None or measured.margin > 0


def test_without_numbers_or_with_an_early_end_nothing_is_a_near_tie():
    unmeasured = judge([5, 7], [5, 8], lambda _: "There are no numbers.")
    assert (unmeasured.verdict, unmeasured.tie, unmeasured.reason) == ("DIVERGED", None, "There are no numbers.")
    ended = judge([5, 7], [5], lambda _: pytest.fail("nothing to measure"))
    assert (ended.verdict, ended.tokens) == ("DIVERGED", (7, None))


class NoisySequence(ReferenceSequence):
    """Rows of one step are off by a little that depends on the number of rows, as in low precision."""

    scale = 1e-3

    def choose(self, logits, token_ids, sampler, keep_logits):
        noisy = logits.copy()
        noisy[:, 1::2] += self.scale * (len(token_ids) % 3)
        step = super().choose(noisy, token_ids, sampler, keep_logits)
        assert not keep_logits or isinstance(step.logits, NumpyLogits)
        return step


def request(**settings):
    return TokenRequest(
        prompt_token_ids=PROMPT,
        settings=GenerationSettings(max_new_tokens=40, ignore_eos=True, **settings),
        seed=3,
        speculate=False,
        num_speculative_tokens=0,
        eos_token_ids=frozenset(),
        max_total_tokens=256,
    )


@pytest.fixture
def session():
    import polydraft

    with polydraft.load("builtin:toy", backend="reference", num_speculative_tokens=4) as session:
        yield session


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_noise_is_measured_and_the_plain_choice_found_again(session, temperature):
    settings = {"max_new_tokens": 40, "ignore_eos": True, "temperature": temperature, "seed": 3}
    plain = session.generate(list(PROMPT), speculate="off", **settings).token_ids
    session.engine.sequence_class = NoisySequence
    try:
        found = [*plain[:9], (plain[9] + 1) % 256, *plain[10:]]
        measured = measure_tie(session.engine, request(temperature=temperature), plain, found, 9, 4)
    finally:
        del session.engine.sequence_class
    assert measured.noise == pytest.approx(NoisySequence.scale, rel=0.01)
    assert set(measured.control) == {plain[9]}
    assert len(measured.control) == 5
    assert measured.margin > 0
    assert judge(plain, found, lambda _: measured).verdict == "DIVERGED"


def judged(session, sequence_class, *, k=4, **arguments):
    """The verdict where another token came at output token 9, and the engine's sequences lean to it.

    ``arguments``: of ``measure_tie``; others are attributes of the class.
    """
    plain = session.generate(list(PROMPT), speculate="off", max_new_tokens=40, ignore_eos=True, seed=3).token_ids
    found = [*plain[:9], (plain[9] + 1) % 256, *plain[10:]]
    margin = measure_tie(session.engine, request(), plain, found, 9, 4).margin
    other = next(token for token in range(256) if token not in {*plain, *found})
    own = {name: arguments.pop(name) for name in [*arguments] if hasattr(sequence_class, name)}
    attributes = {"token": found[9], "more": 1.1 * margin, "other": other, "noise": margin, **own}
    session.engine.sequence_class = type("Own", (sequence_class,), attributes)
    try:
        measured = measure_tie(session.engine, request(), plain, found, 9, k, **arguments)
    finally:
        del session.engine.sequence_class
    # How much rounding explains of it is asked elsewhere.
    return judge(plain, found, lambda _: measured.model_copy(update={"explained": None}))


class SteppedPromptSequence(ReferenceSequence):
    """After tokens of the prompt that a step has run, one logit is a little larger: their KV is of other sums."""

    token, more, stepped = 0, 0.0, False

    def verify(self, token_ids, sampler, *, keep_logits=False):
        self.stepped |= self.length < len(PROMPT)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, self.token] += self.more * self.stepped
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.mark.parametrize(("reused", "verdict"), [(0, "DIVERGED"), (len(PROMPT) - 1, "NEAR_TIE")])
def test_what_an_earlier_turn_computed_is_in_the_control(session, reused, verdict):
    assert judged(session, SteppedPromptSequence, reused=reused).verdict == verdict


class TwoPrefillsSequence(ReferenceSequence):
    """After a prefill that goes on from stored tokens (some of them by steps), one logit is a little larger."""

    token, more, after, ways = 0, 0.0, (), ()

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.after = (*self.after, self.length)
        return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, self.token] += self.more * (self.after == self.ways)
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.mark.parametrize(
    ("ways", "reused", "stepped", "verdict"),
    [
        ((0, 1), 1, (), "NEAR_TIE"),
        ((0, 1), 0, (), "DIVERGED"),
        ((0, 30), 30, (), "NEAR_TIE"),
        # Two turns before: 12 tokens and 5 of an output, 3 more and 6 of an output, and the rest.
        ((0, 17, 26), 26, ((12, 17), (20, 26)), "NEAR_TIE"),
        ((0, 17, 26), 26, (), "DIVERGED"),
        ((0, 17, 22), 22, ((12, 17), (20, 26)), "NEAR_TIE"),
        ((0, 5, 9), 30, ((12, 17), (20, 26)), "DIVERGED"),
    ],
)
def test_prompts_are_run_in_parts_as_earlier_turns_ran_them(session, ways, reused, stepped, verdict):
    judgement = judged(session, TwoPrefillsSequence, ways=ways, reused=reused, stepped=stepped)
    assert judgement.verdict == verdict


class LongMemorySequence(ReferenceSequence):
    """One logit is a little larger after a step of one token and one of two: their KV is of other sums."""

    token, more, remembers, last = 0, 0.0, False, 0

    def verify(self, token_ids, sampler, *, keep_logits=False):
        self.remembers |= self.leaves(self.last, len(token_ids))
        self.last = len(token_ids)
        return super().verify(token_ids, sampler, keep_logits=keep_logits)

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, self.token] += self.more * self.remembers
        return super().choose(logits, token_ids, sampler, keep_logits)

    def leaves(self, last, now):
        return (last, now) == (1, 2)


@pytest.mark.parametrize(
    ("rounds", "verdict"), [((), "DIVERGED"), ((1,) * 20, "DIVERGED"), ((1, 1, 2, *[1] * 16), "NEAR_TIE")]
)
def test_rounds_of_other_lengths_are_in_the_control(session, rounds, verdict):
    assert judged(session, LongMemorySequence, rounds=rounds).verdict == verdict


class SmallStepsSequence(ReferenceSequence):
    """Logits of steps of 3 tokens lean to one token, those of other steps to the other one."""

    token, more = 0, 0.0

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, self.token] += self.more * {1: 0.0, 3: 1.0}.get(len(token_ids), -1.0)
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.mark.parametrize(("k", "verdict"), [(4, "NEAR_TIE"), (2, "NEAR_TIE"), (1, "DIVERGED")])
def test_steps_of_fewer_drafts_are_in_the_control(session, k, verdict):
    assert judged(session, SmallStepsSequence, k=k).verdict == verdict


class MixedStepsSequence(LongMemorySequence):
    """The same after a longer step and one of one token; another logit differs by rounding in steps of several."""

    other, noise = 0, 0.0

    def leaves(self, last, now):
        return last > now == 1

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, self.other] -= self.noise * (len(token_ids) > 1)
        return super().choose(logits, token_ids, sampler, keep_logits)


def test_steps_of_mixed_lengths_are_in_the_control(session):
    """A drafter that finds no drafts now and then has rounds of one token between longer ones."""
    assert judged(session, MixedStepsSequence).verdict == "NEAR_TIE"


class RolledBackSequence(MixedStepsSequence):
    """The same after a rollback: rows of a step that is longer than what is kept of it are of other sums."""

    def leaves(self, last, now):
        return False

    def rollback(self, length):
        self.remembers |= length < self.length
        super().rollback(length)


def test_tokens_that_are_taken_back_are_in_the_control(session):
    assert judged(session, RolledBackSequence).verdict == "NEAR_TIE"


class MixedPromptSequence(MixedStepsSequence):
    """The same after a step and a longer one, of a prompt that an earlier turn has run."""

    def leaves(self, last, now):
        return 0 < last < now

    def verify(self, token_ids, sampler, *, keep_logits=False):
        if self.length >= len(PROMPT):
            self.last = 0  # steps of the output do not count
        return super().verify(token_ids, sampler, keep_logits=keep_logits)


@pytest.mark.parametrize("stepped", [(), [(4, len(PROMPT) - 3)]])
def test_steps_of_mixed_lengths_of_an_earlier_turn_are_in_the_control(session, stepped):
    assert judged(session, MixedPromptSequence).verdict == "DIVERGED"
    found = judged(session, MixedPromptSequence, reused=len(PROMPT) - 1, stepped=stepped)
    assert found.verdict == "NEAR_TIE"


class ReroutedSequence(ReferenceSequence):
    """One logit of one position is larger after a step of several tokens: rounding sent that token to other experts.

    ``is_wrong``: it is larger where the position itself is in such a step, which is a defect.
    """

    token, more, at, is_wrong, after_several = 0, 0.0, 0, False, False

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits, first = logits.copy(), self.length - len(token_ids) + 1
        if 0 <= self.at - first < len(logits) and (len(token_ids) > 1 if self.is_wrong else self.after_several):
            logits[self.at - first, self.token] += self.more
        self.after_several |= len(token_ids) > 1
        return super().choose(logits, token_ids, sampler, keep_logits)


@pytest.mark.parametrize(
    ("experts", "precision", "is_wrong", "verdict"),
    [
        (True, "bfloat16", False, "NEAR_TIE"),
        (True, "bfloat16", True, "DIVERGED"),
        (True, "float32", False, "DIVERGED"),
        (False, "bfloat16", False, "DIVERGED"),
    ],
)
def test_other_experts_at_one_position_are_told_from_a_defect(session, experts, precision, is_wrong, verdict):
    arguments = {"precision": precision, "experts": experts, "is_wrong": is_wrong}
    judgement = judged(session, ReroutedSequence, at=len(PROMPT) + 9, **arguments)
    assert judgement.verdict == verdict
    assert judgement.follows
    if verdict == "NEAR_TIE":
        assert judgement.margin_in_noise == pytest.approx(1 / 1.1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logits_processor": lambda prefix, logits: logits * 0.001},
        {"logits_processor": lambda prefix, logits: logits * 100},
        {"repetition_penalty": 30.0},
    ],
)
def test_rounding_is_judged_before_settings_scale_the_logits(session, settings):
    plain = session.generate(list(PROMPT), speculate="off", max_new_tokens=40, ignore_eos=True, seed=3, **settings)
    output = plain.token_ids
    found = [*output[:20], (output[20] + 1) % 256, *output[21:]]

    def measured():
        return measure_tie(session.engine, request(**settings), output, found, 20, 4, precision="float32")

    honest = measured()
    assert honest.steps <= honest.explained
    session.engine.sequence_class = NoisySequence
    defective = measured()
    assert defective.steps == pytest.approx(NoisySequence.scale, rel=0.01)
    assert defective.steps > defective.explained


def test_rows_without_noise_measure_none(session):
    plain = [ord(c) for c in "abcdefghij"]
    measured = measure_tie(session.engine, request(), plain, [*plain[:3], 5], 3, 4)
    assert measured.noise == 0.0
    assert measured.values[1] is not None


@pytest.mark.parametrize(
    ("noise", "dtype", "limit"),
    [
        (Noise(rows=0.0, prefill=0.0, largest_logit=8.0), "float32", 16 * 2.0**-20),
        (Noise(rows=1e-5, prefill=0.0, largest_logit=8.0), "torch.float32", 64 * 2.0**-20),
        # Blocks that are wrong everywhere do not widen the tolerance; prefills that differ do, up to bfloat16's.
        (Noise(rows=1.0, prefill=0.0, largest_logit=8.0), "float32", 64 * 2.0**-20),
        (Noise(rows=1.0, prefill=1e-3, largest_logit=8.0), "float32", 16e-3),
        (Noise(rows=1.0, prefill=1.0, largest_logit=8.0), "float32", 1.0),
        (Noise(rows=0.0, prefill=0.0, largest_logit=8.0), "bfloat16", 1.0),
        (Noise(rows=9.0, prefill=9.0, largest_logit=8.0), "Q8_0", 1.0),
        (Noise(rows=9.0, prefill=0.0, largest_logit=8.0), "tf32", 0.125),
    ],
)
def test_what_rounding_explains(noise, dtype, limit):
    assert noise.explains(dtype) == pytest.approx(limit)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 2.5), ("tf32", 2.5), ("float32", 16 * 2.0**-20)])
def test_below_float32_rounding_may_send_a_token_to_other_experts(dtype, limit):
    assert Noise(rows=0.0, prefill=0.0, largest_logit=8.0).explains(dtype, experts=True) == pytest.approx(limit)


def test_noise_of_rows_and_prefills_is_told_apart(session):
    engine = session.engine
    quiet = measure_noise(engine, PROMPT[:15], 5)
    assert (quiet.rows, quiet.prefill) == (0.0, 0.0)
    engine.sequence_class = NoisySequence
    try:
        found = measure_noise(engine, PROMPT[:15], 5)
    finally:
        del engine.sequence_class
    assert found.rows == pytest.approx(NoisySequence.scale, rel=0.01)
    assert found.prefill == 0.0  # one row in both
    assert found.largest_logit == pytest.approx(quiet.largest_logit, abs=2e-3)
