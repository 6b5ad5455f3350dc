"""Rejection sampling: the target's distribution, and the acceptance that theory gives. Seeds are fixed.

Bounds on chi-square are mean + 5 standard deviations + 5: with other seeds, one of all these would be passed by chance
less than once in 100 runs.
"""

import itertools
import math

import numpy as np
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.errors import EngineError
from polydraft.sampling._rejection import RejectionSampler, make_sampler
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps

ROUNDS = 3000
VOCABULARY = 12


class Device(NumpyOps):
    """numpy, as if its arrays were on a device."""

    def host_view(self, array):
        return None


def request_of(speculate=True, **given):
    settings = GenerationSettings(acceptance="rejection", **given)
    return TokenRequest(
        prompt_token_ids=(1, 2),
        settings=settings,
        seed=settings.seed or 0,
        speculate=speculate,
        num_speculative_tokens=4,
        eos_token_ids=frozenset(),
        max_total_tokens=10**9,
    )


def softmax(row, temperature=1.0):
    weights = np.exp(row.astype(float) / temperature)
    return weights / weights.sum()


def best_of(row, top_k):
    """The row with all but its ``top_k`` largest entries at -infinity; 0: unchanged."""
    return np.where(row >= np.sort(row)[-top_k], row, -np.inf) if top_k else row


def chi_square_fits(counts, chances):
    total = counts.sum()
    assert counts[chances == 0].sum() == 0
    some = chances > 0
    statistic = ((counts - total * chances)[some] ** 2 / (total * chances[some])).sum()
    freedom = some.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5, statistic


@pytest.mark.parametrize(
    ("ops", "how"),
    [
        *((NumpyOps(), how) for how in ("drawn", "argmax", "own noise", "wrong on purpose")),
        *((Device(), how) for how in ("drawn", "wrong on purpose")),  # the others keep nothing on the device
    ],
    ids=lambda value: value if isinstance(value, str) else "device" if isinstance(value, Device) else "host",
)
@pytest.mark.parametrize("top_k", [0, 2])
def test_two_positions_have_the_targets_distribution(ops, how, top_k):
    """The first drafted token, and the bonus token where it is accepted; p and q are far apart.

    With a filter, a draw after the first one was ruled out is among other tokens: it needs separate noise.
    """
    generator = np.random.default_rng(5)
    target = generator.normal(size=(2, VOCABULARY)).astype(np.float32) * 2
    drafter = (target[:1] * 0.5 + generator.normal(size=(1, VOCABULARY))).astype(np.float32)
    p, bonus, q = (softmax(best_of(row, top_k), 0.8) for row in (*target, drafter[0]))
    sampler = RejectionSampler(ops, request_of(temperature=0.8, seed=3, top_k=top_k))
    first, second = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    for index in range(ROUNDS):
        position = 10 + 3 * index
        if how == "argmax":
            draft = int(drafter.argmax())
        elif how == "own noise":
            draft = int(generator.choice(VOCABULARY, p=q))
        else:
            draft = int(sampler.choose_draft(drafter, position)[0])
        if how == "wrong on purpose":
            others = drafter.copy()
            others[0, draft] = -np.inf
            draft = int(sampler.choose_draft(others, position)[0])
        chosen, _ = sampler.choose(target, position, [7, draft])
        first[chosen[0]] += 1
        if chosen[0] == draft:
            second[chosen[1]] += 1
    chi_square_fits(first, p)
    chi_square_fits(second, bonus)
    if how == "drawn":
        accepted, wanted = second.sum() / ROUNDS, np.minimum(p, q).sum()
        assert abs(accepted - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / ROUNDS)
        assert wanted < 0.9, "p and q are too near: this shows little"


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": 4},
        {"top_p": 0.7},
        {"banned_token_ids": (0, 3)},
        {"logit_bias": {2: 2.0, 5: -4.0}},
        {"logits_processor": lambda prefix, logits: np.where(np.arange(VOCABULARY) % 2 == 0, logits, -np.inf)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_settings_change_both_distributions(given):
    target, drafter = (np.random.default_rng(seed).normal(size=(1, VOCABULARY)).astype(np.float32) for seed in (1, 2))
    plain = RuleSampler(NumpyOps(), request_of(temperature=1.0, **given))
    allowed = {plain.choose(target, 2, [2])[0][0]}
    row = target[0].copy()
    for token_id, bias in given.get("logit_bias", {}).items():
        row[token_id] += bias
    if "logits_processor" in given:
        row = given["logits_processor"]((), row)
    row[list(given.get("banned_token_ids", ()))] = -np.inf
    chances = softmax(row)
    order = np.argsort(-chances)
    if "top_k" in given:
        chances[order[4:]] = 0
    if "top_p" in given:
        chances[order[np.cumsum(chances[order]) - chances[order] >= 0.7]] = 0
    chances /= chances.sum()
    counts = np.zeros(VOCABULARY)
    for seed in range(ROUNDS):
        sampler = RejectionSampler(NumpyOps(), request_of(temperature=1.0, seed=seed, **given))
        draft = int(sampler.choose_draft(drafter, 2, [2])[0])
        counts[sampler.choose(np.repeat(target, 2, axis=0), 2, [2, draft])[0][0]] += 1
    assert allowed <= set(np.flatnonzero(chances))
    chi_square_fits(counts, chances)


def test_an_equal_drafter_is_always_accepted():
    logits = np.random.default_rng(1).normal(size=(2, 300)).astype(np.float32) * 3
    sampler = RejectionSampler(NumpyOps(), request_of(temperature=1.0))
    for position in range(10, 500):
        draft = int(sampler.choose_draft(logits[:1], position)[0])
        assert sampler.choose(logits, position, [7, draft])[0][0] == draft


def test_a_draft_that_cannot_be_is_never_accepted():
    target = np.array([[0.0, -np.inf, 1.0]] * 2, np.float32)
    drafter = np.array([[-np.inf, 0.0, -np.inf]], np.float32)
    sampler = RejectionSampler(NumpyOps(), request_of(temperature=1.0))
    for position in range(10, 60):
        draft = int(sampler.choose_draft(drafter, position)[0])
        assert draft == 1
        assert sampler.choose(target, position, [7, draft])[0][0] in (0, 2)


def test_a_draft_that_was_exchanged_is_an_error():
    logits = np.zeros((2, VOCABULARY), np.float32)
    sampler = RejectionSampler(NumpyOps(), request_of(temperature=1.0))
    draft = int(sampler.choose_draft(logits[:1], 5)[0])
    with pytest.raises(EngineError, match="after it was drawn"):
        sampler.choose(logits, 5, [7, (draft + 1) % VOCABULARY])


def test_only_sampled_speculation_is_concerned():
    ops = NumpyOps()
    assert type(make_sampler(ops, request_of(temperature=1.0))) is RejectionSampler
    assert type(make_sampler(ops, request_of(temperature=0.0))) is RuleSampler
    assert type(make_sampler(ops, request_of(temperature=1.0, speculate=False))) is RuleSampler


def exact_chances(toys, prompt, given, length):
    """Probability of each sequence of ``length`` tokens, from the engine's logits."""
    settings = GenerationSettings(**given)
    request = toys.request(prompt, **given)
    chances = {(): 1.0}
    for _ in range(length):
        longer = {}
        for output, chance in chances.items():
            sequence = toys.engine.open_sequence()
            logits = sequence.prefill([*prompt, *output], RuleSampler(NumpyOps(), request), keep_logits=True).logits
            row = logits.numpy()[-1].astype(float) / settings.temperature
            best = np.argsort(-row)[: settings.top_k]
            weights = np.exp(row[best] - row[best].max())
            for token_id, weight in zip(best, weights / weights.sum(), strict=True):
                longer[(*output, int(token_id))] = chance * weight
        chances = longer
    return chances


@pytest.mark.parametrize(
    ("kind", "agreement", "k"), [("draft-model", None, 3), ("mtp", 0.5, 2), ("ngram", None, 2)], ids=str
)
def test_joint_distribution_of_a_sessions_tokens(toys, kind, agreement, k):
    """Four tokens at top_k 2: 16 sequences, by seeds; and a seed gives the same again, streamed or not."""
    given = {"temperature": 1.3, "top_k": 2, "ignore_eos": True}
    session = toys.session(kind, k, agreement)
    usual = session.generate([258, 100], seed=100, max_new_tokens=24, **given).token_ids
    prompt = [258, 100, *usual, *usual[:4], 100, *usual]  # which n-grams are found in
    chances = exact_chances(toys, prompt, given, 4)
    given |= {"acceptance": "rejection", "max_new_tokens": 6}
    counts = dict.fromkeys(chances, 0)
    accepted = drafted = 0
    for seed in range(300):
        result = session.generate(prompt, seed=seed, **given)
        counts[result.token_ids[:4]] += 1
        accepted += result.stats.num_accepted_tokens
        drafted += result.stats.num_draft_tokens
    chi_square_fits(np.array([*counts.values()]), np.array([chances[key] for key in counts]))
    assert 0 < accepted < drafted
    for seed in range(5):
        stream = session.stream(prompt, seed=seed, **given)
        streamed = tuple(token for chunk in stream for token in chunk.token_ids)
        assert streamed == session.generate(prompt, seed=seed, **given).token_ids


def test_it_is_not_seed_identical_and_says_so(toys):
    given = {"temperature": 1.0, "max_new_tokens": 24, "ignore_eos": True}
    session = toys.session("mtp", 4, 0.5)
    results = [session.generate([97], seed=seed, acceptance="rejection", **given) for seed in range(5)]
    plain = [session.generate([97], seed=seed, speculate="off", **given) for seed in range(5)]
    assert any(one.token_ids != other.token_ids for one, other in zip(results, plain, strict=True))
    assert all(result.settings.acceptance == "rejection" for result in results)


def test_greedy_stays_greedy(toys):
    given = {"max_new_tokens": 24, "ignore_eos": True}
    for (kind, agreement), k in itertools.product([("mtp", 0.5), ("ngram", None)], (1, 4)):
        session = toys.session(kind, k, agreement)
        plain = session.generate([97], speculate="off", **given).token_ids
        assert session.generate([97], acceptance="rejection", **given).token_ids == plain
