"""The official client: sync, async, streams, errors, a client that leaves."""

import asyncio

import polydraft
import pytest
from scripted import Script
from serving import eventually

openai = pytest.importorskip("openai")

CHAT = [{"role": "user", "content": "Tell me a story."}]


def client_of(server, kind=openai.OpenAI, **options):
    return kind(base_url=server.url, api_key="none", **{"max_retries": 0, **options})


def test_chat(toy):
    server, session = toy
    expected = session.generate(CHAT, max_new_tokens=30)
    client = client_of(server)
    done = client.chat.completions.create(model="builtin:toy", messages=CHAT, max_tokens=30, temperature=0)
    assert done.choices[0].message.content == expected.text
    assert done.usage.completion_tokens_details.accepted_prediction_tokens == expected.stats.num_accepted_tokens
    assert done.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] == expected.stats.num_drafts
    asked = {"model": "builtin:toy", "messages": CHAT, "max_tokens": 30, "stream": True}
    with client.chat.completions.create(**asked, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    plain = client.chat.completions.create(**{**asked, "stream": False}, extra_body={"speculate": "off"})
    assert plain.choices[0].message.content == expected.text


def test_completions_and_models(toy):
    server, session = toy
    client = client_of(server)
    (model,) = client.models.list()
    done = client.completions.create(model=model.id, prompt=[256, 72, 105], max_tokens=8, logprobs=2)
    expected = session.generate([256, 72, 105], max_new_tokens=8)
    assert done.choices[0].text == expected.text
    assert len(done.choices[0].logprobs.top_logprobs) == len(expected.token_ids)


def test_errors_have_the_clients_types(toy):
    server, _ = toy
    client = client_of(server)
    with pytest.raises(openai.BadRequestError, match="is not allowed") as caught:
        client.chat.completions.create(model="builtin:toy", messages=CHAT, temperature=-3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="Did you mean `builtin:toy`"):
        client.chat.completions.create(model="builtin:tou", messages=CHAT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="builtin:toy", prompt="x" * 9000)
    assert caught.value.code == "context_length_exceeded"


def test_an_error_in_a_stream(scripted):
    with scripted(Script(error=polydraft.errors.EngineError("It broke.", "Mend it."))) as server:
        stream = client_of(server).chat.completions.create(model="scripted", messages=CHAT, stream=True)
        with pytest.raises(openai.APIError, match=r"It broke\. Mend it\."):
            list(stream)


def test_async_and_cancelled(scripted):
    script = Script(pace=0.005)

    async def go(server):
        async with client_of(server, openai.AsyncOpenAI) as client:
            asked = {"model": "scripted", "messages": CHAT}
            done = await asyncio.gather(*(client.chat.completions.create(**asked, max_tokens=5) for _ in range(4)))
            assert [one.choices[0].message.content for one in done] == ["abcde"] * 4
            async with await client.chat.completions.create(**asked, stream=True) as stream:
                async for chunk in stream:
                    if chunk.choices[0].delta.content:
                        break
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.chat.completions.create(**asked)

    with scripted(script) as server:
        asyncio.run(go(server))
        eventually(lambda: script.working == 0)
        assert script.cancelled == 2


def test_a_full_queue_is_tried_again(scripted, monkeypatch):
    monkeypatch.setattr("polydraft_server.admission._FIRST_GUESS", 0.0)
    script = Script(pace=0.01)

    async def go(server):
        async with client_of(server, openai.AsyncOpenAI, max_retries=5) as client:
            asked = {"model": "scripted", "prompt": "x", "max_tokens": 20}
            return await asyncio.gather(*(client.completions.create(**asked) for _ in range(3)))

    with scripted(script, max_waiting=1) as server:
        assert [done.choices[0].text for done in asyncio.run(go(server))] == ["abcdefghij" * 2] * 3
        assert server.metric("polydraft:request_errors_total") > 0
