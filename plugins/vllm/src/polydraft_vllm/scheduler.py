"""vLLM's scheduler with four additions.

Requests without drafts; counts of each round; no drafts past the limit, or none counted; an end, with an error, of
requests whose logits are not finite.

vLLM loads it through ``scheduler_cls``, in process and in servers that ``polydraft serve`` starts.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from polydraft_vllm.settings import PLAIN_FLAG

__all__ = ["PolydraftAsyncScheduler", "PolydraftScheduler", "scheduler"]


def _is_plain(request: Any) -> bool:
    params = request.sampling_params
    return bool(params is not None and (params.extra_args or {}).get(PLAIN_FLAG))


def _room(request: Any) -> int:
    """Drafts that the output has room for: as in polydraft's own loop, the bonus token fits behind them."""
    return int(request.max_tokens - request.num_output_tokens - 1)


class _Additions(Scheduler):  # type: ignore[misc,unused-ignore] # vLLM is not in every environment of mypy
    """Counts of each round, and the end of requests whose logits are not finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drafted: dict[str, tuple[int, int]] = {}
        """Of the latest step, by request: (draft tokens, tokens that the verifier produced, before any stop)."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        # Before tokens past the end of the output are left out: a bad row there is none of the output's.
        broken = self._cut(model_runner_output)
        self._leave_out(scheduler_output, model_runner_output)
        drafts, invalid = scheduler_output.scheduled_spec_decode_tokens, scheduler_output.num_invalid_spec_tokens or {}
        sampled = model_runner_output.sampled_token_ids
        # Before the superclass cuts tokens after a stop and drops finished requests.
        self.drafted = {
            request_id: (
                len(drafts.get(request_id, ())) - invalid.get(request_id, 0),
                len(sampled[index]) if sampled else 0,
            )
            for request_id, index in model_runner_output.req_id_to_index.items()
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in (self.requests.get(request_id) for request_id in broken):
            if request is None or request.is_finished():
                continue  # its output ended before the bad row
            self.finish_requests([request.request_id], RequestStatus.FINISHED_ERROR)
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)
            )
        return outputs

    def _leave_out(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Remove drafts and tokens past the end of the output, if any were scheduled."""

    def _cut(self, output: Any) -> list[str]:
        """Remove tokens from the first bad row on (see ``soundness``); the ids of requests that had any."""
        broken = []
        for request_id, count in (output.num_nans_in_logits or {}).items():
            token_ids = output.sampled_token_ids[output.req_id_to_index[request_id]]
            # No tokens: the row is that of a prompt's chunk, and not used.
            if count and token_ids:
                # vLLM's own counts, which come from workers without polydraft's plugin, do not say which row it is.
                del token_ids[count - 1 if count <= len(token_ids) else 0 :]
                broken.append(request_id)
        return broken


class PolydraftScheduler(_Additions):
    """The synchronous scheduler."""

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """Accept the drafts of the next step, cut to those that can be used."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is None or not request.spec_token_ids:
                continue
            room = 0 if _is_plain(request) else _room(request)
            request.spec_token_ids = request.spec_token_ids[: max(room, 0)]


class PolydraftAsyncScheduler(_Additions, AsyncScheduler):  # type: ignore[misc,unused-ignore]
    """The asynchronous scheduler, which schedules a step while the one before it runs.

    Drafts are placeholders there, and how many the output has room for is not known yet: all are verified.
    """

    def _leave_out(self, scheduler_output: Any, model_runner_output: Any) -> None:
        # For vLLM's own counts, too.
        drafts, sampled = scheduler_output.scheduled_spec_decode_tokens, model_runner_output.sampled_token_ids
        invalid = dict(scheduler_output.num_invalid_spec_tokens or {})
        for request_id in [*drafts]:
            request = self.requests.get(request_id)
            token_ids = sampled[model_runner_output.req_id_to_index[request_id]] if sampled else []
            if request is None or not token_ids or (room := _room(request)) >= len(drafts[request_id]):
                continue
            del token_ids[room + 1 :]
            if room > 0:
                invalid[request_id] = max(invalid.get(request_id, 0), len(drafts[request_id]) - room)
            else:  # the token ends the request, so that nothing is left to take back for rejected drafts
                del drafts[request_id]
        scheduler_output.num_invalid_spec_tokens = invalid

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            # Without placeholders the next step schedules one token for the request: plain decoding.
            if request.spec_token_ids and (_is_plain(request) or self._is_below_minimum(request)):
                request.spec_token_ids = []

    def _is_below_minimum(self, request: Any) -> bool:
        """Whether drafts would end it before ``min_tokens``: vLLM's first model runner counts scheduled ones."""
        params = request.sampling_params
        first_runner = not getattr(self, "use_v2_model_runner", False)
        return bool(first_runner and params is not None and request.num_output_tokens < params.min_tokens)


def scheduler(*, vllm_config: Any, **further: Any) -> PolydraftScheduler | PolydraftAsyncScheduler:
    """What ``scheduler_cls`` names. vLLM decides later which one it takes: on CPU never the asynchronous one."""
    kind = PolydraftAsyncScheduler if vllm_config.scheduler_config.async_scheduling else PolydraftScheduler
    return kind(vllm_config=vllm_config, **further)
