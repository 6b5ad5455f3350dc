"""Engine arguments that the user passes through: checked against those of the installed vLLM."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from polydraft.errors import InvalidRequestError

__all__ = ["OBSOLETE", "RESERVED", "check_arguments"]

RESERVED: dict[str, str] = {
    "model": "the first argument of load",
    "tokenizer": "the target's own, which polydraft reads",
    "served_model_name": "a server's business: use `polydraft serve`",
    "skip_tokenizer_init": "nothing: polydraft hands vLLM token ids anyway",
    "dtype": "load's own dtype=",
    "max_model_len": "context_length=",
    "revision": "load's own revision=",
    "hf_token": "token=",
    "download_dir": "cache_dir=",
    "trust_remote_code": "load's own trust_remote_code=",
    "spec_method": "drafter=",
    "spec_model": "drafter=",
    "spec_tokens": "num_speculative_tokens=",
    "scheduler_cls": "nothing: polydraft's own scheduler decodes single requests plainly",
    "api_key": "the environment variable VLLM_API_KEY: a command line is no place for a secret",
    "stream_interval": "nothing: polydraft reads every step",
}
"""Engine arguments that polydraft sets itself -> where the user says it instead."""

OBSOLETE: dict[str, str] = {
    "speculative_model": "drafter=",
    "num_speculative_tokens": "load's own num_speculative_tokens=",
    "speculative_draft_tensor_parallel_size": "speculative_config={'draft_tensor_parallel_size': ...}",
    "speculative_max_model_len": "speculative_config={'max_model_len': ...}",
    "speculative_model_quantization": "speculative_config={'quantization': ...}",
    "ngram_prompt_lookup_max": "speculative_config={'prompt_lookup_max': ...}",
    "ngram_prompt_lookup_min": "speculative_config={'prompt_lookup_min': ...}",
    "speculative_disable_by_batch_size": "speculative_config={'num_speculative_tokens_per_batch_size': ...}",
    "speculative_disable_mqa_scorer": "nothing: it went with the engine that had it",
    "spec_decoding_acceptance_method": "speculative_config={'rejection_sample_method': ...}",
    "typical_acceptance_sampler_posterior_threshold": "nothing: output must not depend on speculation",
    "typical_acceptance_sampler_posterior_alpha": "nothing: output must not depend on speculation",
    "use_v2_block_manager": "nothing: there is one block manager",
    "num_lookahead_slots": "nothing: it follows from num_speculative_tokens",
    "worker_use_ray": "distributed_executor_backend='ray'",
    "engine_use_ray": "distributed_executor_backend='ray'",
    "device": "load's own device=",
    "max_seq_len_to_capture": "max_cudagraph_capture_size",
    "max_context_len_to_capture": "max_cudagraph_capture_size",
    "guided_decoding_backend": "structured_outputs_config",
    "swap_space": "kv_offloading_size",
    "task": "nothing: polydraft generates",
}
"""Names of older versions, seen in articles -> their successors."""


def check_arguments(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The arguments, if all of them exist and are the user's to set.

    Args:
        given: Name -> value.
        known: The fields of the installed version's ``EngineArgs``.

    Raises:
        InvalidRequestError: One is reserved, obsolete or unknown.
    """
    names = {name for name in known if not name.startswith("_")}
    for name in given:
        if name in RESERVED:
            raise InvalidRequestError(
                f"The engine option {name} is set by polydraft itself.", f"Use {RESERVED[name]} instead."
            )
        if name in OBSOLETE and name not in names:
            raise InvalidRequestError(
                f"The engine option {name} is obsolete: this vLLM has no such argument.", f"Use {OBSOLETE[name]}."
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]}?" if near else "They are the fields of vllm.EngineArgs."
            raise InvalidRequestError(f"vLLM has no engine argument {name!r}.", hint)
    return dict(given)
