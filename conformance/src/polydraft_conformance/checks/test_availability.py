"""Can the backend run here, and does it describe itself consistently?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import expect
from polydraft_conformance.signals import CannotInstallError, ModelsDoNotSuit
from polydraft_conformance.suitability import lacking, least_context

if TYPE_CHECKING:
    from polydraft_conformance.bench import Bench
    from polydraft_conformance.suite import Suite


@check(scope="backend")
def test_backend_can_run_here(polydraft_suite: Suite) -> None:
    """The backend says that it is usable on this machine; if not, its reason and remedy are the result.

    Proves: The rest of the run says something about this machine. The suite reads `diagnose()` and loads nothing.
    A failure means: `diagnose()` says that the backend cannot run, and gives no reason or no remedy; or it cannot run
    here, and `--polydraft-must-run` was given.
    Look at: `Backend.diagnose`, and the specifiers in `BackendRecord.requires`, which the core checks first. `polydraft
    doctor` prints the same diagnosis.
    """
    diagnosis = polydraft_suite.diagnosis
    if diagnosis.usable:
        return
    expect(bool(diagnosis.reason), "diagnose() says that the backend is not usable, but gives no reason.")
    expect(bool(diagnosis.remedy), "diagnose() says that the backend is not usable, but gives no remedy.")
    said = f"{diagnosis.reason} {diagnosis.remedy}"
    expect(
        not polydraft_suite.options.must_run, f"The backend cannot run here, and --polydraft-must-run was given: {said}"
    )
    raise CannotInstallError(said)


@check(scope="kind")
def test_models_suit_the_checks(polydraft_bench: Bench) -> None:
    """The models have the properties that the checks need, and a context long enough for all prompts.

    Proves: No check passes or fails merely because of the models: the target ends some answers, its text repeats where
    n-grams draft, its drafter is sometimes right, and it is not too certain for samples to differ.
    A failure means: The context is too short for the suite's prompts. Where only a property is lacking, this is no
    failure: the result is "not applicable", here and for the checks named, and says what would give the property.
    Look at: The message. Models of your own are best small, trained on a few repetitive sentences with an end, with a
    drafter of the same training; section 8 of the plugin guide has a recipe.
    """
    bench = polydraft_bench
    have, need = bench.session.running.context_length, least_context(bench.window)
    expect(
        have >= need,
        f"The context of {bench.case.pair.name} has {have} tokens, and the checks need {need}: prompts of many lengths "
        "around the sliding window, and outputs. Raise max_position_embeddings in its config.json, or what the backend "
        "takes it from.",
    )
    lacks = lacking(bench)
    if lacks:
        said = (
            f"{found} {needed.remedy} These checks do not apply: {', '.join(needed.needed_by)}."
            for needed, found in lacks
        )
        raise ModelsDoNotSuit(f"{bench.case.pair.name} lacks what some checks need: " + "\n".join(said))
