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
    """Plain steps; returns the tokens so far, the last not yet run."""
    tokens = [*PROMPT, *sequence.prefill(PROMPT, rule).token_ids]
    for _ in range(3):
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
    assert tuple(tokens[len(PROMPT) :]) == session.generate(PROMPT, max_new_tokens=5, ignore_eos=True).token_ids


def test_a_sampled_step_waits_for_the_host(session, ran):
    sequence, rule = session.engine.open_sequence(), sampler(session, temperature=1.0)
    before = len(ran)
    plain_until_ahead(session, sequence, rule)
    assert ran[before:][-2:] == [1, 1]
    assert sequence._ahead is None


@pytest.mark.parametrize("then", ["another token", "several", "rollback", "drafts", "another sampler"])
def test_a_step_that_is_not_asked_for_is_forgotten(session, then, greedy):
    sequence, rule = session.engine.open_sequence(), sampler(session)
    tokens = plain_until_ahead(session, sequence, rule)
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
    with monkeypatch.context() as patch:
        step, steps = session.engine.target.step, []

        def second_is_unsound(*args):
            steps.append(step(*args))
            return None, steps[-1][1] * (1.0 if len(steps) == 1 else float("nan"))

        patch.setattr(session.engine.target, "step", second_is_unsound)
        sequence.verify(tokens[-1:], rule)
    assert len(steps) == 2
    assert sequence.reusable(len(PROMPT)) == 0
    sequence.rollback(0)
    got = sequence.prefill(PROMPT, greedy, keep_logits=True).logits.numpy()
    assert np.array_equal(got, logits_of(session, PROMPT, greedy))
    assert sequence.reusable(len(PROMPT)) == len(PROMPT)


def test_a_step_ahead_leaves_room_for_a_whole_rollback(session, greedy):
    """Of as many tokens as a round has, past the window."""
    sequence, rule = session.engine.open_sequence(), sampler(session)
    tokens = plain_until_ahead(session, sequence, rule)
    for _ in range(session.engine.max_draft_tokens):
        tokens += sequence.verify(tokens[-1:], rule).token_ids
    assert sequence._ahead is not None
    kept = sequence.length - session.engine.max_draft_tokens - 1
    sequence.rollback(kept)
    got = sequence.verify(tokens[kept : kept + 1], greedy, keep_logits=True).logits.numpy()
    assert abs(got - logits_of(session, tokens[: kept + 1], greedy)).max() < 1e-3


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
