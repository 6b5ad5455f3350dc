"""The caches against the plain definition: which positions' rows a token attends to."""

import random

import numpy as np
import pytest
from polydraft.errors import EngineError

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

from polydraft_mlx.kv_cache import BLOCK, FullCache, KvCache, SlidingCache, block_end  # noqa: E402

WINDOW, ROWS = 7, 4


def rows_of(positions, mark=0.0):
    """Keys whose first number is the position; ``mark`` tells stale rows apart."""
    return mx.array(np.array([[p + mark, 1.0] for p in positions], dtype=np.float32)[None, None])


def seen_by(cache, count, mark=0.0):
    """Store ``count`` tokens; for each, the positions (with marks) that its mask leaves."""
    first = cache.offset
    mask = cache.make_mask(count)
    keys, values = cache.update_and_fetch(rows_of(range(first, first + count), mark), rows_of(range(count)))
    assert keys.shape == values.shape
    held = np.array(keys)[0, 0, :, 0]
    if mask is None or isinstance(mask, str):
        mask = np.tril(np.ones((count, len(held)), dtype=bool), len(held) - count)
    return [sorted(held[row].tolist()) for row in np.array(mask)]


@pytest.mark.parametrize("seed", range(12))
def test_a_window_under_random_steps_and_rollbacks(seed):
    rng = random.Random(seed)
    cache = SlidingCache(WINDOW, ROWS, ROWS)
    whole = KvCache([cache])
    for _ in range(rng.randrange(3)):  # a prompt in chunks, some longer than the buffer
        count = rng.choice([1, 3, 5, 11, 12, 30])
        first = cache.offset
        for row, seen in enumerate(seen_by(cache, count)):
            assert seen == list(range(max(0, first + row - WINDOW + 1), first + row + 1))
    for _ in range(60):
        count, first = rng.randrange(1, ROWS + 1), cache.offset
        right = rng.randrange(1, count + 1)
        for row, seen in enumerate(seen_by(cache, count, mark=0.0)):
            assert seen == list(range(max(0, first + row - WINDOW + 1), first + row + 1))
        whole.rollback(first + right)
        keys, _, mask = cache.visible(max(cache.offset - WINDOW - 1, 0))
        drafters = np.array(keys)[0, 0, :, 0][np.array(mask)[0]]
        assert sorted(drafters.tolist()) == list(range(max(0, cache.offset - WINDOW - 1), cache.offset))


def test_the_memory_is_the_windows():
    cache = SlidingCache(WINDOW, ROWS, ROWS)
    seen_by(cache, 500)
    assert cache.keys.shape[2] == WINDOW + ROWS


def test_rejected_rows_are_never_seen():
    cache = SlidingCache(WINDOW, ROWS, ROWS)
    whole = KvCache([cache])
    seen_by(cache, 40)
    for _ in range(20):
        first = cache.offset
        seen_by(cache, 1)
        whole.rollback(first)
        seen_by(cache, ROWS, mark=0.5)  # its first row is right, the others are not
        keys = np.array(cache.keys)
        keys[..., first % cache.capacity, 0] = first
        cache.keys = mx.array(keys)
        whole.rollback(first + 1)
        for seen in seen_by(cache, 1):
            assert seen == [float(p) for p in range(first + 2 - WINDOW, first + 2)]


def test_too_long_a_rollback_is_an_error():
    whole = KvCache([FullCache(ROWS, whole=False), SlidingCache(WINDOW, ROWS, ROWS)])
    for layer in whole.layers:
        seen_by(layer, 40)
    with pytest.raises(EngineError, match="Cannot roll back 5 tokens"):
        whole.rollback(40 - ROWS - 1)
    whole.rollback(40 - ROWS)
    assert whole.length == 40 - ROWS


@pytest.mark.parametrize("fixed", [False, True])
def test_full_attention_sees_all_before(fixed):
    rng = random.Random(1)
    cache = FullCache(ROWS, whole=fixed)
    whole = KvCache([cache])
    for count in (1, 300, 2):
        first = cache.offset
        for row, seen in enumerate(seen_by(cache, count)):
            assert seen == list(range(first + row + 1))
    for _ in range(150):
        count, first = rng.randrange(1, ROWS + 1), cache.offset
        for row, seen in enumerate(seen_by(cache, count)):
            assert seen == list(range(first + row + 1))
        whole.rollback(first + rng.randrange(1, count + 1))
    assert cache.keys.shape[2] % BLOCK == 0


def test_fixed_steps_have_a_shape_that_depends_on_the_position_alone():
    assert block_end(0, ROWS) == BLOCK
    assert block_end(BLOCK - ROWS, ROWS) == BLOCK
    assert block_end(BLOCK - ROWS + 1, ROWS) == 2 * BLOCK
    cache = FullCache(ROWS, whole=True)
    keys, _ = cache.update_and_fetch(rows_of(range(ROWS)), rows_of(range(ROWS)))
    assert keys.shape[2] == BLOCK
