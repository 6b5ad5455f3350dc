"""Steps that MLX runs before they are asked for: what is not asked for leaves nothing behind."""

import numpy as np
import polydraft
import pytest
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling._sampler import RuleSampler

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

PROMPT = [2, *(300 + (7 * i) % 600 for i in range(90))]  # past the window of 64


@pytest.fixture(scope="module", params=["tiny-e2b", "tiny-llama"])
def session(request):
    with polydraft.load(
        f"builtin:{request.param}", backend="mlx", dtype="float32", device="cpu", isolation="none", prefix_cache_bytes=0
    ) as loaded:
        yield loaded


@pytest.fixture
def ran(session, monkeypatch):
    """How many tokens each forward of the target ran."""
    target, found = session.engine.target, []
    forward = target._forward
    monkeypatch.setattr(target, "_forward", lambda cache, ids: found.append(ids.shape[1]) or forward(cache, ids))
    return found


def sampler(session, **settings):
    request = TokenRequest(
        prompt_token_ids=tuple(PROMPT),
        settings=GenerationSettings(**{"temperature": 0.0, **settings}),
        seed=4,
        speculate=True,
        num_speculative_tokens=4,
        eos_token_ids=frozenset(),
        max_total_tokens=1000,
    )
    return RuleSampler(session.engine.array_ops, request, "float32", session.engine.target.vocab_size)


def logits_of(session, tokens, greedy):
    """Of the last token, from a new sequence."""
    return session.engine.open_sequence().prefill(tokens, greedy, keep_logits=True).logits.numpy()


def plain_until_ahead(session, sequence, rule):
    """Two plain steps; returns the tokens so far, the last not yet run."""
    tokens = [*PROMPT, *sequence.prefill(PROMPT, rule).token_ids]
    for _ in range(2):
        tokens += sequence.verify(tokens[-1:], rule).token_ids
        assert sequence.length == len(tokens) - 1
    return tokens


def test_plain_decoding_runs_a_step_ahead(session, ran):
    sequence, rule = session.engine.open_sequence(), sampler(session)
    tokens = plain_until_ahead(session, sequence, rule)
    count = len(ran)
    tokens += sequence.verify(tokens[-1:], rule).token_ids
    assert len(ran) == count + 1  # the one after it
    sequence.close()
    assert tuple(tokens[len(PROMPT) :]) == session.generate(PROMPT, max_new_tokens=4, ignore_eos=True).token_ids


def test_a_sampled_step_waits_for_the_host(session, ran):
    sequence, rule = session.engine.open_sequence(), sampler(session, temperature=1.0)
    before = len(ran)
    plain_until_ahead(session, sequence, rule)
    assert ran[before:][-2:] == [1, 1]
    assert sequence._ahead is None


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
def test_drafts_are_launched_with_the_step_that_verifies_them(session, ran, settings):
    sequence, rule = session.engine.open_sequence(), sampler(session, **settings)
    newest = sequence.prefill(PROMPT, rule).token_ids[0]
    ran.clear()
    drafts = sequence.propose(newest, 3, rule).token_ids
    assert (ran, sequence.length) == ([4], len(PROMPT))
    chosen = sequence.verify([newest, *drafts], rule).token_ids
    assert (ran, sequence.length) == ([4], len(PROMPT) + 4)
    again = session.engine.open_sequence()
    again.prefill(PROMPT, rule)
    assert again.verify([newest, *drafts], rule).token_ids == chosen


@pytest.mark.parametrize("ahead", ["plain", "drafts"])
@pytest.mark.parametrize("then", ["another token", "several", "rollback", "drafts", "another sampler"])
def test_a_step_that_is_not_asked_for_is_forgotten(session, ahead, then, greedy):
    sequence, rule = session.engine.open_sequence(), sampler(session)
    tokens = plain_until_ahead(session, sequence, rule)
    if ahead == "drafts":
        sequence.propose(tokens[-1], 4, rule)
    assert sequence._ahead is not None
    assert sequence.length == len(tokens) - 1
    new = [9]
    if then == "several":
        new = [9, 8, 7]
    elif then == "rollback":
        sequence.rollback(len(PROMPT))
        del tokens[len(PROMPT) + 1 :]
    elif then == "drafts":
        new = [9, *sequence.propose(9, 2, rule).token_ids]
    elif then == "another sampler":
        new = tokens[-1:]
    got = sequence.verify(new, greedy, keep_logits=True).logits.numpy()
    wanted = logits_of(session, [*tokens[:-1], *new], greedy)
    assert abs(got[-1:] - wanted).max() < 1e-3
    assert sequence.length == len(tokens) - 1 + len(new)


def test_nan_that_nobody_asked_for_is_not_reused(session, greedy, monkeypatch):
    """Masked slots would pass it on."""
    sequence, rule = session.engine.open_sequence(), sampler(session)
    tokens = plain_until_ahead(session, sequence, rule)
    assert sequence.reusable(len(PROMPT)) == len(PROMPT)
    sequence.propose(tokens[-1], 4, rule)
    with monkeypatch.context() as patch:
        step = session.engine.target.step
        patch.setattr(session.engine.target, "step", lambda *args: (None, step(*args)[1] * float("nan")))
        sequence.propose(tokens[-1], 4, rule)
    assert sequence.reusable(len(PROMPT)) == 0
    sequence.rollback(0)
    got = sequence.prefill(PROMPT, greedy, keep_logits=True).logits.numpy()
    assert np.array_equal(got, logits_of(session, PROMPT, greedy))
    assert sequence.reusable(len(PROMPT)) == len(PROMPT)


@pytest.mark.parametrize("speculate", ["on", "off"])
def test_streams_that_end_early_leave_nothing(session, speculate):
    wanted = session.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids
    sizes = []
    for _ in range(12):
        with session.stream(PROMPT, max_new_tokens=12, ignore_eos=True, speculate=speculate) as stream:
            for _ in range(3):
                next(stream)
        assert session.generate(PROMPT, max_new_tokens=12, ignore_eos=True, speculate=speculate).token_ids == wanted
        sizes.append(mx.get_active_memory())
    assert sizes[-1] == sizes[2]


def test_rotations_from_tables_have_the_bits_of_mlx(session, greedy, monkeypatch):
    from polydraft_mlx.workarounds import _SharedRope

    tokens = PROMPT * 6  # past a table's positions
    found = logits_of(session, tokens, greedy)
    asked = []

    def own(self, x, offset=0):
        asked.append(x.shape[2])
        return self._rotations._rope(x, offset=offset)

    monkeypatch.setattr(_SharedRope, "__call__", own)
    assert np.array_equal(found, logits_of(session, tokens, greedy))
    assert asked
