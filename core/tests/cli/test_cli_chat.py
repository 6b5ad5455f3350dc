"""``polydraft chat``: history, cancelling, commands; its input from a pipe."""

import contextlib
import io
import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_session import FakeSession
from polydraft._cli.conversation import Conversation, interrupt_flag
from polydraft.contract import Chunk, ToolCall
from polydraft.errors import ContextLengthError, EngineError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon a time"}


def test_history():
    session = FakeSession()
    conversation = Conversation(session, {"seed": 1}, "Be brief.")
    shown = []
    result = conversation.say("Hi", shown.append)
    assert result.finish_reason == "length"
    assert [chunk.text for chunk in shown] == ["Once", " upon a time"]
    conversation.say("Go on", shown.append)
    system = {"role": "system", "content": "Be brief."}
    assert session.calls == [
        ([system, USER], {"seed": 1}),
        ([system, USER, ANSWER, {"role": "user", "content": "Go on"}], {"seed": 1}),
    ]
    conversation.reset()
    assert conversation.messages == [system]


def test_thinking_is_not_kept():
    session = FakeSession(
        (
            Chunk(token_ids=(1,), text="", thinking="hmm", num_accepted_tokens=None),
            Chunk(token_ids=(2,), text="Yes.", num_accepted_tokens=None),
        )
    )
    conversation = Conversation(session, {})
    conversation.say("Hi", lambda chunk: None)
    assert conversation.messages == [USER, {"role": "assistant", "content": "Yes."}]


THOUGHT = Chunk(token_ids=(1,), text="", thinking="hmm", num_accepted_tokens=None, finish_reason="length")
CALL = Chunk(
    token_ids=(1,),
    text="",
    tool_calls=(ToolCall(name="lookup", arguments={"name": "x"}, raw=""),),
    num_accepted_tokens=None,
    finish_reason="eos",
)
LOOKUP = {"type": "function", "function": {"name": "lookup", "arguments": {"name": "x"}}}
WITHOUT_TEXT = [
    (
        THOUGHT,
        {"role": "assistant", "content": ""},
        "The answer has no text, only thought (not shown); a larger `--max-new-tokens` leaves room for the answer.\n",
    ),
    (
        CALL,
        {"role": "assistant", "content": "", "tool_calls": [LOOKUP]},
        "The answer has no text, only tool calls (not shown): lookup.\n",
    ),
    (
        Chunk(token_ids=(1,), text="", num_accepted_tokens=None, finish_reason="eos"),
        {"role": "assistant", "content": ""},
        "The answer has no text.\n",
    ),
]


@pytest.mark.parametrize(("chunk", "answer", "said"), WITHOUT_TEXT)
def test_a_turn_without_text_is_kept_and_told(fake, command, monkeypatch, tmp_path, chunk, answer, said):
    fake.session.chunks = (chunk,)
    file = tmp_path / "chat.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hi\nMore\n/save {file}\n"))
    ran = command(*CHAT)
    assert ran.code == 0
    assert ran.err.count(said) == 2
    more = {"role": "user", "content": "More"}
    assert fake.session.calls[1][0] == [USER, answer, more]
    assert json.loads(file.read_text(encoding="utf-8")) == [USER, answer, more, answer]


@pytest.mark.parametrize(("chunk", "answer", "said"), WITHOUT_TEXT)
def test_generate_tells_of_an_answer_without_text(fake, command, chunk, answer, said):
    fake.session.chunks = (chunk,)
    ran = command("generate", "Hi", "--chat", "--model", "org/target")
    assert said in ran.err
    assert not ran.out.strip()


def test_one_ctrl_c_ends_the_answer_between_rounds():
    session = FakeSession()
    session.before_chunk = lambda index: os.kill(os.getpid(), signal.SIGINT) if index == 0 else None
    conversation = Conversation(session, {})
    before = signal.getsignal(signal.SIGINT)
    result = conversation.say("Hi", lambda chunk: None)
    assert result.finish_reason == "cancelled"
    assert session.streams[0].closed
    assert conversation.messages == [USER, {"role": "assistant", "content": "Once"}]
    assert signal.getsignal(signal.SIGINT) is before


def test_two_ctrl_c_end_it_at_once():
    session = FakeSession()

    def interrupt(index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    session.before_chunk = interrupt
    conversation = Conversation(session, {})
    assert conversation.say("Hi", lambda chunk: None) is None
    assert session.streams[0].closed
    assert conversation.messages == []


def test_a_message_that_raised_is_forgotten():
    session = FakeSession()
    conversation = Conversation(session, {})
    conversation.say("Hi", lambda chunk: None)

    def fail(index):
        raise ContextLengthError("Too long.")

    session.before_chunk = fail
    with pytest.raises(ContextLengthError):
        conversation.say("x" * 1000, lambda chunk: None)
    assert conversation.messages == [USER, ANSWER]
    assert session.streams[1].closed


def test_the_flag_outside_the_main_thread():
    found = []

    def work():
        with interrupt_flag() as flag:
            found.append(flag.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


CHAT = ("chat", "--model", "org/target")


def test_a_conversation_through_a_pipe(process):
    done = process(*CHAT, "--think", stdin="Hi\n\n/help\nMore\n/reset\nAgain\n/exit\nnever\n", setup=RECORD)
    assert done.returncode == 0
    assert done.stdout.count("Once upon a time\n") == 3
    counts = [line for line in done.stderr.splitlines() if line.startswith("CALL")]
    assert counts == [
        "CALL 1 {'enable_thinking': True}",
        "CALL 3 {'enable_thinking': True}",
        "CALL 1 {'enable_thinking': True}",
    ]
    assert "fake-engine" in done.stderr
    assert "3.00 per round" in done.stderr


RECORD = """
real = session.stream
def record(messages, **settings):
    print("CALL", len(messages), settings.get("chat_template_kwargs"), file=sys.stderr)
    return real(messages, **settings)
session.stream = record
"""


def test_the_end_of_input_ends_it(process):
    done = process(*CHAT, stdin="Hi")
    assert done.returncode == 0
    assert done.stdout == "Once upon a time\n"


def test_a_wrong_request_does_not_end_it(fake, command, monkeypatch):
    def fail(index):
        fake.session.before_chunk = lambda index: None
        raise ContextLengthError("The prompt does not fit.", "Try /reset.")

    fake.session.before_chunk = fail
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi\n"))
    ran = command(*CHAT)
    assert ran.code == 0
    assert "Error: The prompt does not fit.\nHint: Try /reset.\n" in ran.err
    assert "Once upon a time" in ran.out


def test_an_engine_that_fails_does(fake, command, monkeypatch):
    def fail(index):
        raise EngineError("The engine failed.")

    fake.session.before_chunk = fail
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi\n"))
    ran = command(*CHAT)
    assert ran.code == 1
    assert fake.session.closed == 1


def test_on_a_terminal(tmp_path):
    """Colours, dimmed thinking, line editing, the history, Ctrl-C while it answers and at the prompt."""
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    history = tmp_path / "state/history"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        # Where the tests run in the background, they were started with Ctrl-C ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import polydraft, time\nfrom pathlib import Path\nfrom fake_session import *\n"
        "from polydraft._cli import chat_input\n"
        f"chat_input.history_file = lambda: Path({str(history)!r})\n"
        "from polydraft.contract import Chunk\n"
        "session = FakeSession((Chunk(token_ids=(1,), text='', thinking='hmm', num_accepted_tokens=None), *CHUNKS))\n"
        "def slow(index):\n"
        "    if index == 2 and len(session.streams) == 1:\n"
        "        print('WAITING', file=sys.stderr, flush=True)\n"
        "        time.sleep(1)\n"
        "session.before_chunk = slow\n"
        "polydraft.load = lambda target, **options: session\n"
        "sys.argv = ['polydraft', 'chat', '-m', 'x', '--show-drafts']\n"
        "from polydraft._cli.app import main\nmain()\n"
    )
    child, terminal = pty.fork()
    if not child:
        os.environ.update(TERM="xterm-256color", COLUMNS="100")
        os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-c", code])
    seen = ""

    def wait_for(text, again=b""):
        """Read until ``text`` comes; send ``again`` each second, for what a busy reader may miss."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen and time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                try:
                    seen += os.read(terminal, 4096).decode()
                except OSError:
                    break
            elif again:
                os.write(terminal, again)
        assert text in seen, seen
        seen = seen.split(text, 1)[1]

    try:
        wait_for("> ")
        os.write(terminal, b"i\x1b[DH\n")  # arrow left
        wait_for("\x1b[2mhmm\x1b[0m")
        wait_for("WAITING")
        os.write(terminal, b"\x03")
        wait_for("ended by cancelled")
        wait_for("> ")
        os.write(terminal, b"\x1b[A again\n")  # arrow up
        wait_for("\x1b[32m upon a\x1b[0m time")
        wait_for("> ")
        wait_for("/exit ends", again=b"\x03")  # Python may miss a signal that comes just before it waits for input
        wait_for("> ")
        os.write(terminal, b"/exit\n")
        with contextlib.suppress(OSError):  # the other side is closed
            while select.select([terminal], [], [], 30)[0] and os.read(terminal, 4096):
                pass
        _, status = os.waitpid(child, 0)
        child = 0
    finally:
        os.close(terminal)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert history.read_text(encoding="utf-8").splitlines()[-3:] == ["Hi", "Hi again", "/exit"]
