"""Loading and generating at all, and results that agree with themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect

if TYPE_CHECKING:
    from polydraft_conformance.bench import Bench


@check(scope="case")
def test_loads_what_was_asked(polydraft_bench: Bench) -> None:
    """session.running names the backend, target, drafter, kind and k that were asked for, and is complete."""
    running, case = polydraft_bench.session.running, polydraft_bench.case
    found = (running.backend, running.target, running.method, running.num_speculative_tokens)
    asked = (polydraft_bench.suite.options.backend, case.pair.target, case.kind, case.k)
    expect(found == asked, f"session.running says {found}, but {asked} was asked for (backend, target, method, k).")
    drafter = None if case.kind == "ngram" else case.drafter
    expect(running.drafter == drafter, f"session.running names the drafter {running.drafter!r}, not {drafter!r}.")
    expect(running.speculation_off is None, f"Speculation is off: {running.speculation_off}.")
    for name in ("engine", "engine_version", "dtype", "device"):
        expect(bool(getattr(running, name)), f"session.running.{name} is empty.")
    window = polydraft_bench.window
    expect(
        running.context_length >= 2 * window + 3 + 32,
        f"The context of {running.context_length} tokens is too short to go past the window of {window}.",
    )


@check(scope="case", after=("test_loads_what_was_asked",))
def test_generates(polydraft_bench: Bench) -> None:
    """Plain and speculative generations end without an error, within the time limit, at their full length."""
    for run in polydraft_bench.evidence.runs:
        for name, result in (("plain", run.plain), ("speculative", run.speculative)):
            wanted = run.prompt.max_new_tokens
            expect(
                len(result.token_ids) == wanted,
                f"The {name} output for the prompt {run.prompt.place} (of the window) has {len(result.token_ids)} "
                f"tokens, not {wanted}: it ended with {result.finish_reason!r}.",
            )


@check(scope="case", after=("test_generates",))
def test_results_are_consistent(polydraft_bench: Bench) -> None:
    """A result repeats its prompt, gives its effective settings and why it ended, and counts its tokens."""
    for run in polydraft_bench.evidence.runs:
        for name, result in (("plain", run.plain), ("speculative", run.speculative)):
            where = f"{name} result, prompt {run.prompt.place}"
            expect(result.prompt_token_ids == run.prompt.token_ids, f"{where}: prompt_token_ids is another prompt.")
            expect(
                result.finish_reason == "length", f"{where}: finish_reason is {result.finish_reason!r}, not 'length'."
            )
            expect(
                result.settings.max_new_tokens == run.prompt.max_new_tokens,
                f"{where}: the settings are not those given.",
            )
            expect(result.stats.num_tokens == len(result.token_ids), f"{where}: stats.num_tokens is wrong.")
            expect(bool(result.raw_text), f"{where}: raw_text is empty.")
        off = run.plain.speculation_off
        expect(off is not None and off.code == "caller", f"A plain result says speculation_off={off}, not 'caller'.")
        expect(
            run.speculative.speculation_off is None,
            f"A speculative result says that speculation was off: {run.speculative.speculation_off}.",
        )
