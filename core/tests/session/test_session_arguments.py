"""The arguments of calls: the same for all five methods, all public; the room they leave; what is timed."""

import asyncio
import inspect
import time

import pytest
from polydraft import Session
from polydraft.contract import GenerationSettings
from polydraft.errors import InvalidRequestError, SpeculationUnavailableError

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
    others = {"speculate", "num_speculative_tokens", "tools", "chat_template_kwargs", "continue_final_message"}
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
