"""Logits that are not finite, where vLLM chooses tokens: it would go on with an arbitrary token.

vLLM can count NaN (``VLLM_COMPUTE_NANS_IN_LOGITS``, which polydraft sets), and passes the counts to the scheduler with
the tokens of the step. On CPU these functions give it other counts, which include infinities, and with speculation look
at the rows of emitted tokens only: for each request 1 + the number of tokens before the first bad row, or 0.
"""

from __future__ import annotations

from typing import Any

import torch

from polydraft_vllm.patches import upstream

__all__ = ["count_nans_by_request", "count_nans_per_row", "sample", "unsound_tokens"]


def sample(self: Any, logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
    """``GPUModelRunner._sample``, which runs on CPU too; leaves the counts on the logits."""
    # Before sampling, which changes logits in place.
    largest = None if logits is None else logits.amax(dim=-1)
    output = upstream("vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample")(self, logits, spec_decode_metadata)
    if logits is not None and largest is not None:
        ends = None if spec_decode_metadata is None else spec_decode_metadata.cu_num_sampled_tokens
        logits.polydraft_unsound = unsound_tokens(largest, output.sampled_token_ids, ends)  # type: ignore[attr-defined]
    return output


def count_nans_per_row(logits: torch.Tensor) -> torch.Tensor:
    """The function of ``gpu_model_runner``: the counts of ``sample``."""
    counts: torch.Tensor = logits.polydraft_unsound  # type: ignore[attr-defined]
    return counts


def count_nans_by_request(self: Any, logits: torch.Tensor | None) -> dict[str, int]:
    """``GPUModelRunner._get_nans_in_logits``, which counts by itself before vLLM 0.28: the counts of ``sample``."""
    counts = [] if logits is None else count_nans_per_row(logits).tolist()
    return dict(zip(self.input_batch.req_ids, counts, strict=False))


def unsound_tokens(largest: torch.Tensor, token_ids: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
    """For each request 1 + the number of its tokens before the first one whose row is not finite; 0: all rows are.

    Args:
        largest: The largest logit of each row, NaN if the row holds NaN: shape [rows].
        token_ids: Sampled tokens, [requests, most tokens of a request]; -1 after the last one of a request.
        ends: Number of rows of this request and all before it, [requests]; None: one row each.

    Returns:
        Int32, shape [requests].
    """
    bad = ~torch.isfinite(largest)
    if ends is not None:
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        rows = starts[:, None] + torch.arange(token_ids.shape[1], device=ends.device)
        bad = bad[rows.clamp(max=len(bad) - 1)] & (token_ids != -1)
    else:
        bad = bad[: len(token_ids), None]
    first = bad.int().argmax(dim=1)  # of equal values the first
    return torch.where(bad.any(dim=1), first + 1, 0).to(torch.int32)
