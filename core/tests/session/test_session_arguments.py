"""The arguments of calls: the same for all five methods, all public; the room they leave; what is timed."""

import asyncio
import inspect
import time

import pytest
from polydraft import Session
from polydraft.contract import Capabilities, GenerationSettings
from polydraft.errors import EngineError, InvalidRequestError, SpeculationUnavailableError, UnsupportedError
from scripted_engines import Whole, emit

PROMPT = "<bos>Once upon a time"
CALLS = ["generate", "stream", "generate_many", "agenerate", "astream"]


def call(session, name, **arguments):
    """The results of a call of any kind."""

    async def last(chunks):
        return [chunk async for chunk in chunks]

    if name == "generate_many":
        return session.generate_many([PROMPT], **arguments)
    if name == "agenerate":
        return asyncio.run(session.agenerate(PROMPT, **arguments))
    if name == "astream":
        return asyncio.run(last(session.astream(PROMPT, **arguments)))
    return list(session.stream(PROMPT, **arguments)) if name == "stream" else session.generate(PROMPT, **arguments)


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_is_private(make_session, name):
    session = make_session()
    for unknown in ("noise_stream", "tempreature"):
        with pytest.raises(InvalidRequestError, match=f"no setting named {unknown}"):
            call(session, name, **{unknown: 1})


@pytest.mark.parametrize("name", CALLS)
def test_help_shows_every_setting(name):
    parameters = inspect.signature(getattr(Session, name)).parameters
    others = {"speculate", "num_speculative_tokens", "response_format", "tools", "tool_choice"}
    others |= {"chat_template_kwargs", "continue_final_message"}
    settings = {*GenerationSettings.model_fields} | others
    assert settings == set(parameters) - {"self", "prompt", "prompts"}
    assert all(parameters[one].kind is inspect.Parameter.KEYWORD_ONLY for one in settings)


def test_no_room_to_draft(make_session):
    session = make_session()
    context = session.running.context_length
    for room, off in ((3, False), (2, True), (1, True)):
        prompt = [65] * (context - room)
        result = session.generate(prompt, max_new_tokens=50, ignore_eos=True)
        assert len(result.token_ids) == room
        assert (result.speculation_off is not None) == off
        if off:
            assert result.speculation_off.code == "length"
            with pytest.raises(SpeculationUnavailableError, match="Too few tokens"):
                session.generate(prompt, max_new_tokens=50, speculate="on")
        else:
            assert result.stats.num_drafts == 1


def test_k_of_a_call(make_session):
    session = make_session()
    how = {"max_new_tokens": 30, "ignore_eos": True}
    expected = session.generate(PROMPT, **how)
    for k in (1, 2, 4, None):
        result = session.generate(PROMPT, num_speculative_tokens=k, speculate="on", **how)
        assert result.token_ids == expected.token_ids
        chunks = session.stream(PROMPT, num_speculative_tokens=k, **how)
        assert max(chunk.num_draft_tokens for chunk in chunks) == (k or 4)
    for wrong in (0, 5, -1, 2.5, "auto"):
        with pytest.raises(InvalidRequestError, match="from 1 to 4") as caught:
            session.generate(PROMPT, num_speculative_tokens=wrong)
        assert caught.value.argument == "num_speculative_tokens"


def test_an_engine_with_one_k():
    """A whole engine drafts as it was loaded to."""
    engine = Whole()
    session = Session(engine, engine.running, Capabilities(drafter_kinds=frozenset({"ngram"})))
    assert session.generate([1], max_new_tokens=4, num_speculative_tokens=2).token_ids == (1,) * 4
    with pytest.raises(UnsupportedError, match="one k for all calls"):
        session.generate([1], max_new_tokens=4, num_speculative_tokens=1)


def test_chunks_hold_the_drafts(make_session):
    for chunk in make_session().stream(PROMPT, max_new_tokens=40, ignore_eos=True):
        assert len(chunk.draft_token_ids) == chunk.num_draft_tokens
        accepted = chunk.num_accepted_tokens
        assert chunk.draft_token_ids[:accepted] == chunk.token_ids[:accepted]
        rejected = chunk.draft_token_ids[accepted : accepted + 1]
        assert not rejected or chunk.token_ids[accepted:] != rejected


def test_drafts_that_do_not_add_up():
    engine = Whole(lambda generation: iter([emit(generation, drafted=2, accepted=0, draft_token_ids=[1])]))
    session = Session(engine, engine.running, Capabilities(drafter_kinds=frozenset({"ngram"})))
    with pytest.raises(EngineError, match="gave 1 drafts and reported 2"):
        session.generate([1])


def test_waiting_for_another_call_is_no_prefill(make_session):
    session = make_session()
    holder = session.stream(PROMPT, max_new_tokens=20, ignore_eos=True)
    next(holder)

    async def work():
        task = asyncio.create_task(session.agenerate(PROMPT, max_new_tokens=2))
        thread = asyncio.create_task(asyncio.to_thread(session.generate, PROMPT, max_new_tokens=2))
        await asyncio.sleep(2)
        holder.close()
        return await asyncio.gather(task, thread)

    began = time.perf_counter()
    results = asyncio.run(asyncio.wait_for(work(), 30))
    assert time.perf_counter() - began > 2
    assert all(result.stats.prefill_seconds < 1.5 for result in results)
