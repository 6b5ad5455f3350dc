"""The whole way, from the command line to the reference engine: some in a separate process, many in this one."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("polydraft_reference", reason="needs an engine: polydraft-reference")

TOY = ("--model", "builtin:toy", "--backend", "reference")


def polydraft(*arguments, stdin=None):
    environment = {name: value for name, value in os.environ.items() if name not in {"FORCE_COLOR", "NO_COLOR"}}
    return subprocess.run(
        [sys.executable, "-m", "polydraft", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        input=stdin or "",
        env=environment,
    )


def test_the_process_ends_without_a_look_through_all_objects_of_an_engine():
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "from polydraft._cli.app import main; sys.argv = ['polydraft', '--help']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith("True\n")


def generate(*arguments):
    done = polydraft("generate", *TOY, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("sampling", [(), ("--temperature", "0.9", "--seed", "3")])
def test_speculation_changes_nothing(sampling, command):
    usual = ("generate", *TOY, "--json", "--prompt-token-ids", "1,40,41,42", "-n", "40", *sampling)
    plain = json.loads(command(*usual, "--plain").out)
    assert plain["drafter"] is None
    assert plain["speculation_off"]["code"] == "caller"
    for drafter in ("auto", "ngram", "builtin:toy-draft"):
        found = json.loads(command(*usual, "--drafter", drafter, "-k", "3", "--compare").out)
        assert found["token_ids"] == plain["token_ids"]
        assert found["compare"]["identical"] is True
        assert found["running"]["num_speculative_tokens"] == 3
        assert found["prompt_token_ids"] == [1, 40, 41, 42]


def test_statistics_are_there():
    stats = generate("-p", "Once upon a time", "-n", "60", "--ignore-eos")["stats"]
    assert stats["num_tokens"] == 60
    assert 0 < stats["num_accepted_tokens"] <= stats["num_draft_tokens"]
    assert stats["acceptance_rate"] == stats["num_accepted_tokens"] / stats["num_draft_tokens"]


def test_chat():
    done = polydraft("chat", *TOY, "-n", "10", stdin="Hi\nMore\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens/s") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "builtin:toi", "-p", "x"], 1, "builtin:toy"),
        ([*TOY, "-p", "x", "--backend", "nonsense"], 1, "reference"),
        ([*TOY, "-p", "x", "-k", "0"], 2, "`-k 0`"),
        ([*TOY, "-p", "x", "-k", "1000"], 2, "`-k 1000`"),
        ([*TOY, "-p", "x", "--device", "cuda"], 1, "cpu"),
        ([*TOY, "-p", "x", "--engine-option", "nonsense=1"], 2, "agreement"),
        ([*TOY, "--prompt-token-ids", "999999"], 2, "999999"),
        ([*TOY, "-p", "word " * 2000], 2, "context"),
        ([*TOY, "-p", "x", "--drafter", "/no/such/folder"], 1, "/no/such/folder"),
    ],
)
def test_bad_requests(arguments, code, says, command):
    done = command("generate", *arguments)
    assert done.code == code, done.err
    assert done.out == ""
    assert says in done.err
    assert "Traceback" not in done.err
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["Error", "Hint"]


def test_verbose_shows_what_was_chosen():
    done = polydraft("generate", *TOY, "-p", "Hi", "-n", "3", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "Chosen for builtin:toy: reference; mtp with builtin:toy-assistant, k=4, chosen by registry." in done.stderr
    assert "Chosen" not in polydraft("generate", *TOY, "-p", "Hi", "-n", "3").stderr


def test_tables():
    assert "reference" in polydraft("backends").stdout
    assert "builtin:toy-assistant" in polydraft("pairs", "toy").stdout
    done = polydraft("doctor", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["usable"] is True


def test_comparing_with_forced_tokens_beyond_the_warm_up():
    found = generate("--prompt-token-ids", "1,40,41,42", "-n", "20", "--force-token", "9=40", "--compare")
    assert found["token_ids"][9] == 40
    assert found["compare"]["identical"]
