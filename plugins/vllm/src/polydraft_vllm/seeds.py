"""Seeded requests whose prompt is processed in parts, on CPU.

Each part makes vLLM sample a token that it throws away; it then winds the request's generator back, by an offset that
only GPUs' generators have. Here the generator goes back to the state from before the step.
"""

from __future__ import annotations

from typing import Any

import torch

from polydraft_vllm.mends import upstream

__all__ = ["RewindableGenerator", "add_request", "sample"]


class RewindableGenerator(torch.Generator):
    """A generator on CPU with the interface that vLLM uses to wind one back: any offset is the last marked state."""

    _marked: torch.Tensor

    @classmethod
    def of(cls, generator: torch.Generator) -> RewindableGenerator:
        """One in the state of ``generator``."""
        made = cls(device="cpu")
        made.set_state(generator.get_state())
        made.mark()
        return made

    def mark(self) -> None:
        """Keep the state to go back to."""
        self._marked = self.get_state()

    def get_offset(self) -> int:
        """Any number: ``set_offset`` does not look at it."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Go back to the mark."""
        return self.set_state(self._marked)


def add_request(self: Any, request: Any) -> int:
    """``vllm.v1.worker.gpu_input_batch.InputBatch``'s, with a generator that can be wound back."""
    if type(request.generator) is torch.Generator:
        request.generator = RewindableGenerator.of(request.generator)
    index: int = upstream("InputBatch", "add_request")(self, request)
    return index


def sample(self: Any, *arguments: Any) -> Any:
    """``vllm.v1.worker.cpu_model_runner.CPUModelRunner._sample``; marks what a prompt in parts will go back to."""
    batch = self.input_batch
    for index, generator in batch.generators.items():
        if self.discard_request_mask.np[index]:
            generator.mark()
    return upstream("CPUModelRunner", "_sample")(self, *arguments)
