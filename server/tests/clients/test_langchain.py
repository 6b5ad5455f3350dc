"""langchain-openai's chat model and its plain one: whole, streamed, async, tools."""

import asyncio

import pytest
from asked import CHAT, SHAPE, WEATHER, check_shape

langchain_openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai: `nox -s clients`")


def chat(server, model="builtin:toy", **fields):
    return langchain_openai.ChatOpenAI(base_url=server.url, api_key="none", model=model, **fields)


def accepted(message):
    return message.response_metadata["token_usage"]["completion_tokens_details"]["accepted_prediction_tokens"]


def test_whole_and_streamed(toy, story):
    server, session = toy
    done = chat(server, max_tokens=30).invoke(CHAT)
    assert done.content == story.text
    assert accepted(done) == story.stats.num_accepted_tokens > 0
    chunks = list(chat(server, max_tokens=30, stream_usage=True).stream(CHAT))
    assert "".join(chunk.content for chunk in chunks) == story.text
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == len(
        story.token_ids
    )
    k2 = session.generate(CHAT, max_new_tokens=30, num_speculative_tokens=2)
    done = chat(server, max_tokens=30, extra_body={"num_speculative_tokens": 2}).invoke(CHAT)
    assert accepted(done) == k2.stats.num_accepted_tokens


def test_async_and_in_batches(toy, story):
    model = chat(toy[0], max_tokens=30)
    assert asyncio.run(model.ainvoke(CHAT)).content == story.text
    assert [done.content for done in model.batch([CHAT, CHAT, CHAT])] == [story.text] * 3


def test_text_to_continue(toy):
    server, session = toy
    fields = {"temperature": 0, "max_tokens": 20}
    model = langchain_openai.OpenAI(base_url=server.url, api_key="none", model="builtin:toy", **fields)
    expected = session.generate("Once upon", max_new_tokens=20).text
    assert model.invoke("Once upon") == "".join(model.stream("Once upon")) == expected


def test_tools_there_and_back(caller):
    model = chat(caller, "scripted").bind_tools([WEATHER])
    done = model.invoke(CHAT)
    gathered = None
    for chunk in model.stream(CHAT):
        gathered = chunk if gathered is None else gathered + chunk
    for message in (done, gathered):
        (call,) = message.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
    told = {"role": "tool", "tool_call_id": done.tool_calls[0]["id"], "content": "Sunny."}
    assert model.invoke([*CHAT, done, told]).tool_calls


def test_structured_output(shaping):
    lamp = chat(shaping).with_structured_output(SHAPE, method="json_schema").invoke(CHAT)
    check_shape(lamp)
