"""Names from files, servers and plugins: they control no terminal, and are shown as they are written."""

import io
import logging

import pytest
from fake_session import FakeSession, make_running
from polydraft._cli.render.tables import FittingTable
from polydraft._cli.streams import console_for
from polydraft.contract import BackendRecord, Chunk
from polydraft.errors import EngineError, InvalidRequestError, ModelFormatError
from rich.text import Text

NAME = "a\x1b[31m\x1b]8;;http://x\x07\x1b]52;c;eA==\x07\r\b\x7f\x9b2J\u202ez[red]y[/red]:smile:"
SHOWN = r"a\x1b[31m\x1b]8;;http://x\x07\x1b]52;c;eA==\x07"


def is_harmless(text):
    """Whether a terminal gets printable characters and line ends only."""
    return all(character.isprintable() or character in "\n\t" for character in text)


def test_what_ran(fake, command):
    fake.session = FakeSession()
    fake.session.running = make_running(target=NAME, drafter=NAME, notes=(f"Note: {NAME}",))
    ran = command("generate", "-m", "org/target", "-p", "Hi")
    assert ran.code == 0
    assert is_harmless(ran.out + ran.err)
    assert ran.err.count(r"a\x1b[31m\x1b]8;;http://x\x1b]52;c;eA==") == 3  # rich drops the bell
    assert ran.err.count("z[red]y[/red]:smile:") == 3


@pytest.mark.parametrize("kind", [ModelFormatError, EngineError, InvalidRequestError, RuntimeError])
@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_errors(fake, command, kind, debug):
    fake.error = kind(f"{NAME}: a tensor of this name is damaged.")
    ran = command("generate", "-m", "org/target", "-p", "Hi", *debug)
    assert ran.code in {1, 2}
    assert is_harmless(ran.err)
    assert SHOWN in ran.err
    assert "[red]y[/red]:smile:" in ran.err


def test_wrong_usage(command):
    for words in (
        ["generate", "x", NAME],
        ["no" + NAME],
        ["generate", f"--{NAME}"],
        ["generate", "-p", "x", "--engine-option", NAME],
    ):
        ran = command(*words)
        assert ran.code == 2
        assert is_harmless(ran.err)
    ran = command("generate", "x", "api_key=canary", "--debug")
    assert ran.code == 2
    assert "api_key=***" in ran.err
    assert "canary" not in ran.err


def test_logs_and_warnings(process):
    setup = (
        "import logging, warnings\n"
        "def load(target, **options):\n"
        f"    logging.getLogger('polydraft.load').info('Passed over: %s', {NAME!r})\n"
        f"    warnings.warn({NAME!r})\n"
        "    return session\n"
        "polydraft.load = load\n"
    )
    ran = process("generate", "-m", "x", "-p", "Hi", "--verbose", setup=setup)
    assert ran.returncode == 0
    assert is_harmless(ran.stderr)
    assert f"Passed over: {SHOWN}" in ran.stderr
    assert f"Warning: {SHOWN}" in ran.stderr
    assert logging.getLogger("polydraft.load").level == logging.NOTSET


def test_tables():
    record = BackendRecord(
        name="x", factory="m:C", summary=NAME, formats={"gguf"}, drafter_kinds={"mtp"}, engine=NAME, requires={},
        install_hint=NAME,
    )  # fmt: skip
    for width in (10_000, 40):
        table = FittingTable("name", "summary")
        table.add_row(record.summary, Text(record.engine, style="red"))
        output = io.StringIO()
        console = console_for(output)
        console.width = width
        console.print(table, record.install_hint)
        assert is_harmless(output.getvalue())
        assert "\\x1b[31m" in output.getvalue()
        assert output.getvalue().replace("\n", "").replace(" ", "").count("z[red]y[/red]:smile:") == 3


def test_json_is_ascii(fake, command):
    fake.session = FakeSession()
    fake.session.running = make_running(target=NAME)
    fake.session.chunks = (Chunk(token_ids=(1,), text=NAME, num_accepted_tokens=None, finish_reason="length"),)
    ran = command("generate", "-m", "org/target", "-p", "Hi", "--json")
    assert ran.out.isascii()
    assert is_harmless(ran.out)
