"""The plugin in llm itself: as a command and as a library."""

import asyncio
import inspect
import json
import os
import subprocess
import sys

import llm
import llm_polydraft
import polydraft
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm_polydraft import messages, models, options, sessions
from polydraft.errors import InvalidRequestError, ModelNotFoundError

TOY = "polydraft/builtin:toy"
STORY = "Tell me a story."
LAMP = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}


def lamp(on: bool) -> str:
    """Switch the lamp on or off."""
    return "Done."


@pytest.fixture(scope="module")
def toy():
    with polydraft.load("builtin:toy") as session:
        yield session


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs the command in this process."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    return lambda *arguments: CliRunner().invoke(cli, arguments)


class Calling:
    """A session whose first answer is a call of a tool, as llm has no setting that forces one."""

    def __init__(self, session):
        self.session, self.prompts = session, []
        self.running, self.tokenizer = session.running, session.tokenizer

    def stream(self, prompt, **settings):
        self.prompts.append(prompt)
        choice = "required" if len(self.prompts) == 1 else "none"
        return self.session.stream(prompt, tool_choice=choice, **settings)

    def close(self):
        pass


def test_llm_finds_the_plugin(tmp_path):
    command = [sys.executable, "-m", "llm", "-m", TOY, STORY, "-o", "max_new_tokens", "1", "--no-log"]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_from_the_shell(shell, toy):
    expected = toy.generate([{"role": "user", "content": STORY}], max_new_tokens=30, num_speculative_tokens=2)
    common = ("-o", "max_new_tokens", "30", "-o", "num_speculative_tokens", "2", "-o", "seed", "7")
    done = shell("-m", TOY, STORY, *common)
    assert (done.exit_code, done.stdout) == (0, f"{expected.text}\n")
    done = shell("-m", "polydraft", "-o", "target", "builtin:toy", STORY, *common, "--no-stream")
    assert (done.exit_code, done.stdout) == (0, f"{expected.text}\n")
    entry = json.loads(shell("logs", "--json", "-n", "1").stdout)[0]
    assert entry["output_tokens"] == 30
    assert json.loads(entry["token_details"])["num_accepted_tokens"] == expected.stats.num_accepted_tokens > 0


def test_errors_say_what_to_do(shell):
    for arguments, said in (
        (("-m", "polydraft", "Hi"), "-o target"),
        (("-m", TOY, "Hi", "-o", "dtype", "int3"), "dtype"),
        (("-m", TOY, "Hi", "-o", "engine_options", "threads"), "JSON"),
    ):
        done = shell(*arguments)
        assert done.exit_code == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_conversation_has_its_turns(toy):
    talk = llm.get_model(TOY).conversation()
    first = talk.prompt(STORY, system="Be brief.", max_new_tokens=10)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": STORY}]
    assert first.text() == toy.generate(chat, max_new_tokens=10).text
    chat += [{"role": "assistant", "content": first.text()}, {"role": "user", "content": "More."}]
    second = talk.prompt("More.", max_new_tokens=10)
    assert second.text() == toy.generate(chat, max_new_tokens=10).text
    assert second.usage().details["num_reused_tokens"] > 0


def test_async_streams_the_same(toy):
    async def streamed():
        response = llm.get_async_model(TOY).prompt(STORY, max_new_tokens=30)
        return [piece async for piece in response], await response.usage()

    pieces, usage = asyncio.run(streamed())
    expected = toy.generate([{"role": "user", "content": STORY}], max_new_tokens=30)
    assert "".join(pieces) == expected.text
    assert len(pieces) > 1
    assert usage.output == 30


def test_a_schema_holds_or_is_an_error():
    model = llm.get_model(TOY)
    assert set(json.loads(model.prompt(STORY, schema=LAMP).text())) == {"on"}
    with pytest.raises(llm.ModelError, match="max_new_tokens"):
        model.prompt(STORY, schema=LAMP, max_new_tokens=2).text()


def test_a_tool_is_called_and_answers(toy, monkeypatch):
    calling = Calling(toy)
    monkeypatch.setattr(models, "session_of", lambda target, arguments: calling)
    chain = llm.get_model(TOY).chain(STORY, tools=[lamp], options={"max_new_tokens": 120})
    assert chain.text()
    _, called, told, *_ = calling.prompts[1]
    call, *_ = called["tool_calls"]
    assert call["function"]["name"] == "lamp"
    assert set(call["function"]["arguments"]) == {"on"}
    assert told == {"role": "tool", "tool_call_id": call["id"], "name": "lamp", "content": "Done."}


def test_thinking_is_shown_and_not_sent_again():
    chunk = polydraft.Chunk(token_ids=(1,), text="A", thinking="B", num_accepted_tokens=None)
    assert [(event.type, event.chunk) for event in models._events(chunk)] == [("reasoning", "B"), ("text", "A")]
    said = llm.parts.Message("assistant", [llm.parts.ReasoningPart("B"), llm.parts.TextPart("A")])
    assert messages.to_chat([said]) == [{"role": "assistant", "content": "A"}]


def test_attachments_are_refused():
    picture = llm.Attachment(type="image/png", content=b"")
    for role, part in (
        ("user", llm.parts.AttachmentPart(picture)),
        ("tool", llm.parts.ToolResultPart(name="draw", output="", attachments=[picture])),
    ):
        with pytest.raises(llm.ModelError, match="text only"):
            messages.to_chat([llm.parts.Message(role, [part])])


def test_one_load_serves_all_calls_with_its_arguments(toy, monkeypatch):
    loaded = []

    def load(target, **arguments):
        loaded.append((target, arguments))
        return toy

    monkeypatch.setattr(polydraft, "load", load)
    monkeypatch.setattr(sessions, "_sessions", {})
    for k in (2, 2, 3):
        llm.get_model(TOY).prompt("Hi", num_speculative_tokens=k, drafter="none", max_new_tokens=2).text()
    assert loaded == [("builtin:toy", {"drafter": None, "num_speculative_tokens": k}) for k in (2, 3)]


def test_polydrafts_errors_come_through(monkeypatch):
    with pytest.raises(ModelNotFoundError):
        llm.get_model("polydraft").prompt("Hi", target="builtin:none").text()
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.get_model(TOY).prompt("Hi", temperature=-1).text()


def test_a_broken_file_of_pairs_stops_no_other_model(monkeypatch):
    def broken():
        raise InvalidRequestError("pairs.toml is broken.", "Mend it.")

    monkeypatch.setattr(polydraft, "pairs", broken)
    added = []
    with pytest.warns(UserWarning, match="Mend it"):
        llm_polydraft.register_models(lambda model, async_model: added.append(model.model_id))
    assert added == ["polydraft"]


def test_every_option_is_an_argument_of_polydraft():
    load = set(inspect.signature(polydraft.load).parameters)
    generate = set(inspect.signature(polydraft.Session.generate).parameters)
    known = set(options.AnyTargetOptions.model_fields) - {"target", "enable_thinking"}
    assert set(models._LOAD) <= load
    assert known - set(models._LOAD) <= generate
