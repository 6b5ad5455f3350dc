"""The commands of a chat, its messages of several lines, and its exit code."""

import io
import json

import pytest
from fake_session import FakeSession
from polydraft._cli.chat_commands import run_command
from polydraft._cli.conversation import Conversation
from polydraft.errors import ContextLengthError, InvalidRequestError

CHAT = ("chat", "--model", "org/target")


@pytest.fixture
def conversation():
    return Conversation(FakeSession(), {"seed": 1})


def test_settings_on_the_fly(conversation):
    assert run_command("/set temperature 0.7", conversation) == "temperature = 0.7"
    assert run_command("/set --max-new-tokens=20", conversation) == "max_new_tokens = 20"
    assert run_command("/set stop 42", conversation) == 'stop = "42"'
    run_command("/unset stop", conversation)
    assert run_command("/set speculate off", conversation) == "speculate = off"
    conversation.say("Hi", lambda chunk: None)
    settings = {"seed": 1, "temperature": 0.7, "max_new_tokens": 20, "speculate": "off"}
    assert conversation.settings == settings
    shown = run_command("/set", conversation).splitlines()
    assert "temperature = 0.7" in shown
    assert "top_p = 1.0" in shown
    run_command("/unset temperature", conversation)
    assert "temperature" not in conversation.settings


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temprature 1", "Did you mean temperature?"),
        ("/set max_tokens 5", "Did you mean max_new_tokens?"),
        ("/set temperature hot", "temperature='hot' is not allowed"),
        ("/set temperature", "no value"),
        ("/set speculate perhaps", "auto, on, off"),
        ("/unset top_k", "top_k is set"),
        ("/rest", "Did you mean '/reset'"),
        ("/save", "name of a file"),
        ("/save chat.md", "nothing to save yet"),
    ],
)
def test_what_is_wrong_with_a_command(conversation, line, said):
    with pytest.raises(InvalidRequestError) as error:
        run_command(line, conversation)
    assert said in str(error.value)
    assert conversation.settings == {"seed": 1}


def test_saving(conversation, tmp_path):
    conversation.say("Hi", lambda chunk: None)
    run_command(f"/save {tmp_path / 'chat.json'}", conversation)
    assert json.loads((tmp_path / "chat.json").read_text()) == conversation.messages
    run_command(f"/save {tmp_path / 'chat.md'}", conversation)
    assert (tmp_path / "chat.md").read_text() == "**user**\n\nHi\n\n**assistant**\n\nOnce upon a time\n"
    with pytest.raises(InvalidRequestError, match="exists"):
        run_command(f"/save {tmp_path / 'chat.md'}", conversation)


def test_messages_of_several_lines_and_with_a_slash(fake, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('"""one\n  two\n"""\nthree\\\nfour\n//etc\n/reset\n'))
    ran = command(*CHAT)
    assert ran.code == 0
    assert [prompt[-1]["content"] for prompt, _ in fake.session.calls] == ["one\n  two", "three\nfour", "/etc"]
    assert "The conversation is forgotten." in ran.err


@pytest.mark.parametrize(("refused", "code"), [(1, 0), (2, 2)])
def test_the_exit_code_of_a_pipe(fake, command, monkeypatch, refused, code):
    left = [None] * refused

    def fail(index):
        if left:
            left.pop()
            raise ContextLengthError("The prompt does not fit.")

    fake.session.before_chunk = fail
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi\n"))
    assert command(*CHAT).code == code


def test_a_command_that_fails_alone(fake, command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/set temprature 1\n"))
    ran = command(*CHAT)
    assert ran.code == 2
    assert "Did you mean" in ran.err
