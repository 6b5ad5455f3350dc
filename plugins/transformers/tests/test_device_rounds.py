"""Rounds as they run on a GPU, with steps that are not captured but run: the same tokens as step by step."""

import contextlib

import polydraft
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

from polydraft_transformers import device_rounds, kv_cache  # noqa: E402

PROMPT = [2, *(300 + (7 * i) % 600 for i in range(50))]
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "min_p": {"temperature": 0.8, "min_p": 0.1},
    "sorted": {"temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "top_p": {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
}


class Again:
    """In place of a captured step: runs it, and gives its results where the last ones were."""

    def __init__(self, function, inputs, neighbour=None):
        self._function = function
        self._outputs = None
        for _ in range(2):  # as the warm-up does
            function(*[given.clone() for given in inputs])

    def __call__(self, *inputs):
        outputs = self._function(*[given.clone() for given in inputs])
        if self._outputs is None:
            self._outputs = tuple(found.clone() for found in outputs)
        for kept, found in zip(self._outputs, outputs, strict=True):
            kept.copy_(found)
        return self._outputs


@pytest.fixture
def loaded(monkeypatch):
    """Loads a pair: ``rounds=True`` runs it as on a GPU."""
    monkeypatch.setattr(kv_cache, "Captured", Again)
    ran = []
    run = device_rounds.DeviceRounds.run

    def recorded(self, *arguments):
        ahead = self._ahead
        found = run(self, *arguments)
        ran.append((found, ahead is not None and found is not None and found.hidden is ahead.hidden))
        return found

    monkeypatch.setattr(device_rounds.DeviceRounds, "run", recorded)

    @contextlib.contextmanager
    def load(pair, *, rounds, **options):
        given = {"backend": "transformers", "device": "cpu", "dtype": "float32", "num_speculative_tokens": 4}
        with polydraft.load(f"builtin:{pair}", **{**given, **options}) as session:
            target = session.engine.target
            target.captures = target.runs_rounds = rounds
            ran.clear()
            session.rounds_ran = ran
            yield session

    return load


def outputs(session, settings, **given):
    found = session.generate(PROMPT, **{"max_new_tokens": 70, "ignore_eos": True, "seed": 3, **settings, **given})
    stats = found.stats
    return found.token_ids, stats.num_draft_tokens, stats.num_accepted_tokens


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("pair", ["tiny-e2b", "tiny-26b"])
def test_rounds_give_the_tokens_of_single_steps(loaded, pair, name):
    settings = SETTINGS[name]
    with loaded(pair, rounds=False) as session:
        wanted = [outputs(session, settings, speculate=way) for way in ("on", "off")]
    with loaded(pair, rounds=True) as session:
        for way, expected in zip(("on", "off"), wanted, strict=True):
            session.rounds_ran.clear()
            assert outputs(session, settings, speculate=way) == expected
            found, ahead = zip(*session.rounds_ran, strict=True)
            assert all(found)
            # All but the first ones ran before they were asked for, and the last ones, which are shorter.
            assert sum(ahead) >= len(ahead) - 6
