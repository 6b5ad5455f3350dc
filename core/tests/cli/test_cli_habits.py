"""What people type by habit: the prompt as an argument, ``python -m``, other programs' option names, ``--version``."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from polydraft._cli.versions import version_lines
from polydraft.errors import EngineError

GENERATE = ("generate", "--model", "org/target")


def test_the_prompt_is_an_argument(fake, command, monkeypatch):
    assert command("generate", "Once", "-m", "org/target").code == 0
    assert fake.session.calls[0][0] == "Once"
    ran = command(*GENERATE, "Once", "--prompt", "Twice")
    assert ran.code == 2
    assert "PROMPT and --prompt exclude one another" in ran.err
    monkeypatch.setattr("sys.stdin", None)
    assert "as an argument" in command(*GENERATE).err


def test_k_with_plain_is_told(fake, command):
    ran = command(*GENERATE, "Once", "--plain", "-k", "3")
    assert ran.code == 2
    assert "-k has no effect with --plain" in ran.err
    assert not fake.calls


EMPTY = [
    *(
        (name, *more, "--model", "")
        for name, *more in (("generate", "hi"), ("chat",), ("verify",), ("tune",), ("bench",), ("serve",))
    ),
    ("batch", "in", "out", "--model="),
    ("batch", "in", ""),
    ("pairs", ""),
    ("generate", "--prompt-file", ""),
    ("verify", "--prompt-file", ""),
    ("bench", "--prompts", ""),
    ("bench", "--save", ""),
    ("tune", "--save", ""),
    ("serve", "--api-key-file", ""),
    ("serve", "--served-model-name", "a", "--served-model-name", ""),
    ("engines", "install", ""),
]


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_empty_values_are_refused(fake, command, monkeypatch, tmp_path, arguments):
    """They come of variables that are not set; an empty path would be the current folder."""
    monkeypatch.chdir(tmp_path)
    ran = command(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert " is empty.\nHint: Give a value, or leave it out.\n" in ran.err
    assert not fake.calls
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["generate --model", "verify -d", "engines install --python"])
def test_the_hint_names_the_command_whose_option_lacks_its_value(command, words):
    ran = command(*words.split())
    assert ran.code == 2
    name = words.rpartition(" ")[0]
    assert f"Hint: `polydraft {name} --help` lists what it takes.\n" in ran.err


def test_the_hint_for_the_prefix_cache_can_be_pasted(command):
    ran = command("generate", "hi", "-m", "builtin:tiny-e2b", "--prefix-cache-bytes", "-1")
    assert ran.code == 2
    assert "None" not in ran.err


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--max-tokens", "--max-new-tokens"),
        ("--n-predict", "--max-new-tokens"),
        ("--temprature", "--temperature"),
        ("--draft-model", "--drafter"),
        ("--max-model-len", "--context-length"),
    ],
)
def test_other_names_of_options(fake, command, option, meant):
    ran = command(*GENERATE, "Once", option, "3")
    assert ran.code == 2
    assert "Did you mean" in ran.err
    assert meant in ran.err


def test_no_option_shows_a_type_of_python(command):
    for name in ("generate", "chat", "verify", "tune", "bench", "serve", "pairs"):
        text = command(name, "--help").out
        assert "--help" in text
        assert "bool" not in text.lower().replace("boolean", "")


def test_ctrl_c_while_the_command_line_is_imported():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from polydraft.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("words", [[], ["--help"], ["generate", "-h"], ["--version"]])
def test_help_without_a_reader(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "polydraft", *words]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    closed = [sys.executable, "-c", f"import os, sys; os.close(1); os.execv(sys.executable, {command!r})"]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Standard output is closed.\n")


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "polydraft", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[0] == f"polydraft {version('polydraft')}"


def test_versions_of_engines_are_read_and_not_imported():
    code = (
        "import sys; from polydraft._cli.versions import version_lines; print(version_lines())\n"
        "print([name for name in sys.modules if name in {'torch', 'transformers', 'numpy'} or "
        "name.startswith('polydraft_')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[1] == "[]"
    for line in version_lines()[1:]:
        assert version("polydraft") in line or "environment" in line


def test_the_commands_start_without_what_only_hints_and_records_need():
    code = (
        "import sys; import polydraft._cli.app\n"
        "print([name for name in sys.modules if name in {'packaging', 'polydraft.contract', 'urllib.request'}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_an_interrupt_that_became_another_error_is_one(fake, command, monkeypatch):
    """Python 3.11 raises a RuntimeError from one that comes while a class is defined."""

    def load(*_, **__):
        try:
            raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()
        except RuntimeError as error:
            raise EngineError("It could not load it.", "Report it.") from error

    monkeypatch.setattr("polydraft.load", load)
    ran = command(*GENERATE, "Once")
    assert (ran.code, ran.err) == (130, "Interrupted.\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("polydraft gen", "generate"),
        ("polydraft generate --exactness b", "bitwise"),
        ("polydraft chat --mod", "--model"),
        ("polydraft chat --model builtin : to", "toy"),
        ("polydraft chat --model builtin :", "toy"),
        ("polydraft generate --backend reference --model builtin : to", "toy"),
        ("polydraft pairs builtin : to", "toy"),
        ("polydraft pairs google/gemma-4-E4", "google/gemma-4-E4B-it"),
        ("polydraft engines install vl", "vllm"),
    ],
)
def test_completion(typed, offered):
    variables = {
        **os.environ,
        "_POLYDRAFT_COMPLETE": "complete_bash",
        "COMP_WORDS": typed.replace(" ", "\n"),
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    code = "from polydraft._cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    assert offered in done.stdout.split()


def test_the_median_of_several_runs(fake, command):
    ran = command(*GENERATE, "Once", "--compare", "--runs", "3", "--json")
    found = json.loads(ran.out)["compare"]
    assert found["runs"] == 3
    assert found["tokens_per_second"] == {"speculative": 3.0, "plain": 1.0}
    assert found["speed_up"] == 3.0
    ways = [settings.get("speculate") for _, settings in fake.session.calls]
    assert ways[-6:] == [None, "off"] * 3  # calls before them warm up
    assert "median of 3" in command(*GENERATE, "Once", "--compare", "--runs", "3").err
    assert command(*GENERATE, "Once", "--runs", "3").code == 2
