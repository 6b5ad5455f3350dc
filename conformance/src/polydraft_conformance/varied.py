"""Copies of shipped targets and drafters with weights that vary with the run's seed: a backend cannot know them.

Of a checkpoint in safetensors the norms are scaled, element by element, by at most 2%: other logits, other texts, but a
drafter that still fits. Of a checkpoint whose weights are made from the ``seed`` of its ``config.json`` (the reference
engine's) the seed is changed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from polydraft.checkpoints._names import KnownNames
from polydraft.checkpoints._resolve import resolve

from polydraft_conformance.changed_checkpoints import Tensors, change_config, change_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polydraft import PluginHost

    from polydraft_conformance.options import SuiteOptions
    from polydraft_conformance.pairs import Pair

__all__ = ["chosen", "varied_pairs", "vary"]

_SHIPPED = "builtin:"
_SPREAD = 0.02
_LARGEST = 2**26
"""Bytes of a checkpoint that is copied."""


def varied_pairs(host: PluginHost, pairs: Sequence[Pair], options: SuiteOptions, workspace: Path) -> tuple[Pair, ...]:
    """Copies of shipped pairs with other weights, which no backend can know.

    Args:
        host: Its local models are the shipped ones.
        pairs: Those of the run.
        options: A quick run has one copy, which the seed draws.
        workspace: An empty folder for the copies.
    """
    models = host.local_models()

    def folder_of(model: str) -> Path | None:
        record = models.get(model.removeprefix(_SHIPPED)) if model.startswith(_SHIPPED) else None
        return resolve(model, known=KnownNames(local_models=models)).path if record else None

    own = [pair for pair in pairs if folder_of(pair.target) is not None]
    varied = (
        vary(pair, folder_of, options.seed, workspace, quick=options.quick)
        for pair in chosen(own, options.seed, quick=options.quick)
    )
    return tuple(pair for pair in varied if pair is not None)


def chosen(pairs: Sequence[Pair], seed: int, *, quick: bool) -> tuple[Pair, ...]:
    """The pairs that are varied: one that the seed draws in a quick run, else all."""
    return (Random(f"polydraft varied pair {seed}").choice(pairs),) if quick and pairs else tuple(pairs)


def vary(
    pair: Pair, folder_of: Callable[[str], Path | None], seed: int, workspace: Path, *, quick: bool
) -> Pair | None:
    """A varied copy of a pair, called ``varied-...`` in the report.

    Args:
        pair: Its target, and its drafters that are checkpoints, are copied.
        folder_of: Gives a checkpoint's folder, or None.
        seed: The run's.
        workspace: An empty folder for the copies. Their names in it are drawn, too.
        quick: Copy the target and its own drafter only.

    Returns:
        None where there is no such folder, or it holds neither kind of checkpoint, or a large one.
    """
    random = Random(f"polydraft varied {seed} {pair.name}")
    # Target and draft model of the reference engine share layers if they share a seed.
    shared = random.randrange(2**31)
    copies: dict[str, str] = {}
    drafters = pair.drafters[:1] if quick else pair.drafters
    for model in (pair.target, *(drafter for kind, drafter in drafters if kind != "ngram")):
        source = folder_of(model)
        copy = workspace / "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(8))
        if source is None or not _copy(source, copy, shared, random):
            return None
        copies[model] = str(copy)
    found = tuple((kind, copies.get(drafter, drafter)) for kind, drafter in drafters)
    return replace(pair, target=copies[pair.target], drafters=found, original=pair)


def _copy(source: Path, copy: Path, seed: int, random: Random) -> bool:
    """Copy a checkpoint with other weights; False where there is no way to."""
    weights, config = source / "model.safetensors", source / "config.json"
    if weights.is_file() and weights.stat().st_size <= _LARGEST:
        shutil.copytree(source, copy)
        change_tensors(copy, lambda tensors: _scale_norms(tensors, random))
        return True
    if config.is_file() and isinstance(json.loads(config.read_text(encoding="utf-8")).get("seed"), int):
        shutil.copytree(source, copy)
        change_config(copy, seed=seed)
        return True
    return False


def _scale_norms(tensors: Tensors, random: Random) -> None:
    """Multiply each weight of a norm by a number near 1."""
    for name, (dtype, shape, values) in tensors.items():
        if not name.endswith("norm.weight") or dtype not in {"BF16", "F16", "F32"}:
            continue
        if dtype == "BF16":  # the upper half of a float32
            numbers = (np.frombuffer(values, "<u2").astype("<u4") << 16).view("<f4")
        else:
            numbers = np.frombuffer(values, "<f2" if dtype == "F16" else "<f4").astype("<f4")
        factors = np.array([random.uniform(1 - _SPREAD, 1 + _SPREAD) for _ in numbers], "<f4")
        scaled = (numbers * factors).astype("<f4")
        if dtype == "BF16":
            changed = (scaled.view("<u4") >> 16).astype("<u2")
        else:
            changed = scaled.astype("<f2" if dtype == "F16" else "<f4")
        tensors[name] = dtype, shape, changed.tobytes()
