"""Tokens a second with and without drafts on one GPU, at Gemma 4's real shapes: the README's table.

Weights are random, so whether a draft is accepted is drawn: at each position with the same probability, as far as the
drafts before it were accepted (*synthetic acceptance*). All else is what a session runs for its user: prompt, rounds,
the choice of tokens, streaming. Plain decoding is the session's own fastest. Few rounds are drawn, so the figure to
compare is ``expected_tokens_per_second``, that of the mean of all draws: a round takes as long whatever is accepted.
The row ``copy`` is what the GPU copies in a second, in and out, which bounds every figure. Rows with ``at_once`` are so
many prompts at once (``generate_many``), their prefill included: the prompts' share of the time is that of all of them.

    python plugins/transformers/benchmarks/headline.py --save h200
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bitwise_at_real_shapes import SHAPES, build, recorder_of
from polydraft._session.session import Session
from polydraft.contract import LoadRequest, ModelSource, SpeculationPlan
from polydraft.text.ids_only import IdsOnlyTokenizer
from polydraft_transformers import device_rounds
from polydraft_transformers.backend import TransformersBackend
from polydraft_transformers.decoder import Decoder
from polydraft_transformers.drafters.mtp import MtpDrafter
from polydraft_transformers.engine import TransformersEngine
from polydraft_transformers.experts import experts_implementation
from polydraft_transformers.options import TransformersOptions
from polydraft_transformers.shared_caches import SharedCaches
from polydraft_transformers.step_choice import Kind, choose
from rounds_at_real_shapes import assistant
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser

_CONTEXT = 131072
_ENDS = 4  # chunks at both ends that are not timed


class DrawnDrafter(MtpDrafter):
    """An assistant whose drafts the target's choices equal with a given probability."""

    acceptance = 0.8
    _drafts: Tensor

    def draft(self, state: Tensor, hidden: Tensor, k: int, kind: Kind, cache: SharedCaches) -> tuple[Tensor, Tensor]:
        """As ever; the drafts are kept for ``choose``."""
        found = super().draft(state, hidden, k, kind, cache)
        self._drafts = found[0]
        return found

    def choose(self, logits: Tensor, keys: Tensor, state: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """In place of ``step_choice.choose`` for the target's rows."""
        chosen, largest = choose(logits, keys, state, kind)
        own = chosen.view(len(state), -1)
        if own.shape[1] > 1:
            drafts = self._drafts
            k = drafts.shape[1]
            positions = state[:, 1:2] + torch.arange(k, device=state.device)
            # A hash of the position: equally distributed, and independent from one position to the next.
            mixed = positions * 6364136223846793005 + 1442695040888963407
            mixed = (mixed ^ (mixed >> 33)) * -49064778989728563
            accepted = ((mixed >> 24) & 0xFFFFFF) < self.acceptance * 2**24
            others = torch.where(own[:, :k] == drafts, (drafts + 1) % logits.shape[1], own[:, :k])
            chosen = torch.cat([torch.where(accepted, drafts, others), own[:, k:]], 1).flatten()
        return chosen, largest


def session_of(name: str, model: Any, target: Decoder, drafter: MtpDrafter, k: int, most: int | None = None) -> Session:
    """A session on loaded models, as ``polydraft.load`` makes it; ``most``: it picks k, and this is the largest."""
    target.step_rows = (most or k) + 1
    target._free.clear()
    config = json.loads(model.config.to_json_string(use_diff=False))
    source = ModelSource(id=name, kind="local", format="safetensors", config=config)
    request = LoadRequest(
        backend="transformers",
        target=source,
        plan=SpeculationPlan(
            kind="mtp", num_speculative_tokens=k, max_speculative_tokens=most, chosen_by="caller", drafter=source
        ),
        device=str(target.device),
        engine_options=TransformersOptions(),
    )
    vocabulary = int(target.lm_head.weight.shape[0])
    engine = TransformersEngine(target, drafter, IdsOnlyTokenizer(vocabulary), request, _CONTEXT)
    return Session(engine, engine.running, TransformersBackend().capabilities(), prefix_cache_bytes=0)


def generated(session: Session, prompt: list[int], new_tokens: int, speculate: str) -> dict[str, float]:
    """Figures of one output, without its ends."""
    times: list[float] = []
    counts: list[int] = []
    with session.stream(
        prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, speculate=speculate
    ) as stream:
        for chunk in stream:
            times.append(time.perf_counter())
            counts.append(len(chunk.token_ids))
    seconds, rounds = times[-_ENDS] - times[_ENDS], len(times) - 2 * _ENDS
    tokens = sum(counts[_ENDS + 1 : len(counts) - _ENDS + 1])
    return {
        "tokens_per_second": tokens / seconds,
        "round_milliseconds": seconds / rounds * 1e3,
        "tokens_per_round": tokens / rounds,
    }


def generated_at_once(session: Session, prompts: list[list[int]], new_tokens: int, speculate: str) -> dict[str, float]:
    """Figures of several outputs that are made at once."""
    began = time.perf_counter()
    results = session.generate_many(
        prompts, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, speculate=speculate
    )
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": sum(len(result.token_ids) for result in results) / seconds,
        "prefill_share": sum(result.stats.prefill_seconds for result in results) / len(results) / seconds,
    }


def examine(name: str, arguments: argparse.Namespace, record: Recorder) -> None:
    """One model: plain, and with each k."""
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    model = build(name, arguments.device, dtype, arguments.scale)
    experts = experts_implementation(None, dtype, device, fixed=False)
    if experts is not None and "num_experts" in SHAPES[name]:
        model.set_experts_implementation(experts)
    numbers = [int(k) for k in arguments.k if k != "auto"]
    target = Decoder(model, max(numbers) + 1)
    drafter = DrawnDrafter(assistant(name, model, dtype), target)
    drafter.acceptance = arguments.acceptance
    device_rounds.choose = drafter.choose
    for k in (0, *numbers, *(["auto"] if "auto" in arguments.k else [])):
        most = max(numbers) if k == "auto" else None
        session = session_of(name, model, target, drafter, numbers[0] if k in {0, "auto"} else k, most)
        runs: dict[str, list[float]] = {}
        for run in range(arguments.repeats + 1):
            # Of another length each time: which drafts are accepted depends on their positions.
            length = arguments.context + run * arguments.new_tokens
            prompt = random.Random(run).choices(range(model.config.vocab_size), k=length)
            found = generated(session, prompt, arguments.new_tokens, "on" if k else "off")
            for what, value in found.items() if run else ():
                runs.setdefault(what, []).append(value)
        figures = {}
        if k != "auto":  # whose rounds differ
            mean = sum(arguments.acceptance**accepted for accepted in range(k + 1))
            milliseconds = statistics.median(runs["round_milliseconds"])
            figures["expected_tokens_per_second"] = round(1e3 * mean / milliseconds, 1)
        record.row({"model": name, "k": k}, figures, runs)
        for count in arguments.at_once if k in {0, numbers[0]} else ():
            runs = {}
            for run in range(arguments.repeats + 1):
                draw = random.Random(run)
                prompts = [draw.choices(range(model.config.vocab_size), k=arguments.context) for _ in range(count)]
                found = generated_at_once(session, prompts, arguments.new_tokens, "on" if k else "off")
                for what, value in found.items() if run else ():
                    runs.setdefault(what, []).append(value)
            record.row({"model": name, "k": k, "at_once": count}, {}, runs)
        session.close()


def copied_per_second() -> float:
    """Terabytes that a copy within the GPU's memory reads and writes in a second."""
    given = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(given)
    other.copy_(given)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        other.copy_(given)
    torch.cuda.synchronize()
    return 20 * 2 * given.nbytes / (time.perf_counter() - began) / 1e12


def main() -> None:
    """Examine the models one after the other."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--acceptance", type=float, default=0.8, help="of a draft at each position")
    options.add_argument("-k", nargs="+", default=["3", "4", "5", "6", "7", "8"], help="numbers, and auto")
    options.add_argument("--at-once", type=int, nargs="*", default=[], help="numbers of prompts, such as 1 8")
    options.add_argument("--context", type=int, default=1024)
    options.add_argument("--new-tokens", type=int, default=256)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--device", default="cuda")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--scale", type=int, default=1, help="above 1: shrunken models, for a trial")
    arguments = options.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    record = recorder_of(__file__, __doc__, arguments)
    if on_gpu:
        record.row({"model": "copy"}, {"terabytes_per_second": round(copied_per_second(), 2)})
    for name in arguments.models:
        with torch.inference_mode():
            examine(name, arguments, record)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
