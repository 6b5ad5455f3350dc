"""Which tokens a draft model has to run before it drafts."""

from types import SimpleNamespace

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")

from polydraft_mlx.drafters.draft_model import DraftModel


def test_a_wrong_draft_is_found_before_an_equal_one():
    """After plain rounds, a draft behind a wrong one may equal the token at its place by chance."""
    drafter = DraftModel(SimpleNamespace(new_cache=lambda: None), chunk=8, vocab_size=100)
    drafter._run, drafter._shared = [1, 2, 3, 50, 5], 3  # 50 and 5 were drafted
    assert drafter._agreed([1, 2, 3, 4, 5, 6]) == 3  # the target chose 4, then 5 in a plain round
    assert drafter._agreed([1, 2, 3, 50, 5, 6]) == 5
    drafter.rollback(1)
    assert drafter._agreed([1, 9, 3, 50]) == 1
