"""Milliseconds a plain step and a round of engines beside one another, at Gemma 4's real shapes, from files on disk.

The pair has random weights, and a built-in pair's tokenizer. It is written once, where Transformers is installed; each
engine then loads it in its own environment, converts it if it must, and decodes the same random prompt through a
session. Nearly no draft is accepted; a round takes as long whatever is.

    python plugins/transformers/benchmarks/engines_at_real_shapes.py --model E4B --write FOLDER
    python plugins/transformers/benchmarks/engines_at_real_shapes.py --read FOLDER --backends llama_cpp --save h200
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import polydraft
import polydraft_builtin_pairs
from polydraft.errors import PolydraftError

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser

_ENDS = 4  # chunks at both ends that are not timed
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write(arguments: argparse.Namespace) -> None:
    """Write target and assistant."""
    import torch
    from bitwise_at_real_shapes import build
    from rounds_at_real_shapes import assistant

    dtype = getattr(torch, arguments.dtype)
    target = build(arguments.model, arguments.device, dtype, arguments.scale)
    source = polydraft_builtin_pairs.path("tiny-e2b")
    for name, model in (("target", target), ("assistant", assistant(arguments.model, target, dtype))):
        folder = arguments.write / name
        model.save_pretrained(folder)
        for file in _TOKENIZER:
            shutil.copy(Path(source) / file, folder)


def rounds(session: polydraft.Session, prompt: list[int], new_tokens: int, speculate: str) -> list[float]:
    """Milliseconds of each round, without those at both ends."""
    with session.stream(
        prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, speculate=speculate
    ) as stream:
        times = [time.perf_counter() for _ in stream]
    return [(later - earlier) * 1e3 for earlier, later in zip(times[_ENDS:-_ENDS], times[_ENDS + 1 :], strict=False)]


def main() -> None:
    """Write the pair, or measure engines on it."""
    options = parser(__doc__)
    options.add_argument("--write", type=Path, metavar="FOLDER")
    options.add_argument("--read", type=Path, metavar="FOLDER")
    options.add_argument("--model", default="E4B", help="whose shapes are written")
    options.add_argument("--backends", nargs="+", default=["transformers"])
    options.add_argument("-k", nargs="+", type=int, default=[0, 4], help="drafts a round; 0: plain decoding")
    options.add_argument("--context", type=int, default=1024)
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--accelerator", help="the GPU's name, for the record")
    options.add_argument("--engine-options", default="{}", metavar="JSON")
    options.add_argument("--device", default="cuda")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--scale", type=int, default=1, help="above 1: shrunken models, for a trial")
    arguments = options.parse_args()
    if arguments.write is not None:
        write(arguments)
        return
    record: Recorder | None = None
    folder = arguments.read
    del arguments.read, arguments.write
    vocabulary = json.loads((folder / "target/config.json").read_text())["vocab_size"]
    prompt = random.Random(5).choices(range(3, vocabulary), k=arguments.context)
    for backend in arguments.backends:
        # vLLM cannot leave the drafter out for a request, so plain decoding has a session of its own.
        for k in arguments.k:
            with polydraft.load(
                folder / "target",
                drafter=folder / "assistant" if k else None,
                backend=backend,
                num_speculative_tokens=k or None,
                device=arguments.device,
                dtype=arguments.dtype,
                context_length=arguments.context + 4 * arguments.new_tokens,
                prefix_cache_bytes=0,
                engine_options=json.loads(arguments.engine_options),
            ) as session:
                running = session.running
                record = record or Recorder(
                    __file__, __doc__, arguments, packages=("torch",), accelerator=arguments.accelerator, threads=None
                )
                found = [
                    statistics.median(rounds(session, prompt, arguments.new_tokens, "on" if k else "off"))
                    for _ in range(arguments.repeats + 1)
                ]
                case = {"backend": backend, "engine": f"{running.engine} {running.engine_version}", "k": k}
                record.row(case, {}, {"round_milliseconds": found[1:]})


if __name__ == "__main__":
    try:
        main()
    except PolydraftError as error:
        raise SystemExit(error) from error
