"""A backend for tests of workers, imported by the worker: its whole engine does what a prompt's first letter says."""

import ctypes
import errno
import gc
import logging
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from polydraft.contract import Backend, Capabilities, Diagnosis, EngineOptions, RunningInfo, WholeEngine
from polydraft.errors import InvalidRequestError, NonFiniteLogitsError, SystemResourceError, UnsupportedError
from polydraft.secrets import Secret
from scripted_engines import Letters, emit, good_rounds

__all__ = ["PROMPTS", "Scripted"]


class Options(EngineOptions):
    concurrency: str = "concurrent"
    at_load: str = ""
    folder: str = ""
    api_key: Secret | None = None


def two_rounds(generation):
    for _ in range(2):
        yield emit(generation, (1, 2), drafted=1, accepted=1)


def uncertain(generation, *, confirmed):
    """Three rounds whose ids are a tokenizer's."""
    for _ in range(3):
        found = emit(generation, (1, 2), drafted=1, accepted=1, certain_ids=False)
        if confirmed and generation.finish_reason is not None:
            generation.confirm_ids()
        yield found


def then(act):
    def rounds(generation):
        yield from two_rounds(generation)
        act()
        yield from good_rounds(generation)

    return rounds


def fails(make):
    def act():
        raise make()

    return then(act)


def waits(generation):
    """A prefill that only a cancellation ends."""
    while not generation.cancelled():
        time.sleep(0.005)
    return iter(())


def steps(generation):
    """Rounds as fast as they are taken; each leaves a byte in a file, so that a test can count them."""
    with Path(os.environ["STEPS"]).open("ab", buffering=0) as file:
        while generation.finish_reason is None and not generation.cancelled():
            file.write(b".")
            yield emit(generation)


def says():
    print("to standard output")
    print("to standard error", file=sys.stderr)
    os.write(1, b"from native code\n")
    logging.getLogger("scripted.engine").info("a line of %s", "information")
    logging.getLogger("scripted.engine").debug("a line for debugging")
    warnings.warn("this is slow", RuntimeWarning, stacklevel=1)


def full_disk():
    error = SystemResourceError("The disk is full.", "Free some space.")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    return error


def aborts():
    os.write(2, b"free(): invalid pointer\n")
    os.abort()


def forks_and_dies():
    """A process that the engine has forked, and that leaves its process group, outlives it for a while."""
    if os.fork() == 0:
        os.setsid()
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


ENDS = {
    "SIGKILL": forks_and_dies,
    "SIGABRT": aborts,
    "SIGSEGV": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(7),
}
PROMPTS = {
    "a": good_rounds,
    "b": waits,
    "c": steps,
    "d": then(says),
    "e": fails(lambda: RuntimeError("the engine's own")),
    "f": fails(lambda: NonFiniteLogitsError.at(float("nan"), 7, "float16")),
    "g": fails(full_disk),
    "h": then(ENDS["SIGKILL"]),
    "i": then(ENDS["SIGABRT"]),
    "j": then(ENDS["SIGSEGV"]),
    "k": then(ENDS["exit"]),
    "l": two_rounds,
    "m": partial(uncertain, confirmed=True),
    "n": partial(uncertain, confirmed=False),
    "o": fails(lambda: RuntimeError(f"{gc.get_freeze_count()} objects are frozen")),
}
"""Prompt -> what its call does."""


class Engine(WholeEngine):
    shared_sequences = 3

    def __init__(self, request):
        options = request.engine_options
        self.tokenizer = Letters()
        self.running = RunningInfo.of(
            request,
            engine="script",
            engine_version="1",
            dtype="float32",
            device="cpu",
            context_length=1_000_000,
            concurrency=options.concurrency,
            notes=[f"The key has {len(options.api_key.reveal())} letters." if options.api_key else ""],
        )

    def rounds(self, generation):
        return PROMPTS[self.tokenizer.token_bytes(generation.request.prompt_token_ids[0]).decode()](generation)

    def check_settings(self, settings):
        if settings.top_k == 3:
            raise UnsupportedError("The script has no top_k of 3.", "Give another.")
        if settings.top_k == 4:
            raise InvalidRequestError("It is never 4.", "Give another.", argument="top_k")

    def close(self):
        if "hangs" in os.environ.get("CLOSES", ""):
            time.sleep(600)


class Scripted(Backend):
    options = Options

    def capabilities(self):
        return Capabilities(drafter_kinds={"ngram"}, sampling={"top_k", "seed"}, concurrent_calls=True)

    def diagnose(self):
        return Diagnosis(usable=True, engine_version=f"1 of process {os.getpid()}")

    def load_engine(self, request):
        at_load = request.engine_options.at_load
        if at_load == "waits":
            print("loading", file=sys.stderr, flush=True)
            time.sleep(600)
        if at_load == "refuses":
            raise UnsupportedError("The script cannot load this.", "Take another.")
        if at_load:
            ENDS[at_load]()
        return Engine(request)
