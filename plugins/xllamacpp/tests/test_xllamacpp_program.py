"""The same server as a program: its flags are llama-server's."""

from dataclasses import replace
from pathlib import Path

import pytest
from polydraft._load import prepare
from polydraft.engine_parts.serving import LOOPBACK, ServerProcess, free_port
from polydraft.secrets import Secret
from polydraft_gguf.serving.client import Client
from polydraft_xllamacpp.in_process import command
from polydraft_xllamacpp.program import _parser, main
from polydraft_xllamacpp.settings import ServerSettings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spec_type": "draft-mtp", "spec_draft_model": Path("d.gguf"), "spec_draft_n_max": 3, "parallel": 2},
        {"cache_type_k": "q8_0", "cache_type_v": "f16", "flash_attn": True, "swa_full": True, "mmap": False},
        {"device": "cuda:1", "n_gpu_layers": 7, "threads": 5, "batch_size": 64, "host": "::1", "port": 8080},
        {"spec_type": "ngram-mod", "spec_ngram_size": 9, "device": "cpu"},
    ],
)
def test_settings_come_back_from_their_flags(changes):
    settings = replace(ServerSettings(model=Path("m.gguf"), ctx_size=512), **changes)
    assert ServerSettings(**vars(_parser().parse_args(settings.arguments()))) == settings


def test_flags_as_the_backend_llama_server_gives_them():
    pairs = {"--model": "m", "--ctx-size": "9", "--ubatch-size": "4", "--flash-attn": "on", "--device": "CUDA1"}
    flags = [word for pair in {**pairs, "--spec-draft-type-k": "f32"}.items() for word in pair]
    found = ServerSettings(**vars(_parser().parse_args(flags)))
    assert (found.batch_size, found.flash_attn, found.device, found.cache_type_k) == (4, True, "cuda:1", "f32")
    assert ServerSettings(**vars(_parser().parse_args([*flags[:4], "--device", "none"]))).device == "cpu"


def test_what_it_says_of_itself(capsys):
    for flag, said in (
        ("--version", "version: xllamacpp 20"),
        ("--list-devices", "Available devices:\n"),
        ("--help", "--spec-draft-n-max"),
    ):
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert end.value.code == 0
        assert said in capsys.readouterr().out


def test_what_is_wrong(capfd, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["--model", "m", "--ctx-size", "64", "--no-such-flag"])
    assert end.value.code == 1
    assert capfd.readouterr().err == "error: invalid argument: --no-such-flag\n"
    assert main(["--model", str(tmp_path / "none.gguf"), "--ctx-size", "64"]) == 1
    assert "failed to open GGUF file" in capfd.readouterr().err


def test_the_command_that_serves_a_pair(gguf):
    prepared = prepare(
        gguf("tiny-e2b"), backend="xllamacpp", drafter=gguf("tiny-e2b-assistant"), device="cpu", context_length=256
    )
    port, key = free_port(), Secret("canary-5d1e")
    served = prepared.backend.server_command(prepared.request, host=LOOPBACK, port=port)
    process = ServerProcess(served.arguments, name="it", port=port, environment={"LLAMA_API_KEY": key})
    try:
        process.wait_until_ready(60)
        body = {"prompt": [2, 300, 301], "n_predict": 12, "temperature": 0}
        answer = Client(process.url, name="it", key=key, own=True).json("/completion", body)
        assert answer["timings"]["draft_n"] > 0
        assert "canary" not in process.last_words()
    finally:
        process.stop()
        process.discard_log()
    assert command(ServerSettings(model=Path("m"), ctx_size=1))[1:3] == ["-m", "polydraft_xllamacpp.program"]


@pytest.mark.parametrize(("native", "weights"), [(True, "bf16"), (False, "f32")])
def test_auto_follows_the_rule_of_all_engines(data, monkeypatch, native, weights):
    """A checkpoint's bfloat16 becomes float32 on a CPU that would emulate it."""
    monkeypatch.setattr("polydraft.hardware.multiplies_natively", lambda name: native or name == "float32")
    pair = {"drafter": data / "tiny-llama-draft", "device": "cpu"}
    prepared = prepare(data / "tiny-llama", backend="xllamacpp", **pair)
    command = prepared.backend.server_command(prepared.request, host=LOOPBACK, port=8123).arguments
    files = [word for word in command if word.endswith(".gguf")]
    assert [file.rpartition("-")[2] for file in files] == [f"{weights}.gguf"] * 2
