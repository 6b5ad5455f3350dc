"""The mistakes that authors of stepping engines make: the first call names the rule that was broken."""

import numpy as np
import pytest
from polydraft._session.session import Session
from polydraft.contract import Proposal, Step
from polydraft.errors import EngineError, PluginError
from polydraft.sampling.numpy_ops import NumpyOps
from scripted_engines import CAPABILITIES, VOCABULARY, Sequence, Stepping

PROMPT = "abc"


class Honest(Sequence):
    """Chooses through the sampler; every choice and draft is token 1. ``mistake`` is what a test makes of it."""

    def __init__(self, mistake=""):
        super().__init__({})
        self.mistake = mistake

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.length = len(token_ids) + (self.mistake == "prefill stores too much")
        if self.mistake == "prefill gives the prompt's rows":
            return Step(sampler.choose(rows(len(token_ids)), 1, token_ids)[0])
        if self.mistake == "prefill's place":
            return Step(sampler.choose(rows(1), len(token_ids) - 1, token_ids[-1:])[0])
        return Step(*through(sampler.choose(rows(1), len(token_ids), token_ids[-1:])))

    def verify(self, token_ids, sampler, *, keep_logits=False):
        first, count = self.length + 1, len(token_ids)
        self.length += count - (self.mistake == "newest not stored")
        logits = MADE.get(self.mistake, rows)(count)
        if self.mistake == "not unpacked":
            return Step(sampler.choose(logits, first, token_ids))
        if self.mistake == "last row only":
            return Step(sampler.choose(logits[-1:], first + count - 1, token_ids[-1:])[0])
        if self.mistake == "last id only":
            return Step(sampler.choose(logits, first, token_ids[-1:])[0])
        if self.mistake == "one place on":
            return Step(sampler.choose(logits, first + 1, token_ids)[0])
        if self.mistake == "one place back":
            return Step(sampler.choose(logits, first - 1, token_ids)[0])
        if self.mistake == "one choice":
            return Step(sampler.choose(logits, first, token_ids)[0][-1:])
        if self.mistake == "no logprobs":
            return Step(sampler.choose(logits, first, token_ids)[0])
        if self.mistake == "ids as an array":
            return Step(*through(sampler.choose(logits, first, np.array(token_ids))))
        if self.mistake == "ids as a tuple":
            return Step(*through(sampler.choose(logits, first, tuple(token_ids))))
        return Step(*through(sampler.choose(logits, first, token_ids)))

    def rollback(self, length):
        by = {"rolls back too far": -1, "rolls back too little": 1}.get(self.mistake, 0)
        self.length = self.length - length if self.mistake == "forgets a number" else length + by

    def propose(self, newest, k, sampler, *, keep_logits=False):
        first = self.length + 1 + {"draft places on": 1, "draft places back": -1}.get(self.mistake, 0)
        drafts = []
        for place in range(first, first + k):
            row = rows(1)[0] if self.mistake == "a flat draft row" else rows(1)
            known = [newest, *drafts][self.mistake == "a prefix without the newest" :]
            drafts.append(int(sampler.choose_draft(row, place, known)[0]))
        if self.mistake == "stores drafts":
            self.length += k
        if self.mistake == "chooses drafts as tokens":
            sampler.choose(rows(1), first, [newest])
        return Proposal([newest, *drafts] if self.mistake == "newest among drafts" else drafts)


class Foreign(list):
    """An array of a library that numpy does not know."""

    shape = (3, VOCABULARY)


def rows(count):
    logits = np.zeros((count, VOCABULARY), np.float32)
    logits[:, 1] = 1.0
    return logits


def through(chosen):
    token_ids, logprobs = chosen
    return token_ids, None, logprobs


MADE = {
    "transposed": lambda count: rows(count).T,
    "flat": lambda count: rows(count).ravel(),
    "integers": lambda count: rows(count).astype(int),
    "foreign": lambda count: Foreign(),
    "float16": lambda count: rows(count).astype(np.float16),
    "float64": lambda count: rows(count).astype(np.float64),
    "not contiguous": lambda count: np.asfortranarray(np.repeat(rows(count), 2, axis=0))[::2],
}
ALL_ROWS = r"verify was given the ids \[1, 1, 1\] but chose for \[1\]: `run_token_ids`.* are the ids of all rows"
MISTAKES = {
    "prefill gives the prompt's rows": r"prefill chose for 3 ids: it chooses one token, from the row of the prompt's",
    "prefill's place": r"prefill chose from position 2 on, not 3: `first_position` of `sampler.choose` is one past",
    "prefill stores too much": r"After a prefill of 3 ids, `length` is 4",
    "not unpacked": r"`sampler.choose` returns two things",
    "last row only": ALL_ROWS,
    "last id only": ALL_ROWS,
    "one place on": r"verify chose from position 5 on, not 4: `first_position`",
    "one place back": r"verify chose from position 3 on, not 4: `first_position`",
    "one choice": r"verify ran 3 ids but chose 1: .*`run_token_ids` of `sampler.choose` are the ids of all rows",
    "newest not stored": r"verify ran 3 ids after 3 stored ones, and `length` is then 5, not 6",
    "rolls back too far": r"After rollback\(6\), `length` is 5: its argument is the number of tokens to keep",
    "rolls back too little": r"After rollback\(6\), `length` is 7: its argument is the number of tokens to keep",
    "forgets a number": r"After rollback\(6\), `length` is 0: its argument is the number of tokens to keep",
    "draft places on": r"`choose_draft` was given the position 5: the first draft of this round has the position 4",
    "draft places back": r"`choose_draft` was given the position 3: the first draft of this round has the position 4",
    "stores drafts": r"propose changed `length` from 3 to 5",
    "chooses drafts as tokens": r"propose called `choose`, .*drafts are for `choose_draft`",
    "newest among drafts": r"proposed more than the 2 tokens .*the newest token is none of them",
    "a flat draft row": r"shape \(16,\) to `sampler.choose_draft`: it takes one row, of shape \(1, vocab\)",
    "transposed": r"shape \(16, 3\) .* here \(3, 16\), so these are transposed",
    "flat": r"shape \(48,\) .* one row per token that was run and one column per token id, here \(3, 16\)",
    "integers": r"dtype int64: they are floats",
    "foreign": r"of the type \w+\.Foreign, and has no `array_ops`",
}


def session_of(mistake=""):
    engine = Stepping()
    engine.open_sequence = lambda: Honest(mistake)
    return Session(engine, engine.running, CAPABILITIES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_rule_at_the_first_call(mistake):
    with session_of(mistake) as session, pytest.raises(EngineError, match=MISTAKES[mistake]) as caught:
        session.generate(PROMPT, max_new_tokens=9)
    assert "scripted" in caught.value.hint or caught.value.hint.startswith("This is a defect of the backend;")


@pytest.mark.parametrize("honest", ["", "float16", "float64", "not contiguous", "ids as an array", "ids as a tuple"])
def test_what_the_contract_allows_is_no_mistake(honest):
    with session_of(honest) as session:
        for settings in ({}, {"temperature": 1.0, "seed": 1, "logit_bias": {1: 100.0}}, {"logprobs": 1}):
            assert session.generate(PROMPT, max_new_tokens=9, **settings).text == "b" * 9


def test_what_only_some_settings_show():
    with session_of("no logprobs") as session:
        assert session.generate(PROMPT, max_new_tokens=9).text == "b" * 9
        with pytest.raises(EngineError, match=r"`Step.logprobs` is the second\s+thing that `sampler.choose` returns"):
            session.generate(PROMPT, max_new_tokens=9, logprobs=1)
    newest = pytest.raises(EngineError, match="are the newest token, 1, and the drafts of the round so far")
    with session_of("a prefix without the newest") as session, newest:
        session.generate(PROMPT, max_new_tokens=9, repetition_penalty=1.1)


def test_an_engine_with_operations_of_its_own_gives_its_own_arrays():
    class Own(NumpyOps):
        """Not the ones that stand in for an engine that has none."""

    engine = Stepping()
    engine.array_ops = Own()
    engine.open_sequence = lambda: Honest("integers")
    with Session(engine, engine.running, CAPABILITIES) as session:
        assert session.generate(PROMPT, max_new_tokens=9).text == "b" * 9


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("eos_token_ids", [3], r"eos_token_ids is \[3\], not a frozenset of token ids"),
        ("special_token_ids", None, "special_token_ids is None, not a frozenset"),
        ("eos_token_ids", frozenset({"</s>"}), "eos_token_ids is frozenset.*, not a frozenset of token ids"),
        ("bos_token_id", "<s>", "bos_token_id is '<s>', neither a token id nor None"),
    ],
)
def test_a_tokenizer_is_checked_when_it_is_loaded(name, value, why):
    engine = Stepping()
    setattr(engine.tokenizer, name, value)
    with pytest.raises(PluginError, match=why):
        Session(engine, engine.running, CAPABILITIES)


def test_operations_on_arrays_are_complete():
    class Few:
        float32 = int64 = bits = from_bits = staticmethod(lambda array: array)

    engine = Stepping()
    engine.array_ops = Few()
    with pytest.raises(PluginError, match="its array_ops, a Few, have no method column"):
        Session(engine, engine.running, CAPABILITIES)
