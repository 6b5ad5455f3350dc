"""Loading and generating at all, and results that agree with themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect

if TYPE_CHECKING:
    from polydraft import Session

    from polydraft_conformance.evidence import Evidence
    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite


@check(scope="case")
def test_loads_what_was_asked(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """session.running names the backend, target, drafter, kind and k that were asked for, and is complete."""
    running, case = polydraft_session.running, polydraft_case
    found = (running.backend, running.target, running.method, running.num_speculative_tokens)
    asked = (polydraft_suite.options.backend, case.pair.target, case.kind, case.k)
    expect(found == asked, f"session.running says {found}, but {asked} was asked for (backend, target, method, k).")
    drafter = None if case.kind == "ngram" else case.drafter
    expect(running.drafter == drafter, f"session.running names the drafter {running.drafter!r}, not {drafter!r}.")
    expect(running.speculation_off is None, f"Speculation is off: {running.speculation_off}.")
    for name in ("engine", "engine_version", "dtype", "device"):
        expect(bool(getattr(running, name)), f"session.running.{name} is empty.")
    expect(
        running.context_length >= 2 * case.pair.window + 3 + 32,
        f"The context of {running.context_length} tokens is too short to go past the window of {case.pair.window}.",
    )


@check(scope="case", after=("test_loads_what_was_asked",))
def test_generates(polydraft_evidence: Evidence) -> None:
    """Plain and speculative generations end without an error, within the time limit, at their full length."""
    for generation in polydraft_evidence.generations:
        for name, result in (("plain", generation.plain), ("speculative", generation.speculative)):
            where = f"The {name} output for the prompt {generation.prompt.place} (of the window)"
            wanted = generation.prompt.max_new_tokens
            expect(
                len(result.token_ids) == wanted,
                f"{where} has {len(result.token_ids)} tokens, not {wanted}: it ended with {result.finish_reason!r}.",
            )


@check(scope="case", after=("test_generates",))
def test_results_are_consistent(polydraft_evidence: Evidence) -> None:
    """A result repeats its prompt, says its effective settings and why it ended, and counts its tokens."""
    for generation in polydraft_evidence.generations:
        for name, result in (("plain", generation.plain), ("speculative", generation.speculative)):
            where = f"{name} result, prompt {generation.prompt.place}"
            expect(
                result.prompt_token_ids == generation.prompt.token_ids, f"{where}: prompt_token_ids is another prompt."
            )
            expect(
                result.finish_reason == "length", f"{where}: finish_reason is {result.finish_reason!r}, not 'length'."
            )
            expect(result.settings.max_new_tokens == generation.prompt.max_new_tokens, f"{where}: settings are others.")
            expect(result.stats.num_tokens == len(result.token_ids), f"{where}: stats.num_tokens is wrong.")
            expect(bool(result.raw_text), f"{where}: raw_text is empty.")
        off = generation.plain.speculation_off
        expect(off is not None and off.code == "caller", f"A plain result says speculation_off={off}, not 'caller'.")
        expect(
            generation.speculative.speculation_off is None,
            f"A speculative result says that speculation was off: {generation.speculative.speculation_off}.",
        )
