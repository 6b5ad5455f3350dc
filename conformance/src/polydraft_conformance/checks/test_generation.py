"""Loading and generating at all, and results that agree with themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.pairs import INSIDE

if TYPE_CHECKING:
    from polydraft_conformance.bench import Bench


@check(scope="case")
def test_loads_what_was_asked(polydraft_bench: Bench) -> None:
    """session.running names the backend, target, drafter, kind and k that were asked for, and is complete.

    Proves: The session says what runs: results are assigned to the right pair, drafter and k.
    A failure means: `RunningInfo` names something else than was asked for, or is incomplete; or the model's context is
    too short for the suite's prompts, which must go past the sliding window.
    Look at: `RunningInfo.of(request, ...)`, which takes pair, kind and k from the request; and the model's context
    length.
    """
    running, case = polydraft_bench.session.running, polydraft_bench.case
    found = (running.backend, running.target, running.method, running.num_speculative_tokens)
    asked = (polydraft_bench.suite.options.backend, case.pair.target, case.kind, case.k)
    expect(found == asked, f"session.running says {found}, but {asked} was asked for (backend, target, method, k).")
    drafter = None if case.kind == "ngram" or case.drafter == INSIDE else case.drafter
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
    """Plain and speculative generations end without an error, within the time limit, at their full length.

    Proves: The backend can be used at all: plainly and with speculation, on prompts shorter and longer than the sliding
    window.
    A failure means: A generation raised an error, was too slow, or stopped early although EOS was ignored. Most other
    checks follow from this one.
    Look at: The error in the message: if it names a rule of the contract, section 5 or 6 of the plugin guide explains
    it. If an output is too short: `ignore_eos`, that is, an empty `TokenRequest.eos_token_ids`.
    """
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
    """A result repeats its prompt, gives its effective settings and why it ended, and counts its tokens.

    Proves: Results can be used without looking at the engine: they hold the prompt, the settings in effect, the reason
    of the end and the counts.
    A failure means: A field of the result contradicts the output or what was asked for.
    Look at: In a whole engine, what it passes to `Generation.emit` and `report`. The core fills in the rest.
    """
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
