"""What an unknown argument may have been meant for: a slip of the fingers, or another program's name for it."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["argument_meant", "did_you_mean_argument"]

_ELSEWHERE = {
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_length", "n_predict", "num_predict"),
        "max_new_tokens",
    ),
    **dict.fromkeys(("min_tokens", "min_length"), "min_new_tokens"),
    **dict.fromkeys(("temp", "t"), "temperature"),
    **dict.fromkeys(("repeat_penalty", "repetition"), "repetition_penalty"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "stop_words"), "stop"),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens"), "banned_token_ids"),
    **dict.fromkeys(("random_seed", "rng_seed"), "seed"),
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
    **dict.fromkeys(("model", "model_id", "model_path", "model_name", "repo_id"), "target"),
    **dict.fromkeys(
        ("assistant", "assistant_model", "draft", "draft_model", "speculative_model", "model_draft"), "drafter"
    ),
    **dict.fromkeys(
        ("k", "num_draft_tokens", "draft_max", "draft_num_predict", "draft_tokens", "num_assistant_tokens"),
        "num_speculative_tokens",
    ),
    **dict.fromkeys(("engine", "runtime", "framework"), "backend"),
    **dict.fromkeys(("max_model_len", "num_ctx", "n_ctx", "ctx_size", "max_context"), "context_length"),
    **dict.fromkeys(("torch_dtype", "precision"), "dtype"),
    **dict.fromkeys(("device_map", "gpu"), "device"),
    **dict.fromkeys(("quant", "quantize", "load_in_4bit", "load_in_8bit"), "quantization"),
    "offline": "local_files_only",
    **dict.fromkeys(("options", "model_kwargs", "engine_kwargs"), "engine_options"),
}
"""Names of other programs -> ours."""


def argument_meant(name: str) -> str:
    """The argument that has this name, here or in another program; empty: none."""
    return name if name in _ELSEWHERE.values() else _ELSEWHERE.get(name, "")


def did_you_mean_argument(wrong: str, known: Iterable[str]) -> str:
    """``Did you mean `max_new_tokens`?``, or an empty string; the command line shows its flag in that place.

    >>> did_you_mean_argument("max_tokens", ["max_new_tokens", "seed"])
    'Did you mean `max_new_tokens`?'
    >>> did_you_mean_argument("--temprature", ["temperature", "seed"])
    'Did you mean `temperature`?'
    """
    names = list(known)
    name = wrong.lstrip("-").replace("-", "_").lower()
    meant = _ELSEWHERE.get(name)
    close = [meant] if meant in names else difflib.get_close_matches(name, names, n=2, cutoff=0.7)
    return f"Did you mean {' or '.join(f'`{one}`' for one in close)}?" if close else ""
