"""Seeded requests on CPU: those whose prompt is prefilled in chunks, and those beside requests without a seed.

After each chunk vLLM samples a token and discards it; it then rewinds the request's generator by an offset that only
generators on GPUs have. Here the generator returns to its state before the step.
"""

from __future__ import annotations

from typing import Any

import torch

from polydraft_vllm.patches import upstream

__all__ = ["RewindableGenerator", "add_request", "sample", "sample_each"]


class RewindableGenerator(torch.Generator):
    """A generator on CPU with the interface by which vLLM rewinds one: any offset means the last marked state."""

    _marked: torch.Tensor

    @classmethod
    def of(cls, generator: torch.Generator) -> RewindableGenerator:
        """A generator in the state of ``generator``."""
        made = cls(device="cpu")
        made.set_state(generator.get_state())
        made.mark()
        return made

    def mark(self) -> None:
        """Keep the current state, to return to it."""
        self._marked = self.get_state()

    def get_offset(self) -> int:
        """0: ``set_offset`` ignores it."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Return to the marked state."""
        return self.set_state(self._marked)


def add_request(self: Any, request: Any) -> int:
    """``InputBatch.add_request`` with a generator that can be rewound."""
    # Not isinstance: a rewindable generator would be wrapped again, and lose its marked state.
    if type(request.generator) is torch.Generator:
        request.generator = RewindableGenerator.of(request.generator)
    index: int = upstream("vllm.v1.worker.gpu_input_batch.InputBatch.add_request")(self, request)
    return index


def sample(self: Any, *arguments: Any) -> Any:
    """``CPUModelRunner._sample``; before it, marks the generators that will be rewound after this chunk."""
    batch = self.input_batch
    for index, generator in batch.generators.items():
        # True where this chunk does not end the prompt, so that the sampled token is discarded.
        if self.discard_request_mask.np[index]:
            generator.mark()
    return upstream("vllm.v1.worker.cpu_model_runner.CPUModelRunner._sample")(self, *arguments)


def sample_each(self: Any, logits: torch.Tensor, generators: dict[int, torch.Generator], *filters: Any) -> Any:
    """``TopKTopPSampler.forward_cpu``, which before vLLM 0.30 ignores the generators unless each row has one."""
    if generators:
        generators = {row: generators.get(row, torch.default_generator) for row in range(len(logits))}
    return upstream("vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu")(
        self, logits, generators, *filters
    )
