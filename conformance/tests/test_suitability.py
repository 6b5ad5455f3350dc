"""What the checks need of models is measured where a backend's speculation has no part in it, and said."""

import pytest
from polydraft import PluginHost
from polydraft.contract import Backend
from polydraft.errors import UnsupportedError
from polydraft_conformance.bench import Bench
from polydraft_conformance.catalog import matching_checks
from polydraft_conformance.checks import test_availability as availability
from polydraft_conformance.defects import stepping
from polydraft_conformance.defects.making import PluginOf, defective
from polydraft_conformance.options import SuiteOptions
from polydraft_conformance.pairs import NoPairsError
from polydraft_conformance.prompts import prompts_that_fit
from polydraft_conformance.signals import ModelsDoNotSuit
from polydraft_conformance.suitability import PROPERTIES, lacking, least_context, said_of_models
from polydraft_conformance.suite import open_suite


@pytest.fixture
def benches(monkeypatch):
    """Benches on the toy models, which count as an author's own."""
    monkeypatch.setattr("polydraft_conformance.suitability.is_known", lambda pair: False)
    suites = []

    def make(kind, backend: type[Backend] | None = None, seed=5):
        host = PluginHost({"mine": PluginOf(backend or defective(), name="reference")})
        suites.append(open_suite(SuiteOptions("reference", quick=True, seed=seed), host))
        case = suites[-1].pairs[0].case(4, kind)
        return Bench(suites[-1], case, suites[-1].session(case), {})

    yield make
    for suite in suites:
        suite.close()


class Blunt(stepping.ReferenceSequence):
    """A model that never ends, always says the same, and is sure of it."""

    def choose(self, logits, token_ids, sampler, keep_logits):
        logits = logits.copy()
        logits[:, list(self.engine.tokenizer.eos_token_ids)] = -50.0
        logits[:, 7] = 50.0
        return super().choose(logits, token_ids, sampler, keep_logits)


def names(bench):
    return {needed.name: found for needed, found in lacking(bench)}


def test_models_that_suit_lack_nothing(benches):
    for kind in ("draft-model", "ngram", "mtp"):
        assert names(benches(kind)) == {}


def test_models_of_a_server_are_not_the_suites():
    host = PluginHost({"mine": PluginOf(defective(), name="served", own_names=True)})
    with pytest.raises(NoPairsError, match="`polydraft verify --backend served --model NAME`"):
        open_suite(SuiteOptions("served"), host)


def test_every_property_names_checks_that_exist():
    for needed in PROPERTIES:
        assert all(matching_checks(pattern) for pattern in needed.needed_by), needed.name
        assert needed.remedy.endswith(".")


def test_what_is_lacking_is_said_with_numbers_and_a_remedy(benches):
    bench = benches("draft-model", defective(Blunt))
    found = names(bench)
    assert {"ends", "uncertain"} <= set(found)
    assert "greedy answers has an end-of-sequence token within 96 tokens" in found["ends"]
    with pytest.raises(ModelsDoNotSuit, match="These checks do not apply: test_eos_ends_the_output") as caught:
        availability.test_models_suit_the_checks(bench)
    assert "divide its logits by a constant" in str(caught.value)


def test_n_grams_are_looked_up_in_what_the_prompts_bring(benches):
    # Of most runs' prompts some drafts are right.
    found = next(found for seed in range(40) if (found := names(benches("ngram", seed=seed))))
    assert set(found) == {"repeats rightly"}
    assert "tokens of its plain outputs, and none of them is right" in found["repeats rightly"]


def test_a_backend_that_misses_eos_lacks_nothing(benches):
    """The end is in its output: that it goes on is its own fault, and the checks run."""
    bench = benches("mtp")
    generate = bench.session.generate
    bench.session.generate = lambda prompt, **given: generate(prompt, **given, ignore_eos=True)
    assert "ends" not in names(bench)


def test_a_silent_drafter_lacks_nothing(benches):
    """Drafts are not what is measured: a defect of drafting hides behind no property."""
    assert names(benches("draft-model", defective(stepping.Silent))) == {}


def test_a_context_that_is_too_short_fails(benches, monkeypatch):
    bench = benches("mtp")
    monkeypatch.setattr(availability, "least_context", lambda window: 10**6)
    with pytest.raises(AssertionError, match=r"and the checks need 1000000: .* Raise max_position_embeddings"):
        availability.test_models_suit_the_checks(bench)
    assert least_context(64) == 294
    assert least_context(1024) == 2088


def test_prompts_fit_the_context_and_need_no_chat_format(benches):
    bench = benches("mtp")
    everything = prompts_that_fit(bench.session, 5, 96)
    assert any(isinstance(prompt, list) for prompt in everything)

    class Silent:
        eos_token_ids = frozenset()

        def encode(self, text):
            return [0] * len(text)

        def chat(self, messages):
            raise UnsupportedError("It has no chat format.", "Give text.")

    bench.session = type("Session", (), {"tokenizer": Silent(), "running": bench.session.running})()
    assert all(isinstance(prompt, str) for prompt in prompts_that_fit(bench.session, 5, 96))


def test_a_group_that_does_not_apply_is_said():
    def row(status, group="sampling", target="mine"):
        return {"status": status, "group": group, "target": target, "kind": "ngram"}

    (said,) = said_of_models(
        [row("not-applicable"), row("not-claimed"), row("pass", "greedy"), row("not-claimed", "x")]
    )
    assert said.startswith("No check of the group sampling applies to mine with ngram")
    assert said_of_models([row("not-applicable"), row("pass")]) == []
