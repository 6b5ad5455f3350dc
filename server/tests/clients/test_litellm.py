"""litellm, as `openai/...`: whole, streamed, async, with tools."""

import asyncio
import json
import os

import pytest
from asked import CHAT, SHAPE, WEATHER, check_shape

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import asks GitHub for prices
litellm = pytest.importorskip("litellm", reason="needs litellm: `nox -s clients`")


def asked(server, name="builtin:toy", **fields):
    return {"model": f"openai/{name}", "api_base": server.url, "api_key": "none", "messages": CHAT, **fields}


def test_whole_and_streamed(toy, story):
    server, session = toy
    done = litellm.completion(**asked(server, max_tokens=30))
    assert done.choices[0].message.content == story.text
    assert done.usage.completion_tokens == story.stats.num_tokens
    assert done.usage.completion_tokens_details.accepted_prediction_tokens == story.stats.num_accepted_tokens > 0
    rejected = story.stats.num_draft_tokens - story.stats.num_accepted_tokens
    assert done.usage.completion_tokens_details.rejected_prediction_tokens == rejected
    chunks = list(litellm.completion(**asked(server, max_tokens=30, stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == story.text
    k2 = session.generate(CHAT, max_new_tokens=30, num_speculative_tokens=2)
    done = litellm.completion(**asked(server, max_tokens=30, extra_body={"num_speculative_tokens": 2}))
    assert done.usage.completion_tokens_details.accepted_prediction_tokens == k2.stats.num_accepted_tokens


def test_async(toy, story):
    async def both():
        whole, stream = await asyncio.gather(
            litellm.acompletion(**asked(toy[0], max_tokens=30)),
            litellm.acompletion(**asked(toy[0], max_tokens=30, stream=True)),
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(parts)

    assert asyncio.run(both()) == (story.text, story.text)


@pytest.mark.parametrize("stream", [False, True])
def test_tools(caller, stream):
    done = litellm.completion(**asked(caller, "scripted", tools=[WEATHER], stream=stream))
    if stream:
        done = litellm.stream_chunk_builder(list(done))
    (call,) = done.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    assert done.choices[0].finish_reason == "tool_calls"


def test_errors_have_its_types(toy):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked(toy[0], temperature=-3))
    with pytest.raises(litellm.NotFoundError, match="Did you mean"):
        litellm.completion(**asked(toy[0], "builtin:tou"))


def test_structured_output(shaping):
    schema = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": SHAPE, "strict": True}}
    done = litellm.completion(**asked(shaping, response_format=schema))
    check_shape(json.loads(done.choices[0].message.content))
