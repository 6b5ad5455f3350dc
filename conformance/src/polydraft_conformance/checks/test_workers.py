"""Engines in worker processes: a worker that is killed ends its own session, and nothing else."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from polydraft.errors import EngineCrashedError, EngineError

from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import expect
from polydraft_conformance.evidence import greedy_settings

if TYPE_CHECKING:
    from polydraft import Session

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain")
_NEW_TOKENS = 300
"""More than a worker runs ahead: it is killed before it has sent them all."""
_READ = 3
"""Chunks that are read before."""


@check(scope="once", after=_AFTER, time_factor=3)
def test_a_killed_worker_ends_only_its_own_session(polydraft_bench: Bench) -> None:
    """A worker killed in the middle of an output is an EngineCrashedError with the text so far; all else goes on.

    Proves: With `isolation="process"`, the reader of an output whose worker is killed gets an `EngineCrashedError` that
    names the signal and holds the text so far, later calls of that session get one, too, and closing it works; another
    session gives its output unchanged, and a session that is loaded afterwards gives the same.
    A failure means: The death of one engine is seen as something else, hangs its callers, or touches other sessions.
    Look at: Processes that the engine starts itself, and files, ports or shared memory that two of them share.
    """
    bench = polydraft_bench
    if bench.session.running.process != "worker":
        not_claimed("The engine is not in a worker: `--polydraft-isolation process` puts it there.")
    prompt = bench.prompt(12)
    settings = greedy_settings(_NEW_TOKENS)
    expected = bench.session.generate(list(prompt), **greedy_settings(40))
    with bench.opened() as doomed:
        text = _killed(doomed.session, prompt, settings)
        other = bench.session.generate(list(prompt), **greedy_settings(40))
        bench.same(expected, other, wrong="After another session's worker was killed, this one gives other tokens.")
        expect(
            expected.raw_text.startswith(text[: len(expected.raw_text) // 2]) or not text,
            f"The partial text {text!r} is not the start of the output {expected.raw_text!r}.",
        )
        try:
            doomed.session.generate(list(prompt), **greedy_settings(4))
        except EngineCrashedError:
            pass
        else:
            raise AssertionError("A session whose worker was killed still generates.")
    with bench.opened() as again:
        found = again.session.generate(list(prompt), **greedy_settings(40))
        bench.same(expected, found, wrong="A session that is loaded after the kill gives other tokens.")


def _killed(session: Session, prompt: list[int], settings: dict[str, object]) -> str:
    """Kill a session's worker in the middle of an output; the partial text that the error holds."""
    pid = session.running.process_id
    assert pid is not None
    read = ""
    stream = session.stream(list(prompt), **settings)  # type: ignore[arg-type]
    try:
        for number, chunk in enumerate(stream, 1):
            read += chunk.text
            if number == _READ:
                # Windows has no SIGKILL, and ends a process at once by any other signal.
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    except EngineCrashedError as error:
        named = error.signal == "SIGKILL" or not hasattr(signal, "SIGKILL")
        expect(named, f"The error of a killed worker names the signal {error.signal!r}: {error}")
        expect(error.partial_text.startswith(read), f"The partial text {error.partial_text!r} is not what was read.")
        return error.partial_text
    except EngineError as error:
        raise AssertionError(f"A killed worker gives a {type(error).__name__}: {error}") from error
    raise AssertionError(f"The output went on to its end after its worker had been killed ({_NEW_TOKENS} tokens).")
