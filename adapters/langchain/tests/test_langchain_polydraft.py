"""The chat model with langchain-core itself: whole, streamed, async, in batches, with tools and schemas."""

import asyncio
import inspect
import json

import langchain_polydraft
import polydraft
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import ConfigurableField
from langchain_polydraft import ChatPolydraft, chat_models, sessions
from polydraft.errors import InvalidRequestError, ModelNotFoundError, PolydraftError
from pydantic import BaseModel

STORY = "Tell me a story."
CHAT = [{"role": "user", "content": STORY}]


class Lamp(BaseModel):
    """A lamp."""

    on: bool


@pytest.fixture(scope="module")
def toy():
    with polydraft.load("builtin:toy") as session:
        yield session


@pytest.fixture
def model(toy):
    return ChatPolydraft(session=toy, max_tokens=30)


def gathered(chunks):
    whole = None
    for chunk in chunks:
        whole = chunk if whole is None else whole + chunk
    return whole


def test_whole_streamed_async_and_in_batches(model, toy):
    expected = toy.generate(CHAT, max_new_tokens=30)

    async def asynchronously():
        done = await model.ainvoke(STORY)
        return done, gathered([chunk async for chunk in model.astream(STORY)])

    answers = [model.invoke(STORY), gathered(model.stream(STORY)), *asyncio.run(asynchronously())]
    for answer in [*answers, *model.batch([STORY, STORY])]:
        assert answer.content == expected.text
        assert answer.usage_metadata["output_tokens"] == 30
        assert answer.usage_metadata["input_tokens"] == len(expected.prompt_token_ids)
        assert answer.response_metadata["finish_reason"] == "length"
        assert answer.response_metadata["stats"]["num_accepted_tokens"] == expected.stats.num_accepted_tokens > 0
    assert len(list(model.stream(STORY))) > 3


def test_messages_of_every_role(model, toy):
    call = {"name": "weather", "args": {"city": "Rome"}, "id": "c1"}
    turns = [SystemMessage("Be brief."), HumanMessage("Weather?"), AIMessage("", tool_calls=[call])]
    turns += [ToolMessage("Sunny.", tool_call_id="c1"), HumanMessage([{"type": "text", "text": "More."}])]
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
        {"role": "user", "content": "More."},
    ]
    assert model.invoke(turns).content == toy.generate(chat, max_new_tokens=30).text


def test_settings_of_the_model_and_of_the_call(toy):
    sampled = {"temperature": 1.0, "seed": 3}
    model = ChatPolydraft(session=toy, max_tokens=20, stop=["zz"], **sampled)
    expected = toy.generate(CHAT, max_new_tokens=20, **sampled)
    assert model.invoke(STORY).content == expected.text
    assert model.invoke(STORY).response_metadata["seed"] == 3
    assert model.invoke(STORY, seed=4).content == toy.generate(CHAT, max_new_tokens=20, temperature=1, seed=4).text
    assert model.invoke(STORY, max_tokens=5).usage_metadata["output_tokens"] == 5
    assert model.invoke(STORY, max_new_tokens=5).usage_metadata["output_tokens"] == 5
    with pytest.raises(InvalidRequestError, match="max_new_tokens"):
        model.invoke(STORY, max_new_tokens=0)
    stop = expected.text[3]
    assert model.invoke(STORY, stop=[stop]).content == expected.text[: expected.text.index(stop)]
    assert model.invoke(STORY, speculate="off").response_metadata["speculation_off"]


@pytest.mark.parametrize("choice", ["any", "Lamp", {"type": "function", "function": {"name": "Lamp"}}])
def test_tools(model, choice):
    calling = model.bind_tools([Lamp], tool_choice=choice)
    for answer in (calling.invoke(STORY, max_tokens=120), gathered(calling.stream(STORY, max_tokens=120))):
        call, *_ = answer.tool_calls
        assert call["name"] == "Lamp"
        assert set(call["args"]) == {"on"}
        assert call["id"]
        told = ToolMessage("Done.", tool_call_id=call["id"])
        turns = [HumanMessage(STORY), answer.model_copy(update={"tool_calls": [call]}), told]
        assert model.invoke(turns).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    model = model.model_copy(update={"max_tokens": 120})
    assert isinstance(model.with_structured_output(Lamp, method=method).invoke(STORY), Lamp)
    raw = model.with_structured_output(Lamp, method=method, include_raw=True).invoke(STORY)
    assert isinstance(raw["parsed"], Lamp)
    assert raw["parsing_error"] is None
    schema = {**Lamp.model_json_schema(), "additionalProperties": False}
    assert set(model.with_structured_output(schema, method=method).invoke(STORY)) == {"on"}
    assert list(model.with_structured_output(schema, method=method).stream(STORY))


def test_cut_structured_output_is_no_answer(model):
    cut = model.model_copy(update={"max_tokens": 2}).with_structured_output(Lamp, include_raw=True).invoke(STORY)
    assert cut["parsed"] is None
    assert cut["parsing_error"] is not None


def test_thinking_is_beside_the_answer_and_not_sent_again():
    said = AIMessage([{"type": "reasoning", "reasoning": "B"}, {"type": "text", "text": "A"}])
    assert chat_models._to_chat([said]) == [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    chunk = polydraft.Chunk(token_ids=(1,), text="A", thinking="B", num_accepted_tokens=None)
    message = chat_models._piece(chunk).message
    assert (message.content, message.additional_kwargs) == ("A", {"reasoning_content": "B"})


def test_one_load_serves_all_models_with_its_arguments(toy, monkeypatch):
    loaded = []

    def load(target, **arguments):
        loaded.append((target, arguments["num_speculative_tokens"], arguments["isolation"]))
        return toy

    monkeypatch.setattr(polydraft, "load", load)
    monkeypatch.setattr(sessions, "_sessions", {})
    model = ChatPolydraft(model="builtin:toy", load_kwargs={"isolation": "none"}, max_tokens=3)
    changing = model.configurable_fields(
        temperature=ConfigurableField("t"), num_speculative_tokens=ConfigurableField("k")
    )
    for k, temperature in ((None, 0.0), (None, 0.5), (2, 0.0)):
        changing.with_config(configurable={"t": temperature, "k": k}).invoke(STORY)
    assert loaded == [("builtin:toy", k, "none") for k in (None, 2)]


def test_closing_loads_anew():
    model = ChatPolydraft(model="builtin:toy", max_tokens=3)
    first = model.load()
    assert model.load() is first
    langchain_polydraft.close_sessions()
    assert model.load() is not first
    assert model.invoke(STORY).content


def test_polydrafts_errors_come_through(model):
    with pytest.raises(ModelNotFoundError):
        ChatPolydraft(model="builtin:none").invoke(STORY)
    with pytest.raises(InvalidRequestError, match="temperature"):
        model.invoke(STORY, temperature=-1)
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}])
    with pytest.raises(PolydraftError):
        model.invoke([picture])


def test_every_field_is_an_argument_of_polydraft():
    generate = set(inspect.signature(polydraft.Session.generate).parameters)
    assert set(chat_models._SETTINGS) - {"max_tokens"} <= generate
    assert set(chat_models._LOAD) <= set(inspect.signature(polydraft.load).parameters)
    assert json.dumps(ChatPolydraft(model="builtin:toy")._identifying_params)
