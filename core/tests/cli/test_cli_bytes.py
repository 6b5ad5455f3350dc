"""Bytes at the edge: byte order marks, other encodings, endless input, a full disk as standard output."""

import errno
import os
import sys
from pathlib import Path

import pytest
from polydraft._cli.problems import describe
from polydraft._cli.prompts import read_prompt
from polydraft.errors import InvalidRequestError

posix = pytest.mark.skipif(sys.platform == "win32", reason="/dev is of POSIX")


@pytest.mark.parametrize(
    ("data", "prompt"),
    [(b"\xef\xbb\xbfhi", "hi"), (b"a\r\nb\r\n", "a\r\nb\r\n"), (b"a\0b", "a\0b"), ("é\ufeff".encode(), "é\ufeff")],
)
def test_what_of_a_file_is_the_prompt(data, prompt, tmp_path):
    file = tmp_path / "prompt"
    file.write_bytes(data)
    assert read_prompt(None, file, None) == prompt


@pytest.mark.parametrize(
    "data", [b"\xff\xfeh\0", b"\xfe\xff\0h", b"\xff\xfe\0\0h\0\0\0", b"\xff", b"\xef\xbb\xbf", b""]
)
def test_files_that_hold_no_prompt(data, tmp_path):
    file = tmp_path / "prompt"
    file.write_bytes(data)
    with pytest.raises(InvalidRequestError, match=r"UTF-8|is empty"):
        read_prompt(None, file, None)


@posix
def test_endless_and_piped_files(tmp_path):
    with pytest.raises(InvalidRequestError, match="more than 64 MiB"):
        read_prompt(None, Path("/dev/zero"), None)
    reader, writer = os.pipe()  # what <(command) is
    os.write(writer, b"hi")
    os.close(writer)
    try:
        assert read_prompt(None, Path(f"/dev/fd/{reader}"), None) == "hi"
    finally:
        os.close(reader)


def test_options_in_another_locale():
    # Python decodes arguments in the C locale to surrogates.
    assert read_prompt(os.fsdecode("é".encode()), None, None) == "é"
    assert read_prompt("é".encode().decode("ascii", "surrogateescape"), None, None) == "é"
    with pytest.raises(InvalidRequestError, match="prompt is not UTF-8"):
        read_prompt("\udcff", None, None)
    with pytest.raises(InvalidRequestError, match="5000 digits"):
        read_prompt(None, None, "1," + "9" * 5000)


@posix
@pytest.mark.parametrize("arguments", [["generate", "--model", "m", "--prompt", "x"], ["backends"], ["--version"]])
def test_standard_output_on_a_full_disk(process, arguments):
    done = process(*arguments, setup="os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "Error: The disk is full.\nHint: Free some space, or use a folder on another disk.\n"
    ), done.stderr


@posix
def test_standard_error_on_a_full_disk(process):
    done = process("generate", setup="os.dup2(os.open('/dev/full', os.O_WRONLY), 2)")
    assert done.returncode == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
    ],
)
def test_what_a_machine_does_is_not_to_be_reported(error):
    problem = describe(error)
    assert "report" not in problem.hint
    assert "unexpected" not in problem.message


def test_an_engine_option_without_end(fake, command):
    ran = command("generate", "--model", "m", "--prompt", "x", "--engine-option", "x=" + "[" * 100_000)
    assert ran.code == 2
    assert "nested too deeply" in ran.err


def test_chat_reads_utf_8_and_goes_on_after_other_bytes(process):
    done = process(
        "chat",
        "--model",
        "m",
        setup="import io; sys.stdin = io.TextIOWrapper(io.BytesIO(b'\\xef\\xbb\\xbfhi\\n\\xff\\nho\\n'))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The message is not UTF-8 text.") == 1
