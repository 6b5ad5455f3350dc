"""``polydraft batch``: a file of requests in, a file of answers out, whatever comes between."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import polydraft
import pytest
from polydraft.errors import EngineCrashedError, EngineError, InvalidRequestError, PolydraftError
from polydraft_server import ServerSettings, served
from polydraft_server.batch import RayWorkers, ray_data, run, run_batch
from polydraft_server.batch.requests_file import RequestsFile
from scripted import Script, Scripted, scripted_session

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOY = {"backend": "reference", "isolation": "none", "num_speculative_tokens": 4}


def request(name, url=TEXT, method="POST", **body):
    asked = {"prompt": f"Hi {name}", "max_tokens": 4, "seed": 1, **body}
    return {"custom_id": name, "method": method, "url": url, "body": asked}


def chat(name, **body):
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def many(count, **body):
    return [request(f"r{number}", **body) for number in range(count)]


@pytest.fixture
def files(tmp_path):
    """Writes the requests and runs them: ``files(rows)`` gives the answers by ``custom_id``, each of which is once."""

    class Files:
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

        def write(self, rows):
            self.source.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

        def answers(self):
            lines = [json.loads(line) for line in self.output.read_bytes().splitlines()]
            found = {line["custom_id"]: line for line in lines}
            assert len(found) == len(lines)
            return found

        def run(self, load=None, *, model="scripted", **settings):
            self.summary = run_batch(
                self.source,
                self.output,
                model,
                load or (lambda: scripted_session(Script())),
                ServerSettings(**settings),
            )
            assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]
            return self.answers()

        def __call__(self, rows, load=None, **settings):
            self.write(rows)
            return self.run(load, **settings)

    return Files()


def plain(answer):
    """An answer without what differs from one to the next."""
    if isinstance(answer, dict):
        left_out = {"id", "request_id", "created", "stats", "metrics", "prompt_tokens_details"}
        return {name: plain(value) for name, value in answer.items() if name not in left_out}
    return [plain(one) for one in answer] if isinstance(answer, list) else answer


def test_a_line_gets_what_the_server_answers(toy, files):
    server, _ = toy
    messages = [{"role": "user", "content": "Hi"}]
    rows = [
        request("text", seed=3, temperature=1.0, logprobs=2),
        request("prompts", prompt=["a", "b"], n=2, seed=1, temperature=0.5),
        request("ids", prompt=[1, 2, 3], return_token_ids=True),
        chat("chat", messages=messages, max_tokens=6, n=3, seed=5, temperature=1.0),
        request("unknown field", tempreature=1),
        request("wrong model", model="gpt-4o"),
        request("wrong type", max_tokens="many"),
        request("not a number", temperature=float("nan")),
        request("too long", prompt="x" * 100_000),
        request("unsupported", suffix="end"),
        chat("half a character", messages=[{"role": "user", "content": "\ud83d"}], max_tokens=3, seed=1),
        chat("no messages"),
    ]
    found = files(rows, lambda: polydraft.load("builtin:toy", **TOY), model="builtin:toy")
    for row in rows:
        said = server.post(row["url"], json.dumps(row["body"]).encode())
        line = found[row["custom_id"]]
        assert line["id"].startswith("batch_req_")
        assert line["error"] is None
        assert line["response"]["request_id"].startswith("req_")
        assert (line["response"]["status_code"], plain(line["response"]["body"])) == (said.status, plain(said.json))
        assert line["polydraft"].get("ignored") == said.headers.get("x-polydraft-ignored")
    assert found["unknown field"]["polydraft"]["ignored"] == "tempreature (did you mean temperature?)"
    assert (files.summary.total, files.summary.completed, files.summary.failed) == (12, 5, 7)
    assert files.summary.completion_tokens == sum(
        line["response"]["body"].get("usage", {}).get("completion_tokens", 0) for line in found.values()
    )
    assert files.summary.accepted_prediction_tokens > 0


def test_a_stream_is_refused(files):
    found = files([request("a", stream=True), request("b", stream=False)])
    assert found["a"]["response"]["body"]["error"]["param"] == "stream"
    assert found["b"]["response"]["status_code"] == 200


@pytest.mark.parametrize(("concurrency", "most"), [("serial", 1), ("concurrent", 3)])
def test_as_many_at_a_time_as_the_engine_takes(files, concurrency, most):
    script = Script(pace=0.005)
    found = files(many(9, n=2), lambda: scripted_session(script, concurrency), max_running=3)
    assert script.most == most
    assert {line["response"]["status_code"] for line in found.values()} == {200}


GOOD = json.dumps(request("good"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, "{"], "Line 2 is not JSON (Expecting"),
        ([GOOD, "", "   ", "[]"], "Line 4 is not a JSON object."),
        ([GOOD, b"\xff\xfe"], "Line 2 is not UTF-8."),
        (["[" * 100_000], "Line 1 is not usable as JSON: it is nested too deeply."),
        (['{"a":' + "9" * 5000 + "}"], "Line 1 is not usable as JSON: a number in it has too many digits."),
        ([GOOD, json.dumps(request("x")), GOOD], 'Line 3 has the `custom_id` of line 1, "good".'),
        ([json.dumps(request(""))], "Line 1 has no `custom_id`, or it is not text."),
        ([json.dumps(request(7))], "Line 1 has no `custom_id`, or it is not text."),
        ([json.dumps(request("x", url="/v1/chat/completion"))], "(did you mean /v1/chat/completions?)."),
        ([json.dumps(request("x", url="/v1/embeddings" * 99))], "Line 1 has the `url`"),
        ([json.dumps(request("x", url=None))], "Line 1 has the `url` null"),
        ([json.dumps(request("x", method="GET"))], 'Line 1 has another `method` than "POST".'),
        ([json.dumps({**request("x"), "body": "x"})], "Line 1 has no `body`, or it is not an object."),
        ([GOOD, *["x"] * 12], "7 more lines are not usable."),
        ([], "has no requests"),
        (["", " "], "has no requests"),
    ],
)
def test_files_that_are_no_batch(files, lines, says):
    files.source.write_bytes(b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in lines))
    with pytest.raises(InvalidRequestError) as refused:
        files.run(lambda: pytest.fail("it was loaded"))
    assert says in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert not files.output.exists()


def test_line_ends_and_marks_of_other_systems(files):
    files.source.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + json.dumps(request("last")).encode())
    assert set(files.run()) == {"good", "last"}


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_sources_that_cannot_be_read(files, kind):
    if kind == "folder":
        files.source.mkdir()
    elif kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        os.mkfifo(files.source)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        files.run()


def test_outputs_that_are_not_this_batchs(files):
    files([request("a"), request("b")])
    answers = files.output.read_bytes()
    first = answers.splitlines(keepends=True)[0]
    for content, rows, settings, says in (
        (answers, [request("a")], {}, "does not ask for"),
        (answers, [request("a"), request("b", max_tokens=5)], {}, "the answer to another request"),
        (answers, [request("a"), request("b")], {"defaults": {"top_k": 3}}, "or of another model"),
        (answers, [request("a"), request("b")], {"names": ("other",)}, "or of another model"),
        (first + first, [request("a"), request("b")], {}, "two answers"),
        (b"notes\n", [request("a")], {}, "line 1, which is not an answer"),
        (b"notes without an end", [request("a")], {}, "line 1, which is not an answer"),
        (first + b"notes", [request("a"), request("b")], {}, "line 2, which is not an answer"),
        (b'{"custom_id": "a"}\n', [request("a")], {}, "line 1, which is not an answer"),
        (b"[1]\n", [request("a")], {}, "line 1, which is not an answer"),
    ):
        files.write(rows)
        files.output.write_bytes(content)
        with pytest.raises(InvalidRequestError, match=says):
            files.run(lambda: pytest.fail("it was loaded"), **settings)
        assert files.output.read_bytes() == content
    files.output.unlink()
    os.link(files.source, files.output)
    with pytest.raises(InvalidRequestError, match="the file of the requests"):
        files.run()
    files.output.unlink()
    files.output.mkdir()
    with pytest.raises(InvalidRequestError):
        files.run()
    files.output = files.output.parent / "nowhere" / "out.jsonl"
    with pytest.raises(InvalidRequestError, match="There is no folder"):
        files.run()
    assert not files.output.parent.exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody can make a file")
def test_a_folder_that_takes_no_file_is_not_taken_for_another_process(files):
    files.write(many(1))
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        run_batch(files.source, Path("/proc/x"), "scripted", lambda: pytest.fail("it was loaded"), ServerSettings())


def test_what_is_done_is_kept(files):
    rows = many(6)
    first = files(rows)
    lines = files.output.read_bytes().splitlines(keepends=True)
    files.output.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # as a killed process may leave it
    script = Script()
    second = files.run(lambda: scripted_session(script))
    assert len(script.prompts) == 3
    assert files.summary.done_before == 3
    assert {name: plain(line) for name, line in second.items()} == {name: plain(line) for name, line in first.items()}
    assert files.run(lambda: pytest.fail("it was loaded")) == second
    assert files.summary.completed == 6


def test_failures_that_may_pass_are_done_again(files):
    rows = [*many(3), request("refused", suffix="x")]
    first = files(rows, lambda: scripted_session(Script(error=EngineError("It failed.", "Wait."))))
    statuses = {name: line["response"]["status_code"] for name, line in first.items()}
    assert statuses == {"r0": 500, "r1": 500, "r2": 500, "refused": 400}
    if os.name == "posix":
        files.output.chmod(0o640)
    script = Script()
    second = files.run(lambda: scripted_session(script))
    assert sorted(script.prompts) == ["Hi r0", "Hi r1", "Hi r2"]
    assert second["refused"] == first["refused"]
    assert (files.summary.completed, files.summary.failed) == (3, 1)
    if os.name == "posix":
        assert files.output.stat().st_mode & 0o777 == 0o640


def test_time_limits(files):
    found = files([request("slow", max_tokens=1000)], lambda: scripted_session(Script(pace=0.02)), request_seconds=0.1)
    assert found["slow"]["response"]["body"]["error"]["code"] == "timeout"


class Fragile(Scripted):
    """Its process ends at a prompt with the word ``poison``."""

    def rounds(self, generation):
        asked = bytes(token for token in generation.request.prompt_token_ids if token < 256)
        if b"poison" in asked:
            time.sleep(0.05)
            raise EngineCrashedError("The engine has ended.", "See its log.")
        yield from super().rounds(generation)


def fragile(loads, concurrency="concurrent"):
    def load():
        loads.append(1)
        return scripted_session(Script(pace=0.01), concurrency, engine=Fragile)

    return load


def test_a_line_that_ends_the_engine_costs_its_neighbours_nothing(files):
    loads = []
    rows = [*many(5), request("bad", prompt="poison"), *[request(f"s{number}") for number in range(5)]]
    found = files(rows, fragile(loads), max_running=4)
    statuses = {name: line["response"]["status_code"] for name, line in found.items()}
    assert statuses.pop("bad") == 503
    assert set(statuses.values()) == {200}
    assert 3 <= len(loads) <= 4  # the first, after the crash among others, and after two alone


def test_an_engine_that_is_lost_ends_the_batch(files, monkeypatch):
    monkeypatch.setattr(served, "_FIRST_PAUSE", 0.01)
    loads = []
    once = fragile(loads, "serial")

    def load():
        if loads:
            raise EngineError("There is no memory.", "Free some.")
        return once()

    with pytest.raises(EngineError, match="no memory"):
        files([request("a"), request("bad", prompt="poison"), request("b")], load)
    assert "a" in files.answers()
    assert files.run().keys() == {"a", "b", "bad"}


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes")
def test_a_full_disk(files):
    import resource

    rows = many(20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    files.write(rows)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3500, hard))
    try:
        with pytest.raises(PolydraftError, match="cannot be written"):
            files.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = files.answers()
    assert 0 < len(kept) < 20
    assert files.output.read_bytes().endswith(b"\n")
    assert {name: files.run()[name] for name in kept} == kept
    assert len(files.answers()) == 20


def test_two_at_once_are_refused(files):
    def load():
        with pytest.raises(InvalidRequestError, match="Another process is at work"):
            run_batch(files.source, files.output, "scripted", lambda: pytest.fail("it was loaded"))
        return scripted_session(Script())

    assert len(files(many(2), load)) == 2


def test_a_source_that_changes_meanwhile(files):
    def load():
        files.write([*many(2), request("r2", prompt="changed"), *many(5)[3:]])
        return scripted_session(Script())

    with pytest.raises(PolydraftError, match="changed while it was being worked on, at line 3"):
        files(many(5), load)


def test_memory_does_not_grow_with_the_file(tmp_path):
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for number in range(500):
            file.write(f"{json.dumps(request(f'r{number}', prompt='x' * 20_000))}\n")
    tracemalloc.start()
    try:
        requests = RequestsFile(source, {})
        assert sum(1 for _ in requests.without({})) == len(requests) == 500
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def start(files, *arguments):
    line = [sys.executable, "-m", "polydraft", "batch", str(files.source), str(files.output), *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_processes_lose_and_double_nothing(files):
    rows = many(24, max_tokens=24)
    files.write(rows)
    arguments = ("--model", "builtin:toy", "--backend", "reference", "--json")
    kept = b""
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(files, *arguments)
        deadline = time.monotonic() + 60
        while not (files.output.exists() and files.output.read_bytes().count(b"\n") > kept.count(b"\n") + 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "Traceback" not in err
        found = files.output.read_bytes()
        assert found.startswith(kept)
        kept = found[: found.rfind(b"\n") + 1]
        assert kept.count(b"\n") < 24
    found = files.run(lambda: polydraft.load("builtin:toy", **TOY), model="builtin:toy")
    assert files.output.read_bytes().startswith(kept)
    assert found.keys() == {row["custom_id"] for row in rows}
    assert files.summary.completed == 24
    assert files.summary.done_before == kept.count(b"\n")


def test_the_command(files, capfd, monkeypatch):
    from polydraft._cli.app import run
    from polydraft._cli.commands import batch

    monkeypatch.setattr(batch, "claim_output", lambda: sys.stdout)  # it is claimed once in a process
    arguments = ["batch", str(files.source), str(files.output), "--model", "builtin:toy", "--backend", "reference"]
    for rows, further, code, says in (
        ([request("a")], [], 0, "1 of 1 lines answered, 0 with an error"),
        ([request("a"), request("b", model="x")], ["--plain"], 2, "another model or other settings"),
        ([request("a"), request("b", model="x")], [], 1, "1 of 2 lines answered, 1 with an error"),
        ([request("a"), request("a")], [], 2, "has the `custom_id` of line 1"),
        ([request("a")], ["--workers", "2"], 2, "need --ray"),
        ([request("a")], ["--max-running", "0"], 2, "--max-running"),
        ([request("a")], ["--temperature", "-1"], 2, "--temperature -1"),
    ):
        files.write(rows)
        assert run([*arguments, *further]) == code
        out, err = capfd.readouterr()
        assert says in out + err
        assert "Traceback" not in err


def test_what_workers_lose_is_done_again(files, monkeypatch):
    """A worker without Ray, whose cluster loses a block, repeats another, and then fails."""
    worker = ray_data._Worker(lambda: scripted_session(Script()), ServerSettings(names=("scripted",)))
    rounds = []

    def answers(lines, load, settings, workers):
        lines = list(lines)
        rounds.append([line.custom_id for line in lines])
        done = [json.loads(answer) for answer in worker.answers([*map(ray_data._packed, lines[:3])])]
        yield from (*done, *done)
        if len(rounds) != 2:
            raise EngineError("A machine has died.", "Start it again.")

    monkeypatch.setattr(run, "answers_of_workers", answers)
    files.write([*many(5), request("\ud83d", prompt="x")])
    summary = run_batch(files.source, files.output, "scripted", lambda: None, ray=RayWorkers())
    assert rounds == [["r0", "r1", "r2", "r3", "r4", "\ud83d"], ["r3", "r4", "\ud83d"]]
    assert (summary.completed, len(files.answers())) == (6, 6)
    files.output.unlink()
    monkeypatch.setattr(worker, "answers", lambda lines: [])
    for says in ("has died", "without an answer"):
        with pytest.raises(EngineError, match=says):
            run_batch(files.source, files.output, "scripted", lambda: None, ray=RayWorkers())
        rounds[:] = [1]


def test_without_ray(files):
    try:
        import ray.data  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        pytest.skip("Ray is installed")
    files.write(many(1))
    with pytest.raises(PolydraftError, match=r"Ray Data is not installed.*server\[ray\]"):
        run_batch(files.source, files.output, "m", lambda: pytest.fail("it was loaded"), ray=RayWorkers())
