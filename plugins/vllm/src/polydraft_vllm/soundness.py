"""Logits that are not finite, where vLLM chooses tokens: it would go on with an arbitrary token.

vLLM can count NaN (``VLLM_COMPUTE_NANS_IN_LOGITS``, which polydraft sets), and passes the counts to the scheduler with
the tokens of the step. With speculation it takes the count of row i for that of request i, although a request has a row
for each draft. These functions give it other counts, which include infinities, and look at the rows of emitted tokens
only: for each request 1 + the number of tokens before the first bad row, or 0.

vLLM has two model runners. The second one ("V2", in ``vllm.v1.worker.gpu``) is that of most models on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch

from polydraft_vllm.patches import upstream

__all__ = [
    "REJECTION_SAMPLER",
    "SAMPLER",
    "count_nans_by_request",
    "count_nans_per_row",
    "sample",
    "sample_rows",
    "unsound_tokens",
    "verify_rows",
]

SAMPLER = "vllm.v1.worker.gpu.sample.sampler.Sampler.__call__"
REJECTION_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler.__call__"


def sample(self: Any, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
    """``GPUModelRunner._sample`` of the first runner, CPU's too; leaves the counts on the logits."""
    # Before sampling, which changes logits in place.
    largest = None if logits is None else logits.amax(dim=-1)
    output = upstream("vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample")(self, logits, spec_decode_metadata)
    if logits is not None and largest is not None:
        ends = None if spec_decode_metadata is None else spec_decode_metadata.cu_num_sampled_tokens
        emitted = output.sampled_token_ids != -1
        logits.polydraft_unsound = unsound_tokens(largest, emitted, ends)  # type: ignore[attr-defined]
    return output


def count_nans_per_row(logits: torch.Tensor) -> torch.Tensor:
    """The function of ``gpu_model_runner``: the counts of ``sample``."""
    counts: torch.Tensor = logits.polydraft_unsound  # type: ignore[attr-defined]
    return counts


def count_nans_by_request(self: Any, logits: torch.Tensor | None) -> dict[str, int]:
    """``GPUModelRunner._get_nans_in_logits``, which counts by itself before vLLM 0.28: the counts of ``sample``."""
    counts = [] if logits is None else count_nans_per_row(logits).tolist()
    return dict(zip(self.input_batch.req_ids, counts, strict=False))


def sample_rows(self: Any, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """``Sampler.__call__`` of the second runner, for steps without drafts: one row of logits a request."""
    return _with_counts(SAMPLER, self, logits, input_batch, *args, **kwargs)


def verify_rows(self: Any, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """``RejectionSampler.__call__`` of the second runner: a request has a row for each draft, and one more."""
    return _with_counts(REJECTION_SAMPLER, self, logits, input_batch, *args, **kwargs)


def _with_counts(path: str, self: Any, logits: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    largest = logits.amax(dim=-1)  # before sampling, which changes logits in place
    output = upstream(path)(self, logits, input_batch, *args, **kwargs)
    if output.num_nans is not None:
        columns = torch.arange(output.sampled_token_ids.shape[1], device=logits.device)
        emitted = columns < output.num_sampled[:, None]
        output.num_nans = unsound_tokens(largest, emitted, input_batch.cu_num_logits[1:])
    return output


def unsound_tokens(largest: torch.Tensor, emitted: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """For each request 1 + the number of its tokens before the first one whose row is not finite; 0: all rows are.

    Args:
        largest: The largest logit of each row, NaN if the row holds NaN: shape [rows].
        emitted: Which places hold a token, those of a request first: bool, [requests, most tokens of a request].
        ends: Number of rows of this request and all before it, [requests]; None: one row each.

    Returns:
        Int32, shape [requests].
    """
    bad = ~torch.isfinite(largest)
    if ends is not None:
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        rows = starts[:, None] + torch.arange(emitted.shape[1], device=ends.device)
        bad = bad[rows.clamp(max=len(bad) - 1)] & emitted
    else:
        bad = bad[: len(emitted), None]
    first = bad.int().argmax(dim=1)  # of equal values the first
    return torch.where(bad.any(dim=1), first + 1, 0).to(torch.int32)
