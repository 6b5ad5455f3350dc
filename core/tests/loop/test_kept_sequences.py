"""Prompts that take over the sequence of an earlier call: what is reused, what is run, and that the output is equal."""

import random
import threading

import pytest
from polydraft._loop import kept
from polydraft.contract import EngineSequence, TokenRequest
from polydraft.engine_parts.draft_model import DraftModelSequence
from polydraft.errors import EngineError, OutOfMemoryError

pytest.importorskip("polydraft_reference", reason="the loop is tested on the reference engine: polydraft-reference")

FIRST = [3, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60]
MORE = [70, 71, 72]
OUTPUT = {"max_new_tokens": 20, "ignore_eos": True}
KINDS = ["mtp", "draft-model", "ngram", None]


@pytest.fixture
def session(kit):
    kit.logs.clear()
    with kit.session("mtp", 4, prefix_cache_bytes=None) as made:
        yield made


def fresh(kit, prompt, kind="mtp", **settings):
    return kit.shared(kind, 4 if kind else 0).generate(prompt, **{**OUTPUT, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_six_turns_run_what_is_new(kit, kind):
    """Past the sliding window too, greedy and sampled, with and without drafts."""
    with kit.session(kind, 4 if kind else 0, prefix_cache_bytes=None) as session:
        prompt, stored = FIRST, 0
        for turn in range(6):
            settings = {"temperature": 0.8, "seed": turn} if turn % 2 else {}
            speculate = "off" if turn == 3 else "auto"  # the drafter then has to catch up
            kit.logs.clear()
            result = session.generate(prompt, **OUTPUT, **settings, speculate=speculate)
            assert result.token_ids == fresh(kit, prompt, kind, **settings).token_ids
            reused = result.stats.num_reused_tokens
            assert stored - 1 <= reused <= stored  # the newest token may never have been run
            prompt = [*prompt, *result.token_ids, *MORE]
            stored = len(prompt) - len(MORE)
        assert len(session._kept._kept) == 1


def test_only_the_rest_is_prefilled(kit, session):
    first = session.generate(FIRST, **OUTPUT)
    (log,) = kit.logs
    prompt = [*FIRST, *first.token_ids, *MORE]
    second = session.generate(prompt, **OUTPUT)
    assert kit.logs == [log]
    assert log.prompt == prompt[second.stats.num_reused_tokens :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_again_runs_its_last_token(kit, kind):
    with kit.session(kind, 4 if kind else 0, prefix_cache_bytes=None) as session:
        # Inside the window: the cache can go back.
        one, other = (session.generate(FIRST[:6], max_new_tokens=4, ignore_eos=True) for _ in range(2))
        assert (one.stats.num_reused_tokens, other.stats.num_reused_tokens) == (0, 5)
        assert one.token_ids == other.token_ids


def test_a_window_that_rolled_over_is_run_again(kit, session):
    session.generate(FIRST, **{**OUTPUT, "max_new_tokens": 60})
    prompt = [*FIRST, *MORE]
    result = session.generate(prompt, **OUTPUT)
    assert result.stats.num_reused_tokens == 0
    assert result.token_ids == fresh(kit, prompt).token_ids


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_cancelled_call(kit, kind, chunks):
    with kit.session(kind, 4 if kind else 0, prefix_cache_bytes=None) as session:
        stream = session.stream(FIRST, **OUTPUT)
        said = [token for _ in range(chunks) for token in next(stream).token_ids]
        stream.close()
        prompt = [*FIRST, *said, *MORE]
        result = session.generate(prompt, **OUTPUT)
        assert result.stats.num_reused_tokens >= len(FIRST)
        assert result.token_ids == fresh(kit, prompt, kind).token_ids


def test_after_an_error_nothing_is_kept(kit):
    class Failing(kit.sequence_class):
        def verify(self, token_ids, sampler, *, keep_logits=False):
            step = super().verify(token_ids, sampler, keep_logits=keep_logits)
            if self.length > 20:
                raise RuntimeError("too long")
            return step

    kit.logs.clear()
    with kit.session("mtp", 4, sequence_class=Failing, prefix_cache_bytes=None) as session:
        with pytest.raises(EngineError, match="too long"):
            session.generate(FIRST, **OUTPUT)
        assert session._kept._kept == []
        assert [log.closes for log in kit.logs] == [1]
        assert session.generate(FIRST, max_new_tokens=2).stats.num_reused_tokens == 0


def test_after_a_row_that_was_not_finite_nothing_is_kept(kit):
    class Unsound(kit.sequence_class):
        def choose(self, logits, token_ids, sampler, keep_logits):
            if len(logits) > 1:
                logits[-1] = float("nan")
            return super().choose(logits, token_ids, sampler, keep_logits)

    with kit.session("mtp", 4, sequence_class=Unsound, prefix_cache_bytes=None) as session:
        session.generate(FIRST, **OUTPUT)
        assert session._kept._kept == []


def test_of_two_that_want_it_one_takes_it(kit, session):
    said = session.generate(FIRST, **OUTPUT).token_ids
    prompt = [*FIRST, *said, *MORE]
    streams = [session.stream(prompt, **OUTPUT) for _ in range(2)]
    for stream in streams:
        next(stream)
    results = []
    threads = [threading.Thread(target=lambda one=one: [*one]) for one in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [stream.result for stream in streams]
    assert sorted(result.stats.num_reused_tokens > 0 for result in results) == [False, True]
    assert {result.token_ids for result in results} == {fresh(kit, prompt).token_ids}


def test_conversations_in_turn(kit, session):
    draw = random.Random(1)
    prompts = [[3, *(draw.randrange(60, 120) for _ in range(10))] for _ in range(3)]
    for turn in range(3):
        for index, prompt in enumerate(prompts):
            result = session.generate(prompt, **OUTPUT)
            assert result.token_ids == fresh(kit, prompt).token_ids
            assert (result.stats.num_reused_tokens > len(prompt) // 2) == (turn > 0)
            prompts[index] = [*prompt, *result.token_ids, *MORE]


def test_a_short_beginning_in_common_leaves_a_conversation_alone(kit, session):
    said = session.generate(FIRST[:10], max_new_tokens=3, ignore_eos=True).token_ids
    assert session.generate([*FIRST[:3], *MORE * 3], max_new_tokens=2).stats.num_reused_tokens == 0
    prompt = [*FIRST[:10], *said, *MORE]
    assert session.generate(prompt, max_new_tokens=2).stats.num_reused_tokens >= 12


def test_the_least_recently_used_goes_first(kit):
    kit.logs.clear()
    with kit.session("mtp", 4, prefix_cache_bytes=None) as session:
        session.generate(FIRST, max_new_tokens=2)
        size = session._kept._kept[0].sequence.held_bytes
    kit.logs.clear()
    with kit.session("mtp", 4, prefix_cache_bytes=2 * size) as session:
        for first in (3, 4, 5):
            session.generate([first, *MORE], max_new_tokens=2)
        assert [log.closes for log in kit.logs] == [1, 0, 0]
        assert session.generate([4, *MORE, 9], max_new_tokens=2).stats.num_reused_tokens == 4
        assert session.generate([3, *MORE, 9], max_new_tokens=2).stats.num_reused_tokens == 0
    assert [log.closes for log in kit.logs] == [1] * 4


def test_0_keeps_nothing(kit):
    kit.logs.clear()
    with kit.session("mtp", 4, prefix_cache_bytes=0) as session:
        for _ in range(2):
            assert session.generate(FIRST, **OUTPUT).stats.num_reused_tokens == 0
        assert [log.closes for log in kit.logs] == [1, 1]


def test_what_is_kept_gives_way_to_a_prompt(kit):
    class Full(kit.sequence_class):
        full = False

        def prefill(self, token_ids, sampler, *, keep_logits=False):
            if Full.full and not all(log.closes for log in kit.logs[:-1]):
                raise OutOfMemoryError("No room.", "Make some.")
            return super().prefill(token_ids, sampler, keep_logits=keep_logits)

    kit.logs.clear()
    with kit.session("mtp", 4, sequence_class=Full, prefix_cache_bytes=None) as session:
        session.generate(FIRST, **OUTPUT)
        Full.full = True
        # The sequence that failed is among those that are closed.
        kit.logs.append(kit.logs[0])
        result = session.generate([5, *MORE], **OUTPUT)
        assert result.token_ids == fresh(kit, [5, *MORE]).token_ids
        assert kit.logs[0].closes == 1


def test_engines_with_one_sequence(kit):
    """A kept sequence counts: it is closed before another one is opened."""
    kit.logs.clear()
    with kit.session("mtp", 4, prefix_cache_bytes=None) as session:
        session.engine.max_sequences = 1
        session.generate(FIRST, **OUTPUT)
        session.generate([5, *MORE], **OUTPUT)
        assert [log.closes for log in kit.logs] == [1, 0]


def test_what_else_decides_the_kv_separates_requests(session, monkeypatch):
    assert kept._OF_KV == ()
    monkeypatch.setattr(kept, "_OF_KV", ("seed",))
    said = session.generate(FIRST, **OUTPUT, seed=1).token_ids
    prompt = [*FIRST, *said, *MORE]
    assert session.generate(prompt, max_new_tokens=2, seed=2).stats.num_reused_tokens == 0
    assert session.generate(prompt, max_new_tokens=2, seed=1).stats.num_reused_tokens >= len(FIRST)


def test_the_fields_that_do_not_are_fields():
    assert set(TokenRequest.model_fields) >= kept._NOT_OF_KV


def test_bitwise_sessions_ask_for_what_a_prefill_ran(kit):
    asked = []

    class Asked(kit.sequence_class):
        def reusable(self, length):
            asked.append(length)
            return super().reusable(length)

    fields = {"sequence_class": Asked, "exactness": "bitwise", "prefix_cache_bytes": None}
    with kit.session("mtp", 4, **fields) as session:
        said = session.generate(FIRST, max_new_tokens=3, ignore_eos=True).token_ids
        assert session.generate([*FIRST, *said, *MORE], max_new_tokens=1).stats.num_reused_tokens == len(FIRST)
    assert asked[:2] == [len(FIRST)] * 2


def test_a_wrong_answer_is_told(kit):
    class TooMuch(kit.sequence_class):
        def reusable(self, length):
            return length + 1

    with kit.session("mtp", 4, sequence_class=TooMuch, prefix_cache_bytes=None) as session:
        said = session.generate(FIRST, **OUTPUT).token_ids
        with pytest.raises(EngineError, match=r"Asked for the first \d+ tokens, reusable\(\) answered"):
            session.generate([*FIRST, *said, *MORE], **OUTPUT)


def test_a_draft_model_that_cannot_go_on_keeps_the_pair_from_it():
    class Other(EngineSequence):
        length = 5
        prefill = verify = rollback = close = None

    class Target(Other):
        def reusable(self, length):
            return length

    pair = DraftModelSequence(Target(), Other(), step_rows=2)
    assert pair.reusable(5) == 5
    pair._drafted = [1]
    assert pair.reusable(5) == 0


def test_texts_are_compared_to_the_last_common_token():
    draw = random.Random(2)
    for _ in range(300):
        one = tuple(draw.choices((1, 2), weights=(9, 1), k=draw.randrange(12)))
        other = tuple(draw.choices((1, 2), weights=(9, 1), k=draw.randrange(12)))
        shared = 0
        while shared < min(len(one), len(other)) and one[shared] == other[shared]:
            shared += 1
        assert kept._common(one, other) == shared
