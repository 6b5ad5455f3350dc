"""Fixtures of several tests of this backend."""

import json
import shutil

import pytest


class Greedy:
    """A sampler that does not use the core's rule."""

    needs_prefix = False

    def choose(self, logits, first_position, run_token_ids, *, keep_logprobs=True):
        return logits.argmax(axis=-1).tolist(), None

    def choose_draft(self, logits, position, run_token_ids=None):
        return logits.argmax(axis=-1)


@pytest.fixture
def greedy():
    return Greedy()


@pytest.fixture
def copy_of(tmp_path):
    """Copy a built-in checkpoint and change its config; returns the folder."""
    pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

    def copy(name, folder=None, **changes):
        to = tmp_path / (folder or name)
        shutil.copytree(pairs.path(name), to)
        config = json.loads((to / "config.json").read_text())
        config.update(changes)
        (to / "config.json").write_text(json.dumps(config))
        return to

    return copy
