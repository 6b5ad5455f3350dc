"""The official client's tools, gathered streams and structured output. `test_serving_openai.py` has the rest."""

import asyncio
import json
from typing import Literal

import pytest
from asked import CHAT, WEATHER, check_shape
from pydantic import BaseModel, ConfigDict

openai = pytest.importorskip("openai", reason="needs openai: `nox -s clients`")

SPECULATION = {"speculate": "on", "num_speculative_tokens": 2}


def test_a_gathered_stream(toy):
    server, session = toy
    sampled = {"temperature": 0.8, "seed": 7}  # it ends by itself: the helper takes a cut answer for an error
    expected = session.generate(CHAT, max_new_tokens=200, num_speculative_tokens=2, **sampled)
    client = openai.OpenAI(base_url=server.url, api_key="none")
    asked = {"model": "builtin:toy", "messages": CHAT, **sampled, "extra_body": SPECULATION}
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        done = stream.get_final_completion()
    assert "".join(texts) == done.choices[0].message.content == expected.text
    assert done.usage.completion_tokens_details.accepted_prediction_tokens == expected.stats.num_accepted_tokens > 0


def test_an_async_stream(toy, story):
    async def read():
        async with openai.AsyncOpenAI(base_url=toy[0].url, api_key="none") as client:
            asked = {"model": "builtin:toy", "messages": CHAT, "max_tokens": 30}
            stream = await client.chat.completions.create(**asked, stream=True)
            return [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]

    assert "".join(asyncio.run(read())) == story.text


def test_tools_there_and_back(caller):
    client = openai.OpenAI(base_url=caller.url, api_key="none")
    asked = {"model": "scripted", "messages": CHAT, "tools": [WEATHER]}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    with client.chat.completions.stream(**asked) as stream:
        gathered = stream.get_final_completion().choices[0]
    for message in (choice.message, gathered.message):
        (call,) = message.tool_calls
        assert message.content == "Wait. "
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
        told = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
        history = [*CHAT, message.model_dump(exclude_none=True), told]
        again = client.chat.completions.create(model="scripted", messages=history, tools=[WEATHER])
        assert again.choices[0].message.tool_calls


class Lamp(BaseModel):
    model_config = ConfigDict(extra="forbid")

    on: bool
    level: Literal[1, 2, 3]


@pytest.mark.parametrize("speculate", ["on", "off"])
def test_structured_output(shaping, speculate):
    client = openai.OpenAI(base_url=shaping.url, api_key="none")
    asked = {"model": "builtin:toy", "messages": CHAT, "extra_body": {"speculate": speculate}}
    done = client.chat.completions.parse(**asked, response_format=Lamp)
    check_shape(done.choices[0].message.parsed.model_dump())
