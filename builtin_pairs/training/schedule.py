"""The length of a training, and its learning-rate schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Budget:
    """Ends after `steps` or `seconds`, whichever comes first; the learning rate follows `progress`."""

    steps: int
    seconds: float
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    ended: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds from the start until now, or until the end."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return min(1.0, max(self.done / self.steps, self.elapsed / self.seconds))

    def __iter__(self) -> Iterator[int]:
        while self.progress < 1.0:
            yield self.done
            self.done += 1
        self.ended = time.monotonic()


def rate(step: int, progress: float, *, warmup: int = 100, final: float = 0.02) -> float:
    """Learning rate as a fraction of the peak: linear warm-up, then cosine down to `final`."""
    cosine = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / warmup) * cosine


def optimizer(model: nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim < 2]
    fused = matrices[0].is_cuda
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=fused,
    )


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    """One step of the optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
