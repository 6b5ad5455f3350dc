"""What is measured when, on engines of known speeds, by a clock of the test's own."""

import random

import pytest
from polydraft._measuring.bench import Group, LoadedInfo, MeasuredWeights, NotMeasurable, Sample, Way
from polydraft._measuring.prompts import built_in_prompts
from polydraft._tune._search import Limits, Search, slowdown, undisturbed
from polydraft.contract import GenerationStats

MTP = Way(method="mtp", drafter="d", argument="auto", recommended=4, most=16, any_k=True)
NGRAM = Way(method="ngram", argument="ngram", recommended=4, most=16, any_k=True)
WEIGHTS = MeasuredWeights(id="t", fingerprint="f", state="s")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Engines:
    """``speed`` gives seconds for a token of (backend, method, k); the clock goes on by that, times a noise."""

    def __init__(
        self, speed, ways, *, any_k=True, noise=lambda: 1.0, together=True, fails=None, verdicts=None, computes=False
    ):
        self.speed, self._ways, self.any_k, self.noise = speed, ways, any_k, noise
        self.clock = Clock()
        self.loads, self.calls, self.asked, self.fits = [], [], [], together
        self.fails = fails or {}
        self.verdicts = verdicts or {}
        self.computes = computes

    def ways(self, backend):
        if isinstance(found := self._ways[backend], Exception):
            raise found
        return found

    def load(self, group):
        self.clock.now += 100  # a start is not counted
        self.loads.append(group)
        for key in (("load", group.backend, group.way.method), ("load", group.backend, group.way.method, group.k)):
            if error := self.fails.get(key):
                raise error
        return LoadedInfo(
            any_k=self.any_k, load_seconds=1, dtype="float32", device="cpu", versions={}, hardware="h",
            target_weights=WEIGHTS,
        )  # fmt: skip

    def info(self, group):
        return self.load(group)

    def measure(self, group, k, prompt, settings, limit):
        max_new_tokens = settings.max_new_tokens
        key = (group.backend, group.way.method if k else None, k)
        assert self.any_k or k == group.k
        self.calls.append((*key, prompt.kind))
        if error := self.fails.get(key):
            raise error
        computed = self.speed(*key) * max_new_tokens
        seconds = computed * self.noise()
        tokens = max_new_tokens
        if seconds > limit:
            seconds, tokens = limit, int(max_new_tokens * limit / seconds)
        self.clock.now += seconds
        return Sample(
            seconds=seconds,
            cpu_seconds=computed if self.computes else None,
            first_token_seconds=0.0,
            num_tokens=tokens,
            digest="x",
            cut=tokens < max_new_tokens,
            stats=GenerationStats(num_tokens=tokens),
        )

    def verdict(self, group, k, seconds):
        self.asked.append((group.backend, k, seconds > 0))
        self.clock.now += seconds
        return self.verdicts.get((group.backend, k))

    def together(self, groups):
        return self.fits

    def unload(self, group):
        pass

    def close(self):
        pass


def searched(engines, seconds=60.0, **limits):
    search = Search(engines, built_in_prompts(), Limits(seconds, **limits), clock=engines.clock)
    search.run(list(engines._ways))
    return search


def sample(seconds, cpu=None):
    stats = GenerationStats(num_tokens=10)
    return Sample(
        seconds=seconds, cpu_seconds=cpu, first_token_seconds=0, num_tokens=10, digest="", cut=False, stats=stats
    )


def parabola(best, at_best, plain):
    """Seconds for a token, by k: least at ``best``."""
    return lambda _backend, _method, k: plain if k == 0 else at_best * (1 + 0.02 * (k - best) ** 2)


def label(candidate):
    return candidate.group.backend, candidate.k


@pytest.mark.parametrize("best", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12])
def test_it_finds_the_best_k_wherever_it_is(best):
    engines = Engines(parabola(best, 0.005, 0.012), {"a": (Way(), MTP)})
    found = searched(engines).leaders[0]
    assert engines.speed("a", "mtp", found.k) <= 1.05 * engines.speed("a", "mtp", best)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_within_5_percent_on_a_noisy_machine(seed):
    chance = random.Random(seed)
    bursts = lambda: chance.choice([1, 1, 1, 1, 1, 1.05, 1.1, 1.2, 1.3, 2.0])  # noqa: E731
    speeds = {"a": parabola(3, 0.0050, 0.011), "b": parabola(6, 0.0056, 0.0071), "c": parabola(2, 0.02, 0.009)}
    engines = Engines(
        lambda backend, method, k: speeds[backend](backend, method, k),
        {name: (Way(), MTP) for name in speeds},
        noise=bursts,
    )
    search = searched(engines, 200)
    found = search.leaders[0]
    assert engines.speed(found.group.backend, "mtp", found.k) <= 1.05 * 0.0050
    assert search.confidence() is None or search.confidence() > 0.3


def test_plain_decoding_wins_where_it_is_faster():
    engines = Engines(parabola(4, 0.02, 0.01), {"a": (Way(), MTP, NGRAM)})
    search = searched(engines)
    assert label(search.leaders[0]) == ("a", 0)
    assert engines.asked == [], "plain decoding needs no verdict"
    assert all(one.state == "dropped" and "times as long" in one.reason for one in search.candidates if one.k)


@pytest.mark.parametrize("seconds", [5, 20, 60, 300])
@pytest.mark.parametrize("speed", [0.0005, 0.01, 0.2])
def test_it_ends_in_time_and_starts_are_not_counted(seconds, speed):
    engines = Engines(parabola(4, speed, 2 * speed), {"a": (Way(), MTP, NGRAM), "b": (Way(), MTP)})
    search = searched(engines, seconds)
    assert search.spent == pytest.approx(engines.clock.now - 100 * len(engines.loads))
    a_call = 32 * 3 * speed
    assert search.spent <= seconds + 4 * a_call + seconds * 0.2
    assert search.leaders


def test_candidates_take_turns_and_the_time_goes_to_the_leaders():
    engines = Engines(parabola(4, 0.005, 0.02), {"a": (Way(), MTP), "b": (Way(), MTP)})
    engines.speed = lambda backend, _method, k: (0.005 if backend == "a" else 0.04) * (1 + 0.02 * (k - 4) ** 2)
    search = searched(engines)
    calls = {name: sum(call[0] == name for call in engines.calls) for name in "ab"}
    assert calls["a"] > 2 * calls["b"]
    last = engines.calls[-40:]
    assert len({call[2] for call in last}) > 1, "they alternate to the end"
    assert {kind for *_, kind in last} == {"code", "prose", "chat", "list"}
    first = [one.rounds for one in search.leaders]
    assert all(rounds for rounds in first)


def test_a_whole_engine_is_loaded_for_each_k_and_not_for_many():
    way = MTP.model_copy(update={"any_k": False})
    engines = Engines(parabola(6, 0.005, 0.01), {"a": (Way(), way)}, any_k=False)
    found = searched(engines, 120)
    loaded = {group.k for group in engines.loads}
    assert {0, 4} <= loaded
    assert len(loaded) <= 6
    assert engines.speed("a", "mtp", found.leaders[0].k) <= 1.05 * 0.005


def test_a_k_that_the_file_fixes_is_the_only_one():
    way = MTP.model_copy(update={"any_k": False, "one_k": True})
    engines = Engines(parabola(6, 0.005, 0.01), {"a": (Way(), way)}, any_k=False)
    searched(engines, 120)
    assert [group.k for group in engines.loads if group.k not in (0, 4)] == []


def test_a_k_that_is_refused_is_not_asked_for_again():
    way = MTP.model_copy(update={"any_k": False})
    fails = {("load", "a", "mtp", k): NotMeasurable("refused", "Never.") for k in range(17) if k != 4}
    engines = Engines(parabola(6, 0.005, 0.01), {"a": (Way(), way)}, any_k=False, fails=fails)
    refused = [one.k for one in searched(engines, 120).skipped]
    assert refused
    assert len({*refused}) == len(refused)


def test_what_cannot_be_measured_is_a_reason_not_an_end():
    engines = Engines(
        parabola(4, 0.005, 0.01),
        {
            "none": NotMeasurable("refused", "It cannot load this."),
            "dies": (Way(), MTP),
            "late": (Way(), MTP.model_copy(update={"any_k": False})),
            "good": (Way(), MTP),
        },
        fails={
            ("dies", "mtp", 2): NotMeasurable("failed", "Its process ended by SIGABRT."),
            ("load", "late", "mtp"): NotMeasurable("slow", "It was not loaded within 600 s."),
        },
    )
    search = searched(engines)
    skipped = {(one.backend, one.way.method): (one.state, one.reason) for one in search.skipped}
    assert skipped["none", None] == ("refused", "It cannot load this.")
    assert skipped["late", "mtp"] == ("slow", "It was not loaded within 600 s.")
    states = {label(one): one.state for one in search.candidates}
    assert states["dies", 2] == "failed"
    assert states["late", 0] in {"measured", "dropped"}, "its plain decoding was measured"
    assert label(search.leaders[0])[0] in {"good", "dies"}


def test_speculation_that_changes_the_output_is_not_chosen():
    bad = {("a", k): "DIVERGED" for k in range(1, 17)} | {("b", k): "EXACT" for k in range(1, 17)}
    engines = Engines(parabola(4, 0.005, 0.011), {"a": (Way(), MTP), "b": (Way(), MTP)}, verdicts=bad)
    engines.speed = lambda backend, method, k: parabola(4, 0.005 if backend == "a" else 0.0052, 0.011)(0, 0, k)
    search = searched(engines)
    assert search.leaders[0].group.backend == "b"
    assert search.leaders[0].verdict == "EXACT"
    assert {one.reason for one in search.candidates if one.state == "refused"} == {"Speculation changed the output."}


def test_where_not_all_fit_into_memory_each_is_visited_a_few_times():
    engines = Engines(parabola(4, 0.005, 0.011), {"a": (Way(), MTP), "b": (Way(), MTP)}, together=False)
    searched(engines, 200)
    changes = sum(one[0] != other[0] for one, other in zip(engines.calls, engines.calls[1:], strict=False))
    assert changes <= 12


def test_one_k_and_one_length_are_all_that_is_measured_if_they_are_given():
    engines = Engines(parabola(4, 0.005, 0.011), {"a": (Way(), MTP)})
    search = searched(engines, k=3, max_new_tokens=32)
    assert {one.k for one in search.candidates} == {0, 3}
    assert search.max_new_tokens == 32
    assert engines.loads[0] == Group("a", MTP, 3)


def test_an_interruption_leaves_what_was_measured():
    engines = Engines(parabola(4, 0.005, 0.011), {"a": (Way(), MTP)})
    measure = engines.measure

    def interrupted(*args):
        if len(engines.calls) > 12:
            raise KeyboardInterrupt
        return measure(*args)

    engines.measure = interrupted
    search = Search(engines, built_in_prompts(), Limits(60), clock=engines.clock)
    with pytest.raises(KeyboardInterrupt):
        search.run(["a"])
    assert search.leaders


def test_candidates_are_compared_on_the_calls_that_both_made():
    engines = Engines(parabola(4, 0.005, 0.011), {"a": (Way(), MTP)})
    one, other = searched(engines).leaders[:2]
    one.samples.clear()
    other.samples.clear()

    one.samples |= {(0, 1): sample(1), (0, 2): sample(1), (1, 2): sample(50)}
    other.samples |= {(0, 1): sample(2), (0, 2): sample(4), (0, 3): sample(100)}
    assert slowdown(one, other) == pytest.approx(1 / 2), "the fastest calls: others were disturbed"
    assert slowdown(one, other, [2, 2]) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        # (seconds, processor time) of one thread; the last one waited for other programs.
        ([(1.0, 1.0), (1.1, 1.0), (3.0, 1.0)], [1.0, 1.0, 1.0]),
        ([(7.0, 1.0), (9.0, 1.1)], [1.0, 1.1]),
        # Two threads.
        ([(1.0, 1.9), (1.0, 1.9), (1.0, 1.9), (2.5, 1.9)], [1.0, 1.0, 1.0, 1.0]),
        # It computes elsewhere: on a device, or in processes of its own.
        ([(1.0, None), (3.0, None)], [1.0, 3.0]),
        ([], []),
    ],
)
def test_time_that_other_programs_took_is_not_charged(calls, expected):
    samples = [sample(*call) for call in calls]
    took = undisturbed(samples)
    assert [took(one) for one in samples] == pytest.approx(expected)


def test_candidates_are_told_apart_while_other_programs_use_the_processor():
    speeds = {"a": 0.0050, "b": 0.0056}
    for seed in range(5):
        chance = random.Random(seed)
        engines = Engines(
            lambda backend, _method, _k: speeds[backend],
            {name: (Way(),) for name in speeds},
            noise=lambda chance=chance: chance.uniform(1, 6),
            computes=True,
        )
        assert searched(engines).leaders[0].group.backend == "a"
