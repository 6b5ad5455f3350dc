"""An engine that gives text, and has a tokenizer: ids that are not certain are None."""

import pytest
from polydraft._session.session import Session
from polydraft.contract import Capabilities
from polydraft.contract.results import compared
from scripted_engines import Whole, emit

CLAIMS = Capabilities(drafter_kinds=frozenset({"ngram"}), sampling=frozenset())


def session(*rounds, confirms=False):
    """A session whose rounds are (ids, whether they are certain)."""

    def made(generation):
        for index, (token_ids, certain) in enumerate(rounds):
            found = emit(generation, token_ids, drafted=1, accepted=0, certain_ids=certain)
            if confirms and index == len(rounds) - 1:
                generation.confirm_ids()
            yield found

    engine = Whole(made)
    return Session(engine, engine.running, CLAIMS)


@pytest.mark.parametrize(("confirms", "ids"), [(False, None), (True, (1, 2, 3))])
def test_none_unless_they_are_confirmed(confirms, ids):
    stream = session(([1], True), ([2], False), ([3], True), confirms=confirms).stream("a", max_new_tokens=3)
    chunks = list(stream)
    assert [chunk.token_ids for chunk in chunks] == [(1,), None, (3,)]
    assert "tokens not known" in repr(chunks[1])
    assert (stream.result.token_ids, stream.result.raw_text, stream.result.stats.num_tokens) == (ids, "bcd", 3)


def test_a_session_gives_the_tokenizers_where_it_is_told_to():
    opened = session(([1, 2], False))
    opened.spells_ids = True
    stream = opened.stream("a", max_new_tokens=2)
    assert [chunk.token_ids for chunk in stream] == [(1, 2)]
    assert stream.result.token_ids == (1, 2)


def test_outputs_are_then_compared_by_their_characters():
    """And not beyond the end of the shorter one, where a limit of tokens ended one."""
    plain = session(([1], True), ([2], True), ([3], True)).generate("a", max_new_tokens=3)
    longer = session(([1, 2, 3, 4], False)).generate("a", max_new_tokens=4)
    other = session(([1, 2, 4], False)).generate("a", max_new_tokens=3)
    stopped = session(([1, 2], False)).generate("a", max_new_tokens=4, stop="c")
    assert compared(plain, longer) == (tuple(b"bcd"), tuple(b"bcd"))
    assert compared(plain, other) == (tuple(b"bcd"), tuple(b"bce"))
    assert compared(stopped, stopped) == (tuple(b"bc"), tuple(b"bc"))
    assert compared(plain, plain) == ((1, 2, 3), (1, 2, 3))


def test_ids_that_a_session_was_told_to_give_are_compared_by_their_characters_too():
    spelling = session(([1, 2], False))
    spelling.spells_ids = True
    plain, found = session(([1, 2], True)).generate("a", max_new_tokens=2), spelling.generate("a", max_new_tokens=2)
    assert (plain.certain_ids, found.certain_ids) == (True, False)
    assert found.token_ids == (1, 2)
    assert "certain_ids" not in found.model_dump()
    assert compared(plain, found) == (tuple(b"bc"), tuple(b"bc"))
