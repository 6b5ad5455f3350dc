"""Load: 64 concurrent streams for two minutes, on the engine in process and on a server that is restarted in mid-run.

Every request gives its right result or a typed error, none is left behind, and memory does not grow.
``POLYDRAFT_LOAD_SECONDS`` sets the time.
"""

import collections
import os
import random
import threading
import time

import polydraft
import psutil
from polydraft.engine_parts.serving import ServerProcess, free_port
from polydraft.errors import BackendUnavailableError, PolydraftError

SECONDS = float(os.environ.get("POLYDRAFT_LOAD_SECONDS", "120"))
STREAMS = 64
TARGET = "builtin:tiny-e2b"
OPTIONS = {"kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 64}
LOAD = {"dtype": "float32", "num_speculative_tokens": 4, "context_length": 1024}
PROMPTS = [f"def function_{number}(path):\n" for number in range(24)]
PROMPTS += [f'class Thing{number}:\n    """{"A thing. " * (8 * number)}"""\n' for number in range(8)]
GREEDY = {"max_new_tokens": 40, "ignore_eos": True}
GROWTH = 1.1
"""The most that memory may grow in the second half of a run: allocators' caches fill in the first."""


class Clients:
    """Threads that ask, cancel and misbehave until the time is over."""

    def __init__(self, session, wanted, seconds=SECONDS):
        self.session, self.wanted = session, wanted
        self.counts = collections.Counter()
        self.wrong = []
        self.until = time.monotonic() + seconds
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def join(self):
        for thread in self._threads:
            thread.join(SECONDS + 300)
            assert not thread.is_alive(), "A request hangs."

    def _work(self, seed):
        chance = random.Random(seed)
        while time.monotonic() < self.until:
            try:
                self._one(chance)
            except PolydraftError as error:
                self.counts[type(error).__name__] += 1
                if isinstance(error, BackendUnavailableError):
                    time.sleep(1)  # the server is being restarted
            except Exception as error:
                self.wrong.append(error)

    def _one(self, chance):
        prompt = chance.choice(PROMPTS)
        what = chance.random()
        if what < 0.1:
            self.session.generate([10**9], **GREEDY)
        elif what < 0.15:
            self.session.generate("x " * 4000, **GREEDY)
        elif what < 0.3:
            with self.session.stream(prompt, max_new_tokens=400, ignore_eos=True) as stream:
                for _ in range(chance.randrange(4)):
                    next(stream)
            self.counts["cancelled"] += 1
        elif what < 0.4:
            result = self.session.generate(prompt, temperature=1.0, seed=chance.randrange(99), **GREEDY)
            self.counts["sampled"] += len(result.token_ids) == GREEDY["max_new_tokens"]
        else:
            result = self.session.generate(prompt, speculate=chance.choice(("auto", "off")), **GREEDY)
            if not same(self.wanted[prompt], result):
                self.wrong.append((prompt, result.token_ids))
            self.counts["greedy"] += 1


def same(wanted, found):
    """Equal, or parted at two tokens whose log-probabilities are all but the same."""
    for index, (one, other) in enumerate(zip(wanted.token_ids, found.token_ids, strict=True)):
        if one != other:
            best = dict(wanted.logprobs[index].top)
            return other in best and best[one] - best[other] < 1e-3
    return True


def alone(session):
    return {prompt: session.generate(prompt, logprobs=8, **GREEDY) for prompt in PROMPTS}


def memory(pid):
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def check(clients, *, restarted=False):
    assert not clients.wrong, clients.wrong[:3]
    assert clients.counts["greedy"] > STREAMS
    assert clients.counts["cancelled"] > 0
    assert clients.counts["InvalidRequestError"] + clients.counts["ContextLengthError"] > 0
    allowed = {"greedy", "cancelled", "sampled", "InvalidRequestError", "ContextLengthError"}
    if restarted:
        allowed |= {"EngineError", "BackendUnavailableError", "NotConnectedError"}
        assert clients.counts["EngineError"] > 0
    assert set(clients.counts) <= allowed, clients.counts
    print(dict(clients.counts))


def test_in_process():
    with polydraft.load(TARGET, backend="vllm", engine_options=OPTIONS, **LOAD) as session:
        wanted = alone(session)
        clients = Clients(session, wanted)
        sampled = []
        for _ in range(4):
            time.sleep(SECONDS / 4)
            sampled.append(memory(os.getpid()) >> 20)
        clients.join()
        deadline = time.monotonic() + 20
        while session.engine.num_unfinished and time.monotonic() < deadline:
            time.sleep(0.1)
        assert session.engine.num_unfinished == 0
        assert not session.engine._tickets
        check(clients)
        print("memory in MiB", sampled)
        assert sampled[3] < GROWTH * sampled[1], sampled


def test_a_server_restarted_in_mid_run():
    port = free_port()

    def start():
        running = ServerProcess(command.arguments, name="The server", port=port, environment=command.environment)
        running.wait_until_ready(400)
        return running

    from polydraft_vllm.server.backend import VllmServerBackend

    command = _command(VllmServerBackend(), port)
    process = start()
    try:
        options = {"url": process.url, "connect_retries": 0}
        with polydraft.load(TARGET, backend="vllm-server", engine_options=options, **LOAD) as session:
            clients = Clients(session, alone(session), seconds=3600)
            time.sleep(SECONDS / 2)
            process.kill()
            process = start()
            clients.until = time.monotonic() + SECONDS / 2
            sampled = []
            for _ in range(2):
                time.sleep(SECONDS / 4)
                sampled.append(memory(process.pid) >> 20)
            clients.join()
            deadline = time.monotonic() + 20
            while _busy(session) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not _busy(session), "The server still works on requests that nobody waits for."
            check(clients, restarted=True)
            print("the server's memory in MiB", sampled)
            assert sampled[1] < GROWTH * sampled[0], sampled
    finally:
        process.stop()


def _command(backend, port):
    """What ``polydraft serve`` would run for the pair."""
    from polydraft._load import prepare

    prepared = prepare(TARGET, backend="vllm-server", engine_options=OPTIONS, **LOAD)
    return backend.server_command(prepared.request, host="127.0.0.1", port=port)


def _busy(session):
    samples = session.engine.client.metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(sum(samples.get(name, {}).values()) for name in names)
