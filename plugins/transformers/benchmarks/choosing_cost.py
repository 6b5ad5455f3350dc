"""What choosing tokens costs at a vocabulary of 262,144, as a share of a decode step of Gemma 4 E2B's shape.

Choosing the k+1 = 5 tokens of a round, and drafting one token, by the sampler that engines use: greedy, temperature 1,
and temperature 1 with top_k 64 and top_p 0.95 (Gemma 4's recommended settings); bf16 logits. Three kinds of logits:
``peaked`` (one token has most of the probability), ``usual`` (entropy of some nats), ``flat`` (nearly all tokens are
candidates: the worst case, which no trained model gives).

The decode step is a stand-in: one token through bf16 matrices of all of E2B's shapes (layers, per-layer inputs and
output head, 2.2e9 weights, each read once), without attention over the context, norms or a cache. A real step takes
longer, so shares of it are upper bounds.

    python plugins/transformers/benchmarks/choosing_cost.py --device cpu --save cpu

``milliseconds`` is the median of ``--repeats`` runs, until the tokens are on the host for
``choose``, and until the device is done for ``draft``. On CUDA, ``host_milliseconds`` is until the call returned, and
``waits`` says whether a draft waited for the device (torch's own detection of synchronizing operations).
``same_as_numpy``: whether the same tokens were chosen as by numpy on the host, at 20 positions.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.numpy_ops import NumpyOps
from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.fused_noise import fused_gumbel

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser

VOCABULARY = 262_144
ROWS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "T=1": {"temperature": 1.0, "seed": 1},
    "T=1, top_k=64, top_p=0.95": {"temperature": 1.0, "seed": 1, "top_k": 64, "top_p": 0.95},
    "T=1, top_p=0.95": {"temperature": 1.0, "seed": 1, "top_p": 0.95},
    "T=1, repetition_penalty=1.1": {"temperature": 1.0, "seed": 1, "repetition_penalty": 1.1},
}
PROMPT_LENGTH = 2000
"""Tokens before, nearly all different: what the repetition penalty has to look at."""


def logits_of(shape: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of logits; (ROWS, VOCABULARY)."""
    generator = np.random.default_rng(7)
    if shape == "flat":
        return generator.normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    rows = (generator.normal(size=(ROWS, VOCABULARY)) * 2.5).astype(np.float32)
    best = {"peaked": [24.0, 19.0, 18.0], "usual": [19.0, 18.5, 18.0, 17.5, 17.0, 16.0, 15.5, 15.0, 14.5, 14.0]}[shape]
    for row in rows:
        row[generator.choice(VOCABULARY, len(best), replace=False)] = best
    return rows


def decode_step(device: str) -> tuple[Callable[[], None], int]:
    """One token through matrices of E2B's shapes, and the number of their weights."""
    hidden, layers, owners = 1536, 35, 15  # the last 20 layers share the KV of earlier ones, and are twice as wide
    shapes = [(hidden, VOCABULARY), (hidden, layers * 256)]
    for layer in range(layers):
        head = 512 if layer % 5 == 4 else 256
        wide = 6144 if layer < owners else 12288
        shapes += [(hidden, 8 * head), (8 * head, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]
        shapes += [(hidden, 256), (256, hidden)]
        shapes += [(hidden, head), (hidden, head)] if layer < owners else []
    weights = [torch.full((out, size), 0.01, dtype=torch.bfloat16, device=device) for size, out in shapes]
    inputs = {size: torch.ones((1, size), dtype=torch.bfloat16, device=device) for size, _ in shapes}
    count = sum(weight.numel() for weight in weights)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    if device == "cpu":
        return run, count
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay, count


def waits(draft: Callable[[], Any]) -> bool:
    """Whether a call waits for the CUDA device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def same_as_numpy(ops: Any, logits: Any, settings: dict[str, Any]) -> bool:
    """Whether both libraries choose the same tokens."""
    ours, theirs = sampler_of(ops, settings), sampler_of(NumpyOps(), settings)
    rows = ops.numpy(logits)
    for position in range(PROMPT_LENGTH, PROMPT_LENGTH + 20 * ROWS, ROWS):
        run = list(range(position, position + ROWS))
        if ours.choose(logits, position + 1, run) != theirs.choose(rows, position + 1, run):
            return False
    return True


def sampler_of(ops: Any, settings: dict[str, Any]) -> RuleSampler:
    """A sampler after a prompt of ``PROMPT_LENGTH`` tokens."""
    prompt = np.random.default_rng(1).choice(VOCABULARY, PROMPT_LENGTH).tolist()
    values = GenerationSettings(**settings)
    request = TokenRequest(
        prompt_token_ids=tuple(prompt),
        settings=values,
        seed=values.seed or 0,
        speculate=True,
        num_speculative_tokens=ROWS - 1,
        eos_token_ids=frozenset({1}),
        max_total_tokens=10**6,
    )
    return RuleSampler(ops, request)


def main() -> None:
    """Measure: all choices and, in turn with them, the decode step."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--threads", type=int, help="torch's threads on the CPU")
    options.add_argument("--without-step", action="store_true", help="leave the decode step out (4.5 GB)")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    on_gpu = given.device == "cuda"
    fused = on_gpu and fused_gumbel(torch.device("cuda", torch.cuda.current_device())) is not None

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def timed(run: Callable[[], Any]) -> tuple[float, float]:
        wait()
        started = time.perf_counter()
        run()
        returned = time.perf_counter()
        wait()
        return (time.perf_counter() - started) * 1e3, (returned - started) * 1e3

    step, weights = (None, 0) if given.without_step else decode_step(given.device)
    step_times: list[float] = []
    found: list[tuple[dict[str, str], dict[str, Any]]] = []
    libraries: dict[str, Any] = {"torch": TorchOps()} if on_gpu else {"numpy": NumpyOps(), "torch": TorchOps()}
    for shape in ("peaked", "usual", "flat"):
        rows = logits_of(shape)
        for library, ops in libraries.items():
            logits: Any = rows
            if library == "torch":
                logits = torch.from_numpy(rows).to(given.device, torch.bfloat16)
            for name, settings in SETTINGS.items():
                sampler = sampler_of(ops, settings)
                run_ids = list(range(100, 100 + ROWS))
                sampler.choose(logits[:1], PROMPT_LENGTH, [5])
                same = same_as_numpy(ops, logits, settings)
                calls: dict[str, Callable[[], Any]] = {
                    "choose": partial(sampler.choose, logits, PROMPT_LENGTH + 1, run_ids),
                    "draft": partial(sampler.choose_draft, logits[:1], PROMPT_LENGTH + 2, run_ids[:2]),
                }
                for what, call in calls.items():
                    timed(call)
                    runs = [timed(call) for _ in range(given.repeats)]
                    values = {**_times([run[0] for run in runs], 3), "same_as_numpy": same}
                    if on_gpu and what == "draft":
                        values["waits"] = waits(call)
                    if on_gpu:
                        values["host_milliseconds"] = round(statistics.median(run[1] for run in runs), 3)
                    found.append(({"logits": shape, "library": library, "settings": name, "call": what}, values))
                if step is not None:  # in turn with what it is compared with
                    timed(step)
                    step_times += [timed(step)[0] for _ in range(2)]
    record = Recorder(
        __file__,
        __doc__,
        given,
        packages=("torch", "numpy"),
        accelerator=torch.cuda.get_device_name() if on_gpu else None,
        threads=torch.get_num_threads(),
        constants={"vocabulary": VOCABULARY, "rows": ROWS, "fused_noise": fused},
    )
    for case, values in found:
        share = {"share_of_step": round(values["milliseconds"] / statistics.median(step_times), 4)} if step else {}
        record.row(case, {**values, **share})
    if step is not None:
        record.row({"call": "decode step"}, {"weights": weights, **_times(step_times, 2)})


def _times(milliseconds: list[float], digits: int) -> dict[str, Any]:
    return {
        "milliseconds": round(statistics.median(milliseconds), digits),
        "least_milliseconds": round(min(milliseconds), digits),
    }


if __name__ == "__main__":
    main()
