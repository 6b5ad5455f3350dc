"""``polydraft generate``: what goes into the session, and what comes out where."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from fake_session import CHUNKS, make_running
from polydraft._cli.render.answer import visible
from polydraft.contract import Chunk, Segment
from polydraft.errors import EngineError, ModelNotFoundError

TEXT = "Once upon a time"
MODEL = ("--model", "org/target")


# What is asked of the library


def test_what_is_not_given_is_not_passed_on(fake, command):
    assert command("generate", *MODEL, "-p", "Hi").code == 0
    ((target, options),) = fake.calls
    assert target == "org/target"
    assert options["drafter"] == "auto"
    assert options["backend"] == "auto"
    assert options["num_speculative_tokens"] is None
    assert options["engine_options"] is None
    assert fake.session.calls == [("Hi", {})]
    assert fake.session.closed == 1


def test_everything_that_is_given_is_passed_on(fake, command):
    arguments = shlex.split(
        "--drafter ngram --backend some -k 3 --quantization q4_0 --dtype float32 --device cpu "
        "--context-length 99 --prefix-cache-bytes 5 --exactness bitwise "
        "--engine-option a=1 --engine-option b=text --engine-option 'c=[1, 2]' --revision main --offline "
        "--max-new-tokens 9 --min-new-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 "
        "--typical-p 0.9 --seed 3 --stop END --stop STOP --ignore-eos --install yes"
    )
    assert command("generate", *MODEL, "-p", "Hi", *arguments).code == 0
    assert fake.calls[0][1] == {
        "drafter": "ngram",
        "backend": "some",
        "install": "yes",
        "num_speculative_tokens": 3,
        "quantization": "q4_0",
        "dtype": "float32",
        "device": "cpu",
        "context_length": 99,
        "prefix_cache_bytes": 5,
        "exactness": "bitwise",
        "isolation": "auto",
        "engine_options": {"a": 1, "b": "text", "c": [1, 2]},
        "revision": "main",
        "local_files_only": True,
        "trust_remote_code": False,
    }
    assert fake.session.calls[0][1] == {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "seed": 3,
        "stop": ("END", "STOP"),
        "ignore_eos": True,
    }


@pytest.mark.parametrize(
    ("arguments", "drafter", "settings"),
    [
        (["--drafter", "none"], None, {}),
        (["--plain"], None, {"speculate": "off"}),
        (["--plain", "--drafter", "none"], None, {"speculate": "off"}),
    ],
)
def test_plain_decoding(fake, command, arguments, drafter, settings):
    assert command("generate", *MODEL, "-p", "Hi", *arguments).code == 0
    assert fake.calls[0][1]["drafter"] == drafter
    assert fake.session.calls == [("Hi", settings)]


def test_prompts(fake, command, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("a\r\nü\n".encode())
    for arguments in (
        ["--prompt-token-ids", "1, 2,3"],
        ["--prompt-file", str(file)],
        ["-p", "Hi", "--chat"],
        ["-p", "Hi", "--chat", "--system", "Be brief."],
    ):
        assert command("generate", *MODEL, *arguments).code == 0
    user = {"role": "user", "content": "Hi"}
    assert [prompt for prompt, _ in fake.session.calls] == [
        [1, 2, 3],
        "a\r\nü\n",
        [user],
        [{"role": "system", "content": "Be brief."}, user],
    ]


def test_blanks_are_a_prompt(fake, command):
    for text in (" ", "\n\n"):
        assert command("generate", *MODEL, "-p", text).code == 0
    assert [prompt for prompt, _ in fake.session.calls] == [" ", "\n\n"]


@pytest.mark.parametrize("arguments", [[], ["--prompt-file", "-"]])
def test_prompt_on_standard_input(process, arguments):
    done = process("generate", *MODEL, *arguments, "--json", stdin="from stdin", setup="session.chunks = ()")
    assert done.returncode == 1  # a session without chunks has no result; the prompt was read
    done = process(
        "generate",
        *MODEL,
        *arguments,
        stdin="from stdin",
        setup="real = session.stream\nsession.stream = lambda p, **s: print(repr(p), file=sys.stderr) or real(p, **s)",
    )
    assert done.returncode == 0
    assert "'from stdin'" in done.stderr


def test_without_a_model_the_builtin_pair(fake, command, monkeypatch):
    import polydraft._plugins

    installed = {
        name: SimpleNamespace(format=form)
        for name, form in {"other": "own", "tiny-e2b": "safetensors", "tiny-e2b-litertlm": "litertlm"}.items()
    }
    formats = {"litert_lm": {"litertlm"}, "llama_cpp": {"gguf", "safetensors"}, "vllm-server": {"safetensors"}}

    class Host:
        def local_models(self):
            return installed

        def backends(self):
            return {name: SimpleNamespace(formats=loaded) for name, loaded in formats.items()}

        def pairs(self):
            return [("x", SimpleNamespace(target=target)) for target in ("google/x", "builtin:tiny-e2b-litertlm")]

    def chosen(*backend):
        assert command("generate", "-p", "Hi", *backend).code == 0
        return fake.calls[-1][0]

    monkeypatch.setattr(polydraft._plugins, "default_host", Host)
    assert chosen() == chosen("-b", "llama_cpp") == chosen("-b", "unknown") == "builtin:tiny-e2b"
    assert chosen("-b", "litert_lm") == "builtin:tiny-e2b-litertlm"
    del formats["llama_cpp"], formats["vllm-server"]
    assert chosen() == "builtin:tiny-e2b-litertlm"
    installed.clear()
    ran = command("generate", "-p", "Hi")
    assert ran.code == 2
    assert "polydraft engines install" in ran.err


# The text


def test_a_pipe_gets_the_text_only(fake, command):
    ran = command("generate", *MODEL, "-p", "Hi")
    assert ran.out == TEXT + "\n"
    assert "\x1b" not in ran.out + ran.err
    for what in ("fake-engine", "1.2", "org/drafter", "k=4", "float32", "2 of 4", "50.0%", "3.00", "tokens/s"):
        assert what in ran.err, what


def test_show_drafts_without_colours_says_so(fake, command):
    ran = command("generate", *MODEL, "-p", "Hi", "--show-drafts")
    assert ran.out == TEXT + "\n"
    assert "No colours" in ran.err


def test_show_drafts_with_colours(fake, command, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    ran = command("generate", *MODEL, "-p", "Hi", "--show-drafts")
    assert "Once\x1b[32m upon a\x1b[0m time" in ran.out
    assert "accepted draft tokens" in ran.out.splitlines()[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert command("generate", *MODEL, "-p", "Hi", "--show-drafts").out == TEXT + "\n"


def test_control_characters_do_not_reach_a_terminal():
    assert visible("a\x1b]0;title\x07\tb\nc\x9b\x7f\r") == "a␛]0;title␇\tb\nc�␡␍"


def test_control_characters_do_reach_a_pipe(fake, command):
    fake.session.chunks = (Chunk(token_ids=(1,), text="a\x1b[0m\r\n", num_accepted_tokens=None),)
    assert command("generate", *MODEL, "-p", "Hi").out == "a\x1b[0m\r\n"


def test_thinking_is_no_part_of_the_answer(fake, command):
    fake.session.chunks = (
        Chunk(token_ids=(1,), text="", thinking="hmm", num_accepted_tokens=None),
        Chunk(token_ids=(2,), text="Yes.", num_accepted_tokens=None, segments=(Segment(text="Yes.", is_draft=False),)),
    )
    assert command("generate", *MODEL, "-p", "Hi").out == "Yes.\n"


def test_what_is_not_reported_is_not_zero(fake, command):
    fake.session.stats = dict.fromkeys(
        ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "accepted_per_position", "decode_seconds")
    )
    ran = command("generate", *MODEL, "-p", "Hi")
    assert ran.err.count("not reported") == 5
    stats = json.loads(command("generate", *MODEL, "-p", "Hi", "--json").out)["stats"]
    assert stats["num_drafts"] is None
    assert stats["acceptance_rate"] is None


def test_why_speculation_was_off(fake, command):
    fake.session.running = make_running(method=None, drafter=None, num_speculative_tokens=0)
    ran = command("generate", *MODEL, "-p", "Hi", "--plain")
    assert "Speculation was off: The caller asked." in ran.err
    assert "plain decoding" in ran.err


# Comparing


def test_compare_identical(fake, command):
    ran = command("generate", *MODEL, "-p", "Hi", "--compare", "--max-new-tokens", "20", "--temperature", "1")
    assert ran.code == 0
    assert ran.out == TEXT + "\n"
    assert "identical: yes   EXACT" in ran.err
    assert "3.00 x plain" in ran.err
    *warm, speculative, plain = [settings for _, settings in fake.session.calls]
    for way in (None, "off"):
        assert [one["max_new_tokens"] for one in warm if one.get("speculate") == way][:2] == [8, 20]
    assert "seed" not in speculative
    assert plain["seed"] == 77, "the seed that was drawn"
    assert plain["speculate"] == "off"
    assert plain["max_new_tokens"] == 20


def test_compare_different(fake, command):
    fake.session.plain_token_ids = (5, 6, 9, 8)
    ran = command("generate", *MODEL, "-p", "Hi", "--compare", "--engine-option", "a=b c")
    assert ran.code == 1
    assert ran.out == TEXT + "\n"
    assert "identical: NO   DIVERGED" in ran.err
    assert "differ first at token 2" in ran.err
    assert "`polydraft verify --model org/target --backend fake --engine-option 'a=\"b c\"'`" in ran.err
    ran = command("generate", *MODEL, "-p", "Hi", "--compare", "--json")
    assert ran.code == 1
    data = json.loads(ran.out)["compare"]
    assert data["identical"] is False
    assert data["judgement"]["position"] == 2
    assert data["judgement"]["tokens"] == [9, 7]
    assert data["plain"]["token_ids"] == [5, 6, 9, 8]
    fake.session.plain_token_ids = (5, 6)
    data = json.loads(command("generate", *MODEL, "-p", "Hi", "--compare", "--json").out)["compare"]
    assert data["judgement"]["position"] == 2
    assert data["judgement"]["tokens"] == [None, 7]
    assert "One output ended" in data["judgement"]["reason"]


def test_compare_says_when_speculation_is_slower(fake, command):
    fake.session.stats = {"decode_seconds": 3.0}
    assert "1.00 x plain" in command("generate", *MODEL, "-p", "Hi", "--compare").err
    fake.session.plain_token_ids = tuple(range(9))
    assert "slower than plain decoding" in command("generate", *MODEL, "-p", "Hi", "--compare").err


# JSON


def test_json_is_one_object(fake, command):
    ran = command("generate", *MODEL, "--prompt-token-ids", "1,2,3", "--json", "--max-new-tokens", "5")
    assert ran.code == 0
    assert ran.out.count("\n") == 1
    data = json.loads(ran.out)
    assert data["backend"] == "fake"
    assert data["target"] == "org/target"
    assert data["drafter"] == "org/drafter"
    assert data["prompt_token_ids"] == [1, 2, 3]
    assert data["token_ids"] == [5, 6, 7, 8]
    assert data["text"] == TEXT
    assert data["finish_reason"] == "length"
    assert data["stats"]["num_drafts"] == 1
    assert data["stats"]["acceptance_rate"] == 0.5
    assert data["stats"]["mean_acceptance_length"] == 3.0
    assert data["running"]["num_speculative_tokens"] == 4
    assert data["settings"]["seed"] == 77
    assert "compare" not in data


_NOISE = """
import ctypes
libc = ctypes.CDLL(None)
def noise(index):
    print("python's print")
    os.write(1, b"written to descriptor 1\\n")
    libc.printf(b"held back by the C library\\n")
    sys.stdout.flush()
session.before_chunk = noise
import atexit
atexit.register(lambda: (print("at exit"), os.write(1, b"at exit, to descriptor 1\\n")))
"""


@pytest.mark.parametrize("closed_stderr", [False, True])
def test_an_engine_that_writes_to_descriptor_1(process, closed_stderr):
    setup = _NOISE + ("os.close(2)" if closed_stderr else "")
    done = process("generate", *MODEL, "-p", "Hi", "--json", setup=setup)
    data = json.loads(done.stdout)
    assert data["text"] == TEXT
    assert done.stdout.count("\n") == 1
    if not closed_stderr:
        assert done.returncode == 0
        for what in ("python's print", "written to descriptor 1", "held back by the C library", "at exit"):
            assert what in done.stderr, what


def test_noise_stays_out_of_the_text_too(process):
    assert process("generate", *MODEL, "-p", "Hi", setup=_NOISE).stdout == TEXT + "\n"


def test_a_child_of_the_engine_does_not_write_there(process):
    setup = "import subprocess\nsession.before_chunk = lambda index: subprocess.run(['echo', 'from a child'])"
    done = process("generate", *MODEL, "-p", "Hi", "--json", setup=setup)
    assert json.loads(done.stdout)
    assert "from a child" in done.stderr


@pytest.mark.parametrize("arguments", [["--max-new-tokens", "0"], ["-m", "org/none", "-p", "Hi"]])
def test_json_prints_nothing_on_failure(fake, command, arguments):
    fake.error = ModelNotFoundError("There is no model.", "Did you mean it?")
    ran = command("generate", *MODEL, "--json", "-p", "Hi", *arguments[:2])
    assert ran.code in {1, 2}
    assert ran.out == ""


# Errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], "`--temperature -1.0` is not allowed"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--min-p", "2"], "--min-p"),
        (["--max-new-tokens", "0"], "`--max-new-tokens 0` is not allowed"),
        (["--seed", "-4"], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--stop", ""], "--stop: A stop string is empty."),
        (["--min-new-tokens", "9", "--max-new-tokens", "3"], "`--min-new-tokens 9` is above `--max-new-tokens 3`"),
        (["--prompt-token-ids", "1"], "exclude"),
        (["--prompt-file", "x"], "exclude"),
        (["--plain", "--compare"], "exclude"),
        (["--drafter", "none", "--compare"], "--compare has nothing to compare with --drafter none"),
        (["--plain", "-d", "ngram"], "no effect with --plain"),
        (["--json", "--show-drafts"], "exclude"),
        (["--system", "x"], "--chat"),
        (["--engine-option", "x"], "NAME=VALUE.Hint: For example num_threads=4."),
        (["--logit-bias", "x"], "For example 7=4."),
        (["--guided", "choice="], "choice=TEXT"),
        (["--guided", "json={"], "json=SCHEMA"),
        (["--guided", "json=3"], "json=SCHEMA"),
        (["--guided", "foo=1"], "json=SCHEMA"),
        (["--engine-option", "x=1", "--engine-option", "x=2"], "twice"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(fake, command, arguments, says):
    ran = command("generate", *MODEL, "-p", "Hi", *arguments)
    assert ran.code == 2
    assert ran.out == ""
    error, hint = ran.err.splitlines()
    assert error.startswith("Error: ")
    assert says in error + hint
    assert hint.startswith("Hint: ")
    assert not fake.calls, "nothing was loaded"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no prompt"),
        (["-p", ""], "empty"),
        (["--prompt-file", "/no/such/file"], "cannot be read"),
        (["--prompt-token-ids", ""], "empty"),
        (["--prompt-token-ids", "1,,2"], "''"),
        (["--prompt-token-ids", "1,-2"], "'-2'"),
        (["--prompt-token-ids", "1,²"], "'²'"),
        (["--prompt-token-ids", "1", "--chat"], "not token ids"),
    ],
)
def test_wrong_prompt(fake, command, monkeypatch, arguments, says):
    monkeypatch.setattr("sys.stdin", None)
    ran = command("generate", *MODEL, *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert not fake.calls


def test_a_prompt_file_of_another_encoding(fake, command, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("ü".encode("latin-1"))
    assert "not UTF-8" in command("generate", *MODEL, "--prompt-file", str(file)).err


def test_failure_is_one_line_and_a_hint(fake, command):
    fake.error = ModelNotFoundError("There is no\nmodel.", "Did you mean it?")
    ran = command("generate", *MODEL, "-p", "Hi")
    assert ran.code == 1
    assert ran.err == "Error: There is no model.\nHint: Did you mean it?\n"


@pytest.mark.parametrize(
    ("python", "options"),
    [
        ("`num_speculative_tokens=0` drafts nothing.", "`-k 0` drafts nothing."),
        ("Use `drafter='ngram'`.", "Use `--drafter ngram`."),
        ("Use `drafter=None`, or `drafter='my model'`.", "Use `--drafter none`, or `--drafter 'my model'`."),
        ("`local_files_only=True` was given.", "`--offline` was given."),
        ("Give one as `drafter`, by a `revision=<commit>`.", "Give one as `--drafter`, by a `--revision <commit>`."),
        ("`engine_options={'a': True, 'b': 'c d'}`", "`--engine-option a=true --engine-option 'b=\"c d\"'`"),
        ("`logit_bias={5: 200.0}`, `stop=('a', 'b')`", "`--logit-bias 5=200.0`, `--stop a --stop b`"),
        ("`verified='warn'` and `hf auth login` stay.", "`verified='warn'` and `hf auth login` stay."),
    ],
)
def test_arguments_are_shown_as_flags(fake, command, python, options):
    fake.error = ModelNotFoundError("No.", python)
    assert command("generate", *MODEL, "-p", "Hi").err == f"Error: No.\nHint: {options}\n"


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback(fake, command, where):
    fake.error = ModelNotFoundError("There is no model.")
    generate = ["generate", *MODEL, "-p", "Hi"]
    ran = command(*(["--debug", *generate] if where == "before" else [*generate, "--debug"]))
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "Error: There is no model." in ran.err


def test_an_unexpected_error(fake, command):
    fake.error = KeyError("x")
    ran = command("generate", *MODEL, "-p", "Hi")
    assert ran.code == 1
    assert ran.err.startswith("Error: An unexpected error: KeyError: 'x'\nHint: ")
    assert "Traceback" not in ran.err


def test_an_engine_that_fails_half_way(fake, command):
    def fail(index):
        if index == 1:
            raise EngineError("The engine failed.", "Try again.", partial_text="Once")

    fake.session.before_chunk = fail
    ran = command("generate", *MODEL, "-p", "Hi")
    assert ran.code == 1
    assert ran.out == CHUNKS[0].text + "\n"  # the error does not stand on the answer's line
    assert "Error: The engine failed." in ran.err
    assert fake.session.closed == 1
    assert fake.session.streams[0].closed


def test_warnings_are_one_line(process):
    setup = "import warnings\nsession.before_chunk = lambda index: warnings.warn('Too slow.')"
    err = process("generate", *MODEL, "-p", "Hi", setup=setup).stderr
    assert re.search(r"^Warning: Too slow\.$", err, re.MULTILINE)
    assert "UserWarning" not in err


# Ends that are not ours


def test_a_reader_that_went_away(process):
    done = process("generate", *MODEL, "-p", "Hi", setup="r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.close(w)")
    assert done.returncode == 141
    assert done.stderr == ""


def test_interrupt(process):
    setup = "session.before_chunk = lambda index: os.kill(os.getpid(), signal.SIGINT) if index else None"
    done = process("generate", *MODEL, "-p", "Hi", setup=setup)
    assert done.returncode == 130
    assert done.stdout == CHUNKS[0].text + "\n"
    assert done.stderr.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in done.stderr


def test_closed_standard_output(process):
    done = process("generate", *MODEL, "-p", "Hi", setup="os.close(1)")
    assert done.returncode == 1
    assert "Standard output is closed" in done.stderr
