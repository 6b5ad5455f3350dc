"""What was given and would do nothing is refused or told, by ``load`` and by the command line."""

import json

import polydraft
import pytest
from polydraft._cli.app import run
from polydraft._load import prepare
from polydraft._workers.backend import WorkerBackend
from polydraft.contract import Backend, Capabilities, Diagnosis, EngineOptions, RunningInfo, WholeEngine
from polydraft.errors import InvalidRequestError
from polydraft.verification._command import verify
from polydraft_reference.options import ReferenceOptions
from tuned import TOY, keep, rows_of

AGREES = {"engine_options": {"agreement": 0.5}}


@pytest.mark.parametrize(
    ("drafter", "runs"),
    [
        ("ngram", "has one of kind ngram"),
        (None, "decodes plainly"),
        ("builtin:toy-draft", "has one of kind draft-model"),
    ],
)
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_an_option_of_other_drafters(drafter, runs, isolation):
    with pytest.raises(InvalidRequestError, match=f"'agreement' has no effect: drafters of kind mtp .* {runs}"):
        polydraft.load(TOY, drafter=drafter, backend="reference", isolation=isolation, **AGREES)
    with polydraft.load(TOY, backend="reference", isolation=isolation, **AGREES) as session:
        assert session.running.method == "mtp"
    none = {"engine_options": {"agreement": None}}  # is as if it were not given
    polydraft.load(TOY, drafter=drafter, backend="reference", isolation=isolation, **none).close()


def test_options_of_another_environment_say_which_drafters_use_them():
    record = polydraft.default_host().backends()["reference"]
    elsewhere = WorkerBackend(record, options=json.loads(json.dumps(ReferenceOptions.model_json_schema()))).options
    told = [model.model_fields["agreement"].json_schema_extra for model in (elsewhere, ReferenceOptions)]
    assert told == [{"drafters": ["mtp"]}] * 2


def test_an_option_of_other_drafters_than_the_measured_one_is_a_note():
    rows = rows_of({("ngram", 4): 90.0, (None, 0): 80.0})
    keep(rows=rows, **AGREES)
    notes = prepare(TOY, backend="reference", **AGREES).request.plan.note
    assert "Measured on" in notes
    assert "'agreement' has no effect" in notes


def test_a_measurement_takes_options_of_some_of_its_drafters():
    found = polydraft.bench(TOY, backend="reference", max_new_tokens=4, repeats=1, prompts=["a"], **AGREES)
    assert {row.method: row.state for row in found.rows} == {"mtp": "measured", None: "measured"}


@pytest.mark.parametrize("measure", [polydraft.bench, polydraft.tune, verify])
@pytest.mark.parametrize("argument", [{"prefix_cache_bytes": 1 << 20}, {"verified": "require"}])
def test_what_measurements_set_themselves(measure, argument):
    with pytest.raises(InvalidRequestError, match=f"`{next(iter(argument))}=.*` has no effect"):
        measure(TOY, backend="reference", **argument)


def test_a_revision_of_what_is_not_on_the_hub():
    with pytest.raises(InvalidRequestError, match="`revision='v1'` has no effect"):
        polydraft.load(TOY, revision="v1")


class Served(WholeEngine):
    """Of a server that runs elsewhere."""

    def __init__(self, request, tokenizer):
        self.tokenizer = tokenizer
        self.running = RunningInfo.of(
            request,
            engine="x",
            engine_version="1",
            dtype="the server's",
            device="the server's",
            context_length=64,
            concurrency="concurrent",
        )

    def rounds(self, generation):
        raise NotImplementedError

    def close(self):
        pass


class OfAServer(Backend):
    """Loads ``Served``."""

    options = EngineOptions

    def capabilities(self):
        return Capabilities(drafter_kinds={"ngram"})

    def diagnose(self):
        return Diagnosis(usable=True)

    def load_engine(self, request):
        from polydraft_reference.tokenizer import ByteTokenizer

        return Served(request, ByteTokenizer())


def test_what_a_server_has_chosen_is_told():
    from polydraft._load import open_session

    request = prepare(TOY, drafter="ngram", device="cpu", prefix_cache_bytes=5).request
    with open_session(OfAServer(), request) as session:
        told = [note for note in session.running.notes if "has no effect" in note]
    assert [note.split("`")[1] for note in told] == ["device='cpu'", "prefix_cache_bytes=5"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            [
                "serve",
                "--own-server",
                "--api-key-file",
                "k",
                "-t",
                "0.5",
                "--isolation",
                "none",
                "--max-waiting",
                "256",
            ],
            ["--api-key-file", "--temperature", "--isolation", "--max-waiting", "cannot be given with --own-server"],
        ),
        (["serve", "--own-server", "--prefix-cache-bytes", "5"], ["`--prefix-cache-bytes`"]),
        (["tune", "--forget", "--seconds", "3"], ["--seconds cannot be given with --forget"]),
        (["pairs", "--device", "cpu", "--offline"], ["--device, --offline is about the packings"]),
        (["generate", "-p", "x", "--plain", "--show-drafts"], ["--show-drafts has no effect"]),
        (["chat", "--drafter", "none", "--show-drafts"], ["--show-drafts has no effect"]),
        (["verify", "--prefix-cache-bytes", "5"], ["--prefix-cache-bytes"]),
    ],
    ids=lambda value: value[0],
)
def test_flags(line, says, capfd):
    named = [*line, "-m", TOY] if line[0] != "pairs" else line
    assert run(named) == 2
    found = capfd.readouterr().err
    assert all(words in found for words in says), found


def test_what_the_engines_server_takes_is_let_through(capfd):
    assert run(["serve", "--own-server", "--print", "-m", TOY, "-k", "2", "--port", "0", "--context-length", "64"]) == 1
    assert "has no server" in capfd.readouterr().err
