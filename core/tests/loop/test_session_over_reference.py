"""Sessions over a stepping engine: cancelling, threads, forks, closing, async twins, reasons and warnings."""

import asyncio
import os
import threading
import time
import warnings

import pytest
from polydraft._session.monitor import SpeculationWarning
from polydraft.contract import Proposal
from polydraft.errors import (
    EngineError,
    ForkedSessionError,
    SessionClosedError,
    SpeculationUnavailableError,
)

pytest.importorskip("polydraft_reference", reason="the loop is tested on the reference engine: polydraft-reference")

PROMPT = "<bos>Once upon a time"
LONG = {"max_new_tokens": 200, "ignore_eos": True}


@pytest.fixture
def session(kit):
    kit.logs.clear()
    with kit.session("mtp", 4) as made:
        yield made


def stored_is_emitted(log, prompt_token_ids, token_ids):
    emitted = [*prompt_token_ids, *token_ids]
    return log.stored_at_end == emitted[: log.length_at_end] and log.length_at_end >= len(emitted) - 1


# Cancelling


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_closing_the_iterator_cancels(kit, session, chunks):
    whole = session.generate(PROMPT, **LONG)
    kit.logs.clear()
    stream = session.stream(PROMPT, **LONG)
    token_ids = [token for _ in range(chunks) for token in next(stream).token_ids]
    stream.close()
    (log,) = kit.logs
    assert log.closes == 1
    assert len(log.steps) <= chunks
    assert tuple(token_ids) == whole.token_ids[: len(token_ids)]
    assert stored_is_emitted(log, whole.prompt_token_ids, token_ids)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert session.generate(PROMPT, **LONG).token_ids == whole.token_ids


def test_leaving_a_loop_over_the_stream_frees_the_sequence(kit, session):
    for chunk in session.stream(PROMPT, **LONG):
        assert chunk.token_ids
        break
    deadline = time.monotonic() + 5
    while not kit.logs[0].closes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kit.logs[0].closes == 1


def test_a_stream_that_is_never_begun_costs_nothing(kit, session):
    session.stream(PROMPT, **LONG).close()
    assert all(log.closes for log in kit.logs)


def test_closing_the_session_ends_its_streams(kit, session):
    stream = session.stream(PROMPT, **LONG)
    next(stream)
    session.close()
    with pytest.raises((SessionClosedError, StopIteration)):
        next(stream)
    assert kit.logs[0].closes == 1
    assert len(kit.logs[0].steps) < 50


# Interleaving and threads


def test_two_interleaved_streams(session):
    expected = [session.generate(prompt, **LONG).token_ids for prompt in (PROMPT, "<bos>Another")]
    streams = [session.stream(prompt, **LONG) for prompt in (PROMPT, "<bos>Another")]
    found = [[], []]
    going = [0, 1]
    while going:
        for index in list(going):
            try:
                found[index] += next(streams[index]).token_ids
            except StopIteration:
                going.remove(index)
    assert [tuple(tokens) for tokens in found] == expected


def test_two_sessions_at_once(kit):
    with kit.session("mtp", 4) as one, kit.session("draft-model", 3) as other:
        first, second = one.stream(PROMPT, **LONG), other.stream(PROMPT, **LONG)
        a = [token for _ in range(5) for token in next(first).token_ids]
        b = [token for _ in range(5) for token in next(second).token_ids]
        first.close()
        b += [token for chunk in second for token in chunk.token_ids]
        assert a == b[: len(a)]


@pytest.mark.parametrize("kind", ["mtp", "draft-model", "ngram"])
def test_several_threads(kit, kind):
    prompts = [f"<bos>Thread {index}" for index in range(4)]
    settings = {"max_new_tokens": 60, "temperature": 0.9, "seed": 5}
    with kit.session(kind, 4) as session:
        expected = [session.generate(prompt, **settings).token_ids for prompt in prompts]
        found = {}
        errors = []

        def work(index):
            try:
                for _ in range(3):
                    found.setdefault(index, set()).add(session.generate(prompts[index], **settings).token_ids)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert found == {index: {tokens} for index, tokens in enumerate(expected)}


# Closing and forking


def test_close_twice_and_use_after_close(session):
    session.close()
    session.close()
    with pytest.raises(SessionClosedError):
        session.generate(PROMPT)
    with pytest.raises(SessionClosedError):
        list(session.stream(PROMPT))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_use_in_a_forked_child(session):
    before = session.generate(PROMPT, max_new_tokens=10).token_ids
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
        child = os.fork()
    if not child:
        answer = b"nothing raised"
        try:
            session.generate(PROMPT, max_new_tokens=10)
        except BaseException as error:
            answer = type(error).__name__.encode()
        os.write(write, answer)
        os._exit(0)
    os.close(write)
    assert os.read(read, 100).decode() == ForkedSessionError.__name__
    os.close(read)
    os.waitpid(child, 0)
    assert session.generate(PROMPT, max_new_tokens=10).token_ids == before


# Async twins


def test_async_twins_give_the_same(session):
    settings = {"max_new_tokens": 60, "temperature": 0.8, "seed": 9}
    expected = session.generate(PROMPT, **settings)

    async def work():
        result = await session.agenerate(PROMPT, **settings)
        chunks = [chunk async for chunk in session.astream(PROMPT, **settings)]
        return result, chunks

    result, chunks = asyncio.run(work())
    assert result.token_ids == expected.token_ids
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text


def test_two_async_streams_at_once(session):
    expected = session.generate(PROMPT, max_new_tokens=60, ignore_eos=True).token_ids

    async def one():
        chunks = [chunk async for chunk in session.astream(PROMPT, max_new_tokens=60, ignore_eos=True)]
        return tuple(token for chunk in chunks for token in chunk.token_ids)

    async def work():
        return await asyncio.gather(one(), one(), one())

    assert asyncio.run(work()) == [expected] * 3


def test_cancelling_an_async_stream(kit, session):
    async def work():
        async for chunk in session.astream(PROMPT, **LONG):
            assert chunk.token_ids
            break

    asyncio.run(work())
    deadline = time.monotonic() + 5
    while not kit.logs[0].closes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kit.logs[0].closes == 1
    assert len(kit.logs[0].steps) < 40


def test_cancelling_an_async_generation(kit, session):
    async def work():
        task = asyncio.create_task(session.agenerate(PROMPT, max_new_tokens=900, ignore_eos=True))
        while not kit.logs or not kit.logs[0].steps:  # 900 tokens take far longer than this loop's next turn
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    deadline = time.monotonic() + 5
    while not kit.logs[0].closes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kit.logs[0].closes == 1


# Reasons and warnings


def test_speculate_off_says_so(kit, session):
    result = session.generate(PROMPT, max_new_tokens=20, speculate="off")
    assert result.speculation_off.code == "caller"
    assert result.speculation_off.message
    assert not kit.logs[0].proposals
    assert session.generate(PROMPT, max_new_tokens=20).speculation_off is None
    assert session.generate(PROMPT, max_new_tokens=20, speculate="on").speculation_off is None


def test_a_session_without_drafter_says_so(kit):
    made = len(kit.logs)
    with kit.session(None) as session:
        assert session.running.method is None
        result = session.generate(PROMPT, max_new_tokens=20)
        assert result.speculation_off is not None
        with pytest.raises(SpeculationUnavailableError):
            session.generate(PROMPT, max_new_tokens=20, speculate="on")
    assert len(kit.logs) == made + 1


def test_too_few_tokens_to_draft_any(session):
    result = session.generate(PROMPT, max_new_tokens=1)
    assert len(result.token_ids) == 1
    assert result.stats.num_drafts == 0
    assert result.speculation_off.code == "length"


class Silent:
    """A drafter that never proposes anything."""

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return Proposal([])


def test_a_silent_drafter_is_told_once(kit):
    silent = type("SilentSequence", (Silent, kit.sequence_class), {})
    with kit.session("mtp", 4, sequence_class=silent) as session, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [session.generate(PROMPT, **LONG) for _ in range(5)]
    assert [warning.category for warning in caught] == [SpeculationWarning]
    assert "draft" in str(caught[0].message)
    first = results[0]
    assert first.stats.num_draft_tokens == 0
    assert first.stats.acceptance_rate is None


def test_an_always_wrong_drafter_is_told_once(kit):
    with kit.session("mtp", 4, 0.0) as session, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            session.generate(PROMPT, **LONG)
    assert [warning.category for warning in caught] == [SpeculationWarning]
    assert "accept" in str(caught[0].message)


def test_a_good_drafter_is_not_complained_of(session):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            session.generate(PROMPT, **LONG)


def test_an_engine_that_fails_half_way(kit):
    class Failing(kit.sequence_class):
        def verify(self, token_ids, sampler, *, keep_logits=False):
            if self.length > 40:
                raise EngineError("The engine failed.", "Try again.")
            return super().verify(token_ids, sampler, keep_logits=keep_logits)

    kit.logs.clear()
    with kit.session("mtp", 4) as good:
        whole = good.generate(PROMPT, **LONG)
    kit.logs.clear()
    with kit.session("mtp", 4, sequence_class=Failing) as session, pytest.raises(EngineError) as caught:
        session.generate(PROMPT, **LONG)
    assert caught.value.partial_text
    assert whole.text.startswith(caught.value.partial_text)
    assert [log.closes for log in kit.logs] == [1]


# Answers


def test_generate_many_keeps_the_order_and_gives_each_its_noise(session):
    prompts = [PROMPT, "<bos>Another", PROMPT]
    results = session.generate_many(prompts, max_new_tokens=40, temperature=1.0, seed=4, ignore_eos=True)
    assert [result.prompt_token_ids for result in results] == [
        session.generate(prompt, max_new_tokens=1).prompt_token_ids for prompt in prompts
    ]
    assert results[0].token_ids != results[2].token_ids, "one seed, two streams of noise"
    plain = session.generate_many(prompts, max_new_tokens=40, temperature=1.0, seed=4, ignore_eos=True, speculate="off")
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]


def test_generate_many_steps_sequences_that_share_forwards_at_the_same_time(kit):
    """As many threads as share one, each waiting for the others here; and one that fails ends all."""
    meeting = threading.Barrier(3, timeout=20)

    class Sharing(kit.sequence_class):
        met, fails = False, False

        def verify(self, token_ids, sampler, *, keep_logits=False):
            if not self.met and not self.fails:
                self.met = True
                meeting.wait()
            if self.fails and self.length > 20:
                raise EngineError("The engine failed.", "Try again.")
            return super().verify(token_ids, sampler, keep_logits=keep_logits)

    prompts = [f"<bos>{number}" for number in range(6)]
    given = {"max_new_tokens": 30, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    with kit.session("mtp", 4) as alone:
        wanted = [one.token_ids for one in alone.generate_many(prompts, **given)]
    with kit.session("mtp", 4, sequence_class=Sharing) as session:
        session.engine.shared_sequences = 3
        assert [one.token_ids for one in session.generate_many(prompts, **given)] == wanted
        Sharing.fails = True
        with pytest.raises(EngineError, match="engine failed"):
            session.generate_many(prompts, **given)


def test_generate_many_draws_a_seed_for_all_without_setting_one(kit):
    with kit.session("mtp", 4) as session:
        session._capabilities = session._capabilities.model_copy(
            update={"sampling": session._capabilities.sampling - {"seed"}}
        )
        results = session.generate_many([PROMPT, PROMPT], max_new_tokens=40, temperature=1.0, ignore_eos=True)
    assert len({result.settings.seed for result in results}) == 1
    assert results[0].token_ids != results[1].token_ids


def test_a_drawn_seed_is_reported(session):
    result = session.generate(PROMPT, max_new_tokens=40, temperature=1.0)
    again = session.generate(PROMPT, max_new_tokens=40, temperature=1.0, seed=result.settings.seed)
    assert again.token_ids == result.token_ids


def test_text_prompts_get_bos_once(session):
    bos = session.tokenizer.bos_token_id
    for prompt in ("Hi", "<bos>Hi", [{"role": "user", "content": "Hi"}]):
        ids = session.generate(prompt, max_new_tokens=1).prompt_token_ids
        assert ids.count(bos) == 1
        assert ids[0] == bos
