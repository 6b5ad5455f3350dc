"""Milliseconds a plain step and a speculative round at Gemma 4's real shapes, launched one by one or as rounds.

Weights are random, so nearly every draft is rejected; a round takes as long whatever is accepted. ``steps`` launches
drafts, verification and choices one after the other and waits for each; ``rounds`` is what runs on a GPU
(``device_rounds``). The loop is the core's, with the real sampler. ``host_round_ms`` is what the loop takes besides
waiting for the device, while the next round runs; ``drafts_ms`` is a replay of the k drafts alone, ``device_ms`` of a
whole round. ``first_round_ms`` includes compiling what is not in Triton's cache, and capturing.

    python plugins/transformers/benchmarks/rounds_at_real_shapes.py --save h100
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitwise_at_real_shapes import SHAPES, build, recorder_of
from polydraft._loop.asked import AskedSequence
from polydraft._loop.rounds import run_rounds
from polydraft._session.call import Call
from polydraft.contract import GenerationSettings, TokenRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft.sampling.on_device import device_choice
from polydraft.text._tracker import OutputTracker
from polydraft.text.ids_only import IdsOnlyTokenizer
from polydraft_transformers import device_rounds
from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.decoder import Decoder
from polydraft_transformers.device_rounds import DeviceRounds
from polydraft_transformers.drafters.mtp import MtpDrafter, MtpSequence
from polydraft_transformers.experts import experts_implementation
from polydraft_transformers.graphs import Captured
from polydraft_transformers.shared_caches import SharedCaches
from polydraft_transformers.step_choice import kind_of, state_of
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser

ASSISTANTS: dict[str, dict[str, Any]] = {
    "E2B": {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512, "hidden_size": 256},
    "E4B": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 512, "hidden_size": 256},
    "26B-A4B": {
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size": 1024,
    },
    "31B": {
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
        "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size": 1024,
    },
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top_k 64, top_p 0.95": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
}
_WARM_UP, _LAST = 4, 6  # rounds at both ends that are not timed: captures, and shorter rounds


def assistant(name: str, target: Any, dtype: torch.dtype) -> Any:
    """An assistant of random weights: centroids for the two small models, as published ones have."""
    own = ASSISTANTS[name] | {"sliding_window": target.config.sliding_window}
    ordered = own["hidden_size"] == 256
    device = target.lm_head.weight.device
    vocabulary = target.config.vocab_size
    text = Gemma4TextConfig(
        vocab_size=vocabulary, head_dim=256, global_head_dim=512, num_hidden_layers=4, num_kv_shared_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], intermediate_size=2048 if ordered else 4096,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, **own,
    )  # fmt: skip
    config = Gemma4AssistantConfig(
        text_config=text, backbone_hidden_size=target.config.hidden_size, use_ordered_embeddings=ordered
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        made = Gemma4AssistantForCausalLM(config).eval().requires_grad_(requires_grad=False)
    torch.set_default_dtype(torch.float32)
    if ordered:
        made.masked_embedding.token_ordering.copy_(torch.randperm(vocabulary, device=device))
    return made


def request_of(arguments: argparse.Namespace, vocabulary: int, settings: dict[str, Any], k: int) -> TokenRequest:
    """A generation of random prompt."""
    return TokenRequest(
        prompt_token_ids=tuple(random.Random(5).choices(range(vocabulary), k=arguments.context)),
        settings=GenerationSettings(max_new_tokens=arguments.new_tokens, **settings),
        seed=3,
        speculate=k > 0,
        num_speculative_tokens=k,
        eos_token_ids=frozenset(),
        max_total_tokens=10**6,
    )


def decoded(target: Decoder, drafter: MtpDrafter, request: TokenRequest) -> tuple[tuple[int, ...], dict[str, float]]:
    """The tokens, and medians over the rounds, in ms: ``round`` and, of it, ``host``."""
    vocabulary = target.lm_head.weight.shape[0]
    sequence = MtpSequence(target, drafter, None, threading.Lock())
    tokenizer = IdsOnlyTokenizer(vocabulary)
    call = Call(request, OutputTracker(tokenizer, request, parse_chat=False), running=None)
    waited = [0.0]
    wait = device_rounds._Launched.wait

    def timed(launched: Any) -> Any:
        began = time.perf_counter()
        found = wait(launched)
        waited[0] += time.perf_counter() - began
        return found

    rounds: list[float] = []
    hosts: list[float] = []
    device_rounds._Launched.wait = timed  # type: ignore[method-assign]
    try:
        before = time.perf_counter()
        sampler = RuleSampler(TorchOps(), request)
        for emitted in run_rounds(AskedSequence(sequence, sampler, vocabulary, wants_logprobs=False), call, sampler):
            now = time.perf_counter()
            call.check_yielded(emitted)
            call.count(emitted, now - before)
            rounds.append((now - before) * 1e3)
            hosts.append((now - before - waited[0]) * 1e3)
            before, waited[0] = now, 0.0
    finally:
        device_rounds._Launched.wait = wait  # type: ignore[method-assign]
        sequence.close()
    timed_rounds = slice(_WARM_UP, -_LAST)
    return call.token_ids, {
        "round": statistics.median(rounds[timed_rounds]),
        "host": statistics.median(hosts[timed_rounds]),
        "first": rounds[1],
    }


def replay_ms(function: Callable[[], None], repeats: int = 20) -> float:
    """The fastest of three times."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) / repeats * 1e3)
    return min(found)


def drafts_alone(target: Decoder, drafter: MtpDrafter, request: TokenRequest) -> dict[str, float]:
    """Time and kernels of the drafts of a round, replayed, and of the whole round."""
    sequence, sampler = MtpSequence(target, drafter, None, threading.Lock()), RuleSampler(TorchOps(), request)
    prompt = list(request.prompt_token_ids)
    sequence.prefill(prompt, sampler)
    choice = device_choice(sampler, len(prompt) + 1)
    assert choice is not None
    assert sequence._hidden is not None
    state = torch.tensor([state_of(choice, prompt[-1], len(prompt))], device=target.device)
    k, kind = request.num_speculative_tokens, kind_of(choice)
    sequence.cache.reserve(1 << (len(prompt) + 2 * target.step_rows).bit_length())
    rounds, shared = DeviceRounds(target, drafter, threading.Lock()), SharedCaches([sequence.cache])
    values: dict[str, float] = {}
    for name, part in (
        ("drafts", lambda state, hidden: drafter.draft(state, hidden, k, kind, shared)),
        ("device", lambda state, hidden: rounds._round(state, hidden, k, kind, shared)),
    ):
        captured = Captured(part, (state, sequence._hidden[-1:].clone()))
        values[f"{name}_ms"] = round(replay_ms(captured._graph.replay), 3)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            captured._graph.replay()
            torch.cuda.synchronize()
        values[f"{name}_kernels"] = sum(event.count for event in profiled.key_averages() if event.device_time_total)
    sequence.close()
    return values


def examine(name: str, arguments: argparse.Namespace, record: Recorder) -> None:
    """One model with all settings."""
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    model = build(name, arguments.device, dtype, arguments.scale)
    experts = experts_implementation(None, dtype, device, fixed=False)
    if experts is not None and "num_experts" in SHAPES[name]:
        model.set_experts_implementation(experts)
    target = Decoder(model, arguments.k + 1)
    drafter = MtpDrafter(assistant(name, model, dtype), target)
    can_run_rounds = target.runs_rounds
    for label in arguments.settings:
        tokens: dict[tuple[str, int], tuple[int, ...]] = {}
        for side in ("steps", "rounds") if can_run_rounds else ("steps",):
            target.runs_rounds = side == "rounds"
            values: dict[str, Any] = {}
            for k in (arguments.k, 0):
                request = request_of(arguments, model.config.vocab_size, SETTINGS[label], k)
                (_, warm), (tokens[side, k], found) = (decoded(target, drafter, request) for _ in range(2))
                kind = "round" if k else "plain"
                values[f"{kind}_ms"] = round(found["round"], 3)
                values[f"first_{kind}_ms"] = round(warm["first"], 1)
                if target.runs_rounds:
                    values[f"host_{kind}_ms"] = round(found["host"], 3)
            if target.runs_rounds:
                values |= drafts_alone(
                    target, drafter, request_of(arguments, model.config.vocab_size, SETTINGS[label], arguments.k)
                )
            wanted = tokens["steps", 0]
            values["tokens_like_plain_steps"] = min(
                next((i for i, pair in enumerate(zip(own, wanted, strict=True)) if len({*pair}) > 1), len(wanted))
                for (of, _), own in tokens.items()
                if of == side
            )
            record.row({"model": name, "settings": label, "side": side}, values)


def main() -> None:
    """Examine the models one after the other."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options.add_argument("--device", default="cuda")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("-k", type=int, default=4)
    options.add_argument("--context", type=int, default=1064)
    options.add_argument("--new-tokens", type=int, default=60)
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
