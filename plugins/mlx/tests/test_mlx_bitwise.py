"""``exactness="bitwise"``: a token's logits have the same bits however the text was divided into steps."""

import random

import numpy as np
import polydraft
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

K = 4


def bits(engine, tokens, start, sizes, greedy):
    """The bits of all rows from ``start`` on, in steps of ``sizes``; wrong tokens after each are rolled back."""
    rng = random.Random(len(tokens))
    sequence, rows, position = engine.open_sequence(), [], start
    sequence.prefill(tokens[:start], greedy)
    while position < len(tokens):
        count = min(sizes(), len(tokens) - position)
        wrong = [rng.randrange(3, 2000) for _ in range(rng.randrange(K + 2 - count))]
        step = sequence.verify([*tokens[position : position + count], *wrong], greedy, keep_logits=True)
        sequence.rollback(position + count)
        rows.append(step.logits.numpy()[:count])
        position += count
    return np.concatenate(rows).view(np.uint32)


@pytest.mark.parametrize(("target", "dtype"), [("tiny-e2b", "bfloat16"), ("tiny-26b", "float32")])
def test_rows_have_the_same_bits_in_every_step(target, dtype, greedy):
    rng = random.Random(7)
    tokens = [2, *(rng.randrange(3, 2000) for _ in range(270))]  # past the window, and past a block of slots
    with polydraft.load(
        f"builtin:{target}", backend="mlx", dtype=dtype, device="cpu", exactness="bitwise", num_speculative_tokens=K
    ) as session:
        assert session.running.exactness == "bitwise"
        single = bits(session.engine, tokens, 235, lambda: 1, greedy)
        for sizes in (lambda: K + 1, lambda: rng.randrange(1, K + 2)):
            assert np.array_equal(bits(session.engine, tokens, 235, sizes, greedy), single)


def test_a_device_that_does_not_keep_its_bits_is_refused(monkeypatch):
    """The core's check finds steps of MLX whose rows depend on their place in the step."""
    import mlx.core as mx
    from polydraft.errors import UnsupportedError
    from polydraft_mlx.decoder import Decoder

    whole = Decoder._rows

    def uneven(self, output, count):
        hidden, logits = whole(self, output, count)
        return hidden, logits * (1 + 1e-2 * mx.arange(logits.shape[0])[:, None])

    monkeypatch.setattr(Decoder, "_rows", uneven)
    with pytest.raises(UnsupportedError, match="bitwise"):
        polydraft.load("builtin:tiny-31b", backend="mlx", device="cpu", exactness="bitwise", num_speculative_tokens=K)
