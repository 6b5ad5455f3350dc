"""Milliseconds from a prompt to its first token at Gemma 4's real shapes, beside Transformers' own.

``ours_ms`` runs the prompt in a sequence and chooses the first token; ``generate_ms`` is one forward of the model as
``generate`` calls it for the prompt, with a cache, the last token's logits and torch's attention, and the choice.
The weights are random; all memory is warm.

    python plugins/transformers/benchmarks/prompts_at_real_shapes.py --save h200
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitwise_at_real_shapes import SHAPES, build, recorder_of
from polydraft.sampling._sampler import RuleSampler
from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.decoder import Decoder
from polydraft_transformers.experts import experts_implementation
from polydraft_transformers.sequence import TransformersSequence
from rounds_at_real_shapes import SETTINGS, request_of
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser


def milliseconds(function: Callable[[], Any], repeats: int) -> list[float]:
    """Of each run, without the first two."""
    found = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        function()  # ends with the token on the host
        found.append((time.perf_counter() - began) * 1e3)
    return found[2:]


def examine(name: str, arguments: argparse.Namespace, record: Recorder) -> None:
    """One model with prompts of all lengths."""
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    model = build(name, arguments.device, dtype, arguments.scale)
    own = experts_implementation(None, dtype, device, fixed=False)
    upstream = getattr(model.config, "_experts_implementation", None)
    has_experts = own is not None and "num_experts" in SHAPES[name]
    if has_experts:
        model.set_experts_implementation(own)
    target = Decoder(model, 5)
    vocabulary = int(model.config.vocab_size)
    sequence = TransformersSequence(target, None, threading.Lock())
    for length in arguments.lengths:
        tokens = random.Random(length).choices(range(vocabulary), k=length)
        given = argparse.Namespace(context=length, new_tokens=1)
        sampler = RuleSampler(TorchOps(), request_of(given, vocabulary, SETTINGS["greedy"], 0))
        ids = torch.tensor([tokens], device=device)

        def ours(tokens: list[int] = tokens, sampler: RuleSampler = sampler) -> None:
            sequence.rollback(0)
            sequence.prefill(tokens, sampler)

        def generate(ids: torch.Tensor = ids) -> None:
            found = model(
                input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1
            )
            int(found.logits[0, -1].argmax())

        runs: dict[str, list[float]] = {}
        for what, function, experts in (("ours_ms", ours, own), ("generate_ms", generate, upstream)):
            if has_experts:
                model.set_experts_implementation(experts)
            runs[what] = milliseconds(function, arguments.repeats)
        record.row({"model": name, "tokens": length}, {}, runs)
    sequence.close()


def main() -> None:
    """Examine the models one after the other."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 8192, 32768])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--device", default="cuda")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--scale", type=int, default=1, help="above 1: shrunken models, for a trial")
    arguments = options.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    record = recorder_of(__file__, __doc__, arguments)
    for name in arguments.models:
        with torch.inference_mode():
            examine(name, arguments, record)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
