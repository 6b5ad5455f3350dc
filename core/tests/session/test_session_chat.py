"""Chat through a whole session: messages of OpenAI's shapes, continued answers, and how answers are parsed."""

import asyncio

import pytest
from polydraft.contract.results import ToolCall
from polydraft.errors import InvalidRequestError, ModelFormatError, UnsupportedError

USER = {"role": "user", "content": "Hi"}
START = {"role": "assistant", "content": "Well, "}
CALL = '<|tool_call>call:look.up{city:<|"|>Oslo<|"|>,n:None}<tool_call|>'


@pytest.fixture
def session(toy_session):
    return toy_session()


@pytest.fixture
def toy_session():
    backend = pytest.importorskip("polydraft_reference.backend", reason="needs polydraft-reference").ReferenceBackend()
    toys = pytest.importorskip("polydraft_reference.toys")
    tokenizers = pytest.importorskip("polydraft_reference.tokenizer")
    from polydraft._session.session import Session

    opened = []

    def make(response_template=None, kind="mtp"):
        engine = backend.load_engine(toys.toy_request(kind, 4))
        engine.tokenizer = tokenizers.ByteTokenizer()
        engine.tokenizer.response_template = response_template
        opened.append(Session(engine, engine.running, backend.capabilities()))
        return opened[-1]

    yield make
    for session in opened:
        session.close()


def saying(session, text, **more):
    """The result of an answer of this text, after a comparison with the stream's."""
    ids = session.tokenizer.encode(text)
    given = {"forced_token_ids": dict(enumerate(ids)), "max_new_tokens": len(ids), **more}
    result = session.generate([USER], **given)
    chunks = list(session.stream([USER], **given))
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.thinking for chunk in chunks) == result.thinking
    assert tuple(call for chunk in chunks for call in chunk.tool_calls) == result.tool_calls
    return result


@pytest.mark.parametrize("kind", ["mtp", None])
def test_an_answer_and_its_way_back(toy_session, kind):
    session = toy_session(kind=kind)
    result = saying(session, f"<|channel>thought\nhm{CALL}Done")
    call = ToolCall(name="look.up", arguments={"city": "Oslo", "n": None}, raw=CALL[12:-12])
    assert (result.text, result.thinking, result.tool_calls) == ("Done", "hm", (call,))
    assert result.message == {
        "role": "assistant",
        "content": "Done",
        "tool_calls": [{"type": "function", "function": {"name": "look.up", "arguments": call.arguments}}],
    }
    session.generate([USER, result.message, {"role": "tool", "content": "rain"}], max_new_tokens=1)
    assert saying(session, "Hello").message == {"role": "assistant", "content": "Hello"}


def test_continued_answers(session):
    given = {"max_new_tokens": 3, "continue_final_message": True}
    prompt = [USER, START]
    results = [
        session.generate(prompt, **given),
        asyncio.run(session.agenerate(prompt, **given)),
        *session.generate_many([prompt], **given),
    ]
    stream = session.stream(prompt, **given)
    text = "".join(chunk.text for chunk in stream)
    for result in [*results, stream.result]:
        assert list(result.prompt_token_ids) == session.tokenizer.chat(prompt, continue_final_message=True)
        assert result.text == text
    assert session.generate(prompt, max_new_tokens=3, continue_final_message=None).prompt_token_ids != results[0]
    with pytest.raises(InvalidRequestError, match="the user's"):
        session.generate([USER], continue_final_message=True)


def test_the_checkpoints_template_decides(toy_session):
    template = {
        "start_anchor": "<|turn>model\n",
        "fields": {"thinking": {"open": "(", "close": ")"}, "content": {"close": "<turn|>"}},
    }
    session = toy_session(template)
    result = saying(session, f" (why) because {CALL}")
    assert (result.text, result.thinking, result.tool_calls) == (
        f"because {CALL.replace('<|tool_call>', '')}"[:-12].replace('<|"|>', ""),
        "why",
        (),
    )
    # Text prompts have no message to parse.
    ids = session.tokenizer.encode("(why)")
    given = {"forced_token_ids": dict(enumerate(ids)), "max_new_tokens": len(ids)}
    assert session.generate("Hi", **given).text == "(why)"


def test_a_malformed_template_is_an_error_before_any_work(toy_session):
    session = toy_session({"fields": 3})
    with pytest.raises(ModelFormatError, match="response_template"):
        session.stream([USER])
    assert session.generate("Hi", max_new_tokens=1).token_ids


def test_a_slow_pattern_ends_the_call_and_not_the_session(toy_session):
    slow = {
        "start_anchor": "model\n",
        "fields": {"content": {}, "thinking": {"open_pattern": r"(a|aa)+(b|c)\Z", "close": ")"}},
    }
    session = toy_session(slow)
    with pytest.raises(ModelFormatError, match="takes more than"):
        saying(session, "a" * 200 + "d")
    assert session.generate("Hi", max_new_tokens=1).token_ids


def test_images_are_refused(session):
    with pytest.raises(UnsupportedError, match="image_url"):
        session.stream([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
