"""Logits processors: which are accepted, how a stateful one is moved, and what its failures raise."""

import functools
import math
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polydraft.errors import InvalidRequestError, LogitsProcessorError
from polydraft.sampling._processors import processor_kind

pytest.importorskip("polydraft_reference", reason="settings are tested on the reference engine: polydraft-reference")

VOCABULARY = 279
PROMPT = [258, 97, 98, 99]


class Automaton:
    """A grammar as strict as real ones: it refuses to accept what it forbade, and to go back too far.

    A token's successor must differ from it by one of a few amounts, which depend on how many tokens there were.
    """

    def __init__(self):
        self.states = [0]
        self.moves = []  # the calls of accept and rollback
        self.calls = 0

    def allowed(self):
        state, depth = self.states[-1], len(self.states)
        return (state + np.arange(3, 90) * (1 + depth % 3)) % VOCABULARY

    def __call__(self, prefix, logits):
        self.calls += 1
        assert list(prefix[len(prefix) - len(self.states) + 1 :]) == self.states[1:]
        masked = np.full_like(logits, -np.inf)
        masked[self.allowed()] = logits[self.allowed()]
        return masked

    def accept(self, token_id):
        if token_id not in self.allowed():
            raise ValueError(f"{token_id} is not allowed")
        self.states.append(token_id)
        self.moves.append(1)

    def rollback(self, num_tokens):
        assert 0 < num_tokens < len(self.states)
        del self.states[-num_tokens:]
        self.moves.append(-num_tokens)


class Resettable(Automaton):
    def reset(self):
        self.states = [0]


samplings = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"temperature": st.sampled_from([0.5, 1.0, 1.7]), "seed": st.integers(0, 2**63 - 1)}),
)
drafters = st.sampled_from([("mtp", 0.0), ("mtp", 0.5), ("mtp", 1.0), ("draft-model", None), ("ngram", None)])


@given(
    drafter=drafters,
    k=st.integers(1, 8),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    sampling=samplings,
    settings=st.fixed_dictionaries(
        {}, optional={"repetition_penalty": st.just(1.4), "logit_bias": st.just({100: 5.0, 7: -3.0})}
    ),
    kind=st.sampled_from([Automaton, Resettable]),
)
def test_with_a_state(toys, drafter, k, prompt, sampling, settings, kind):
    given = {"max_new_tokens": 24, "ignore_eos": True, **sampling, **settings}
    session = toys.session(drafter[0], k, drafter[1])
    automaton = kind()
    plain = session.generate(prompt, speculate="off", logits_processor=automaton, **given)
    assert all(move == 1 for move in automaton.moves[:23]), "plain decoding never goes back"
    ends_at = [0] if kind is Automaton else [0, *plain.token_ids]
    assert automaton.states == ends_at
    again = session.generate(prompt, speculate="on", logits_processor=automaton, **given)
    assert again.token_ids == plain.token_ids
    assert automaton.states == ends_at
    stream = session.stream(prompt, logits_processor=kind(), **given)
    assert tuple(token for chunk in stream for token in chunk.token_ids) == plain.token_ids

    def pure(prefix, logits):
        fresh = Automaton()
        fresh.states += prefix[len(prompt) :]
        return fresh(prefix, logits)

    assert session.generate(prompt, logits_processor=pure, **given).token_ids == plain.token_ids


@pytest.mark.parametrize("speculate", ["on", "off"])
@pytest.mark.parametrize("kind", [Automaton, Resettable])
def test_a_stream_closed_early_leaves_a_usable_processor(toys, kind, speculate):
    session = toys.session("mtp", 4, 0.7)
    given = {"max_new_tokens": 30, "ignore_eos": True, "speculate": speculate}
    automaton = kind()
    wanted = session.generate(PROMPT, logits_processor=automaton, **given).token_ids
    for count in (0, 1, 3):
        with session.stream(PROMPT, logits_processor=automaton, **given) as stream:
            seen = [token for _, chunk in zip(range(count), stream, strict=False) for token in chunk.token_ids]
        assert tuple(seen) == wanted[: len(seen)]
        if kind is Automaton:
            assert automaton.states == [0]
    assert session.generate(PROMPT, logits_processor=automaton, **given).token_ids == wanted


def test_one_generation_at_a_time(toys):
    session = toys.session("mtp", 4, 0.7)
    automaton = Automaton()
    first = session.stream(PROMPT, logits_processor=automaton)
    next(first)
    with pytest.raises(InvalidRequestError, match="another generation"):
        session.generate(PROMPT, logits_processor=automaton)
    next(first)
    first.close()
    results = session.generate_many([PROMPT, PROMPT], logits_processor=automaton, max_new_tokens=12)
    assert results[0].token_ids == results[1].token_ids


def test_forced_tokens_go_before_it(toys):
    """The grammar gets a forced token, even one that it forbids, and continues from there."""

    class Lenient(Automaton):
        def accept(self, token_id):
            self.states.append(token_id)

    forced = {0: 1, 5: 250, 6: 251, 12: 2}
    given = {"max_new_tokens": 20, "ignore_eos": True, "forced_token_ids": forced}
    session = toys.session("mtp", 4, 0.8)
    plain = session.generate(PROMPT, speculate="off", logits_processor=Lenient(), **given)
    assert [plain.token_ids[index] for index in forced] == list(forced.values())
    for k in range(1, 9):
        for drafter in (("mtp", 1.0), ("mtp", 0.5), ("ngram", None)):
            session = toys.session(drafter[0], k, drafter[1])
            assert session.generate(PROMPT, logits_processor=Lenient(), **given).token_ids == plain.token_ids


def test_a_ban_cannot_be_lifted(toys):
    def revive(prefix, logits):
        return np.where(np.arange(VOCABULARY) < 5, np.float32(50), logits)

    result = toys.session("mtp", 4, 0.7).generate(
        PROMPT, logits_processor=revive, banned_token_ids=[0, 1, 3, 4], max_new_tokens=10, ignore_eos=True
    )
    assert set(result.token_ids) == {2}


def test_only_banned_tokens_left(toys):
    def only_three(prefix, logits):
        return np.where(np.arange(VOCABULARY) < 3, logits, np.float32(-np.inf))

    session = toys.session("mtp", 4, 0.7)
    with pytest.raises(LogitsProcessorError, match="banned"):
        session.generate(PROMPT, logits_processor=only_three, banned_token_ids=[0, 1, 2], max_new_tokens=10)
    result = session.generate(PROMPT, logits_processor=only_three, banned_token_ids=[0, 2], max_new_tokens=10)
    assert set(result.token_ids) == {1}


def test_logits_may_be_changed_in_place_and_are_a_copy(toys):
    session = toys.session("mtp", 4, 0.7)
    seen = []

    def spoil(prefix, logits):
        seen.append((type(prefix), logits.dtype, logits.shape))
        logits += 3
        return logits

    given = {"max_new_tokens": 12, "logprobs": 2}
    changed = session.generate(PROMPT, logits_processor=spoil, **given)
    assert changed.logprobs == session.generate(PROMPT, **given).logprobs
    assert set(seen) == {(tuple, np.dtype(np.float32), (VOCABULARY,))}


class NoRollback:
    def __call__(self, prefix, logits):
        return logits

    def accept(self, token_id):
        """Nothing."""


class Uncertain:
    def __call__(self, prefix, logits):
        return logits

    def method(self, prefix, logits):
        return logits

    @classmethod
    def of_class(cls, prefix, logits):
        return logits

    @staticmethod
    def static(prefix, logits):
        return logits


async def coroutine(prefix, logits):
    return logits


def generator(prefix, logits):
    yield logits


BAD = [
    "top_k",
    7,
    [lambda prefix, logits: logits],
    Uncertain(),
    Uncertain().method,
    NoRollback(),
    Automaton,  # the class
    functools.partial(Uncertain()),
    lambda logits: logits,
    lambda: None,
    lambda prefix, logits, more: logits,
    coroutine,
    generator,
]


@pytest.mark.parametrize("processor", BAD, ids=repr)
def test_refused_before_any_work(toys, processor):
    session = toys.session("mtp", 4, 0.7)
    with pytest.raises(InvalidRequestError, match="logits_processor") as raised:
        session.stream(PROMPT, logits_processor=processor)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        (lambda prefix, logits: logits, "pure"),
        (lambda prefix, logits, scale=2: logits * scale, "pure"),
        (functools.partial(lambda scale, prefix, logits: logits, 3), "pure"),
        (operator.mul, "pure"),
        (Uncertain.of_class, "pure"),
        (Uncertain.static, "pure"),
        (Automaton(), "stateful"),
    ],
    ids=repr,
)
def test_kinds(processor, kind):
    assert processor_kind(processor) == kind


def after(count, result):
    """A pure processor that returns what ``result`` says once the output has ``count`` tokens."""

    def processor(prefix, logits):
        return result(logits) if len(prefix) - len(PROMPT) >= count else logits

    return processor


FAILURES = {
    "nothing": lambda logits: None,
    "list": lambda logits: logits.tolist(),
    "shape": lambda logits: logits[None],
    "short": lambda logits: logits[:-1],
    "nan": lambda logits: np.where(np.arange(VOCABULARY) == 5, np.nan, logits),
    "inf": lambda logits: np.where(np.arange(VOCABULARY) == 5, np.inf, logits),
    "none left": lambda logits: np.full_like(logits, -math.inf),
    "raises": lambda logits: logits["x"],
}


@pytest.mark.parametrize("speculate", ["on", "off"])
@pytest.mark.parametrize("failure", sorted(FAILURES))
def test_failures_are_errors_with_the_text_so_far(toys, failure, speculate):
    session = toys.session("mtp", 4, 1.0)
    given = {"max_new_tokens": 20, "ignore_eos": True, "speculate": speculate}
    text = session.generate(PROMPT, **given).text
    with pytest.raises(LogitsProcessorError, match=r"[Ll]ogits processor") as raised:
        session.generate(PROMPT, logits_processor=after(6, FAILURES[failure]), **given)
    assert raised.value.partial_text
    assert text.startswith(raised.value.partial_text)
    assert session.generate(PROMPT, **given).text == text


@pytest.mark.parametrize("failure", sorted(FAILURES))
def test_what_happens_on_a_rejected_path_is_no_error(toys, failure):
    """The output never gets there: plain decoding would not have called the processor."""
    given = {"max_new_tokens": 30, "ignore_eos": True}
    plain = toys.session("mtp", 4, 0.5).generate(PROMPT, speculate="off", **given).token_ids
    strayed = []

    def processor(prefix, logits):
        output = prefix[len(PROMPT) :]
        if output == plain[: len(output)]:
            return logits
        strayed.append(output)
        return FAILURES[failure](logits)

    for drafter in (("mtp", 0.5), ("mtp", 0.0), ("ngram", None)):
        session = toys.session(drafter[0], 4, drafter[1])
        assert session.generate(PROMPT, logits_processor=processor, **given).token_ids == plain
    assert strayed, "no draft was wrong: this shows nothing"


@pytest.mark.parametrize("method", ["accept", "rollback", "reset"])
def test_a_state_that_fails_to_move(toys, method):
    session = toys.session("mtp", 4, 0.5)
    automaton = Resettable()

    def fail(*arguments):
        raise RuntimeError("broken")

    setattr(automaton, method, fail)
    for _ in range(2):  # it does not stay marked as in use
        with pytest.raises(LogitsProcessorError, match="broken"):
            session.generate(PROMPT, logits_processor=automaton, max_new_tokens=30)


def test_a_result_in_json_names_it(toys):
    result = toys.session("mtp", 4, 0.7).generate(PROMPT, logits_processor=Automaton(), max_new_tokens=3)
    assert '"logits_processor":"' in result.model_dump_json()
    assert "Automaton" in result.model_dump_json()
