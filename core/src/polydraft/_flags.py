"""The command line's flags for arguments of ``load``, ``generate`` and other functions: the one map between the doors.

Sentences of errors and notes name an argument as Python takes it, between backticks: "Use `drafter=None`.". The command
line shows the same sentence with flags: "Use `--drafter none`.".
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from polydraft._pasteable import pasteable
from polydraft._program import with_program

__all__ = ["FLAGS", "in_flags", "words"]

_SHORT = {
    "target": ("--model", "-m"),
    "backend": ("--backend", "-b"),
    "drafter": ("--drafter", "-d"),
    "num_speculative_tokens": ("-k", "--num-speculative-tokens"),
    "engine_options": ("--engine-option",),
    "local_files_only": ("--offline",),
    "max_new_tokens": ("--max-new-tokens", "-n"),
    "temperature": ("--temperature", "-t"),
    "banned_token_ids": ("--ban-token",),
    "forced_token_ids": ("--force-token",),
    "time_limit": ("--time-limit", "-t"),
    "seconds": ("--seconds", "-s"),
    "save_to": ("--save",),
    "keep": ("--keep",),
}
_LONG = (
    *("quantization", "dtype", "device", "context_length", "prefix_cache_bytes", "exactness", "isolation", "revision"),
    *("trust_remote_code", "install"),
    *("min_new_tokens", "top_p", "top_k", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "acceptance", "seed", "stop", "ignore_eos", "guided"),
    *("prompts", "load_limit", "sweep_k", "against", "synthetic_acceptance", "repeats"),
)
FLAGS: dict[str, tuple[str, ...]] = _SHORT | {name: (f"--{name.replace('_', '-')}",) for name in _LONG}
"""Argument -> its flags, the one that sentences show first. Arguments that are not here have none."""


_OFF = {"keep": "--no-keep"}
"""Argument -> the flag that says False, where True is the default."""


def words(argument: str, value: Any) -> list[str]:
    """An argument as words of a command line.

    >>> words("drafter", None), words("engine_options", {"threads": 4}), words("local_files_only", True)
    (['--drafter', 'none'], ['--engine-option', 'threads=4'], ['--offline'])
    """
    flag = FLAGS[argument][0]
    if isinstance(value, bool):
        return [flag] if value else [_OFF[argument]] if argument in _OFF else []
    if isinstance(value, Mapping):
        value = [f"{name}={'...' if entry is ... else json.dumps(entry)}" for name, entry in value.items()]
    if not isinstance(value, list | tuple):
        value = ["none" if value is None else str(value)]
    return [word for entry in value for word in (flag, str(entry))]


def in_flags(sentence: str) -> str:
    """A sentence with its arguments written as flags, and commands that work here.

    Arguments without a flag stay as they are.

    >>> in_flags("Use `drafter=None` or `device='cuda:1'`, or log in with `hf auth login`.")
    'Use `--drafter none` or `--device cuda:1`, or log in with `hf auth login`.'
    """
    # Other code between backticks, and a backtick in a value that a user gave, are left alone.
    return _ARGUMENT.sub(lambda found: f"`{_in_flags(*found.groups())}`", with_program(pasteable(sentence)))


_ARGUMENT = re.compile(rf"`({'|'.join(FLAGS)})(?:=([^`]*))?`")


def _in_flags(argument: str, value: str | None) -> str:
    if value is None:
        return FLAGS[argument][0]
    try:
        return shlex.join(words(argument, ast.literal_eval(value))) or f"{argument}={value}"
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # a placeholder, or a cut value
        return f"{FLAGS[argument][0]} {value}"
