"""Equality of plain and speculative decoding, bit by bit, at Gemma 4's real shapes, and its cost.

Weights are random: no checkpoint is needed, and numerics depend on shapes and kernels, not on what was learned. Drafts
are the plain output with some tokens made wrong, so that acceptance is neither 0 nor 1. For each model and mode
(``bitwise``, ``standard``) the same prompts are decoded plainly and speculatively, greedily and sampled (random weights
loop when greedy). Every row of logits is hashed on the device. Tokens and hashes are compared position by position, up
to the first differing token and over all of the output. ``bitwise`` also runs chosen positions through every row of a
step.

    python plugins/transformers/benchmarks/bitwise_at_real_shapes.py --device cuda --save h100
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from polydraft._loop.asked import AskedSequence
from polydraft._loop.rounds import run_rounds
from polydraft._session.call import Call
from polydraft.contract import GenerationSettings, GenerationStats, Proposal, Sampler, TokenRequest
from polydraft.sampling._sampler import RuleSampler
from polydraft.text._tracker import OutputTracker
from polydraft.text.ids_only import IdsOnlyTokenizer
from polydraft_transformers.array_ops import TorchOps
from polydraft_transformers.decoder import Decoder, fixed_rows
from polydraft_transformers.experts import experts_implementation
from polydraft_transformers.sequence import TransformersSequence
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, parser

SHAPES: dict[str, dict[str, Any]] = {
    "E2B": {
        "hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "num_attention_heads": 8,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True, "sliding_window": 512,
        "full_every": 5,
    },
    "E4B": {
        "hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240, "num_attention_heads": 8,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18, "sliding_window": 512, "full_every": 6,
    },
    "26B-A4B": {
        "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704, "sliding_window": 1024, "full_every": 6,
    },
    "31B": {
        "hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "sliding_window": 1024, "full_every": 6,
    },
}  # fmt: skip
WRONG_DRAFTS = 0.2


def build(name: str, device: str, dtype: torch.dtype, scale: int) -> Any:
    """A model of random weights; ``scale`` above 1 shrinks vocabulary and depth, for trials without a GPU."""
    shape = dict(SHAPES[name])
    every = shape.pop("full_every")
    layers = shape["num_hidden_layers"]
    if scale > 1:
        layers = shape["num_hidden_layers"] = max(layers // scale // every, 1) * every * 2
        shape["num_kv_shared_layers"] = every if "num_kv_shared_layers" in shape else 0
        shape |= {"hidden_size": 320, "intermediate_size": 256, "sliding_window": 64}
        shape |= {"num_experts": 16, "moe_intermediate_size": 64} if "num_experts" in shape else {}
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    vocabulary = 262_144 if scale == 1 else 2048
    config = Gemma4TextConfig(
        layer_types=kinds,
        head_dim=256,
        global_head_dim=512,
        final_logit_softcapping=30.0,
        vocab_size=vocabulary,
        vocab_size_per_layer_input=vocabulary,
        **shape,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Gemma4ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False)


class HashingSampler(RuleSampler):
    """The core's sampler, which also hashes every row of logits where it lies."""

    def __init__(self, request: TokenRequest, target: Decoder) -> None:
        super().__init__(TorchOps(), request)
        generator = torch.Generator().manual_seed(1)
        vocabulary = target.lm_head.weight.shape[0]
        self._factors = torch.randint(-(2**62), 2**62, (vocabulary,), generator=generator).to(target.device)
        self.rows: list[tuple[int, torch.Tensor]] = []

    def choose(
        self, logits: torch.Tensor, first_position: int, run_token_ids: Sequence[int], *, keep_logprobs: bool = True
    ) -> Any:
        """Choose as the sampler does, and keep the rows' hashes."""
        self.rows.append((first_position, self.hashes(logits)))
        return super().choose(logits, first_position, run_token_ids, keep_logprobs=keep_logprobs)

    def hashes(self, logits: torch.Tensor) -> torch.Tensor:
        """Int64, shape (rows,): the bits of each row, weighted by random numbers, summed modulo 2**64."""
        width = torch.int16 if logits.dtype.itemsize == 2 else torch.int32
        return (logits.contiguous().view(width).to(torch.int64) * self._factors).sum(dim=-1)

    def by_position(self) -> dict[int, int]:
        """Hash of the row that chose each position: the last one that ran, which is the accepted one."""
        return {first + index: value for first, rows in self.rows for index, value in enumerate(rows.tolist())}


class PreparedDrafts(TransformersSequence):
    """A sequence that drafts the tokens of a text, some of them made wrong."""

    text: Sequence[int] = ()
    """Prompt and output; where it ends, nothing is drafted."""
    lots = random.Random()

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """The tokens that follow ``newest`` in the text."""
        drafts = list(self.text[self.length + 1 : self.length + 1 + k])
        vocabulary = self.target.lm_head.weight.shape[0]
        return Proposal([self.lots.randrange(vocabulary) if self.lots.random() < WRONG_DRAFTS else x for x in drafts])


class Decoded(NamedTuple):
    """One generation."""

    tokens: tuple[int, ...]
    hashes: dict[int, int]
    """By position."""
    stats: GenerationStats


def decode(target: Decoder, request: TokenRequest, output: Sequence[int] = ()) -> Decoded:
    """Decode with drafts from ``output``; plainly if it is empty."""
    sequence, sampler = PreparedDrafts(target, 512, threading.Lock()), HashingSampler(request, target)
    sequence.text, sequence.lots = [*request.prompt_token_ids, *output], random.Random(0)
    tokenizer = IdsOnlyTokenizer(target.lm_head.weight.shape[0])
    call = Call(request, OutputTracker(tokenizer, request, parse_chat=False), running=None)
    before = time.perf_counter()
    for emitted in run_rounds(
        AskedSequence(sequence, sampler, tokenizer.vocab_size, wants_logprobs=False), call, sampler
    ):
        now = time.perf_counter()
        call.check_yielded(emitted)
        call.count(emitted, now - before)
        before = now
    sequence.close()
    return Decoded(call.token_ids, sampler.by_position(), call.stats())


def through_every_row(target: Decoder, request: TokenRequest, tokens: Sequence[int], rows: int) -> tuple[int, int]:
    """Run positions through every row index of a step: (rows compared, rows that differ from the first)."""
    known = [*request.prompt_token_ids, *tokens]
    sequence, hashing = TransformersSequence(target, 512, threading.Lock()), HashingSampler(request, target)
    sequence.prefill(request.prompt_token_ids, hashing)
    base = len(request.prompt_token_ids)
    compared = different = 0
    for position in range(base + rows, len(known) - rows, max((len(known) - base) // 24, 1)):
        found: list[int] = []
        for row in range(rows):
            first = position - row
            while sequence.length < first:  # tokens are run one a step, as plain decoding does
                sequence.verify(known[sequence.length : sequence.length + 1], hashing)
            sequence.rollback(first)
            hashing.rows.clear()
            sequence.verify(known[first : first + rows], hashing)
            found.append(hashing.by_position()[position + 1])
        compared += len(found)
        different += sum(value != found[0] for value in found)
    sequence.close()
    return compared, different


def compare(plain: Decoded, speculative: Decoded) -> dict[str, int]:
    """Differing tokens and rows, over the output and up to the first differing token."""
    pairs = list(zip(plain.tokens, speculative.tokens, strict=True))
    first = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    base = min(plain.hashes)
    rows = [plain.hashes[base + i] != speculative.hashes[base + i] for i in range(len(pairs))]
    return {
        "tokens": len(pairs),
        "tokens_different": sum(one != other for one, other in pairs),
        "flips": int(first < len(pairs)),
        "rows_same_prefix": min(first + 1, len(pairs)),
        "rows_same_prefix_different": sum(rows[: first + 1]),
    }


def examine(name: str, arguments: argparse.Namespace, deadline: float, record: Recorder) -> None:
    """One model in each mode."""
    dtype = getattr(torch, arguments.dtype)
    model = build(name, arguments.device, dtype, arguments.scale)
    k = arguments.k
    for mode in arguments.modes:
        fixed = mode == "bitwise"
        device = torch.device(arguments.device)
        experts = experts_implementation(arguments.experts, dtype, device, fixed=fixed)
        if experts is not None and "num_experts" in SHAPES[name]:
            model.set_experts_implementation(experts)
        target = Decoder(model, fixed_rows(k) if fixed else k + 1, fixed=fixed)
        totals: Counter[str] = Counter()
        cut: dict[str, bool] = {}
        times: dict[str, list[float]] = {"plain_ms_per_token": [], "speculative_ms_per_round": []}
        accepted = drafted = 0
        for length, temperature in product(arguments.prompt_lengths, (0.0, 1.0)):
            if time.perf_counter() > deadline:
                cut["stopped_early"] = True
                continue
            request = TokenRequest(
                prompt_token_ids=tuple(random.Random(length).choices(range(model.config.vocab_size), k=length)),
                settings=GenerationSettings(max_new_tokens=arguments.new_tokens, temperature=temperature),
                seed=length,
                speculate=True,
                num_speculative_tokens=k,
                eos_token_ids=frozenset(),
                max_total_tokens=10**6,
            )
            plain = decode(target, request)
            speculative = decode(target, request, plain.tokens)
            totals.update(compare(plain, speculative))
            accepted += speculative.stats.num_accepted_tokens
            drafted += speculative.stats.num_draft_tokens
            for timed, stats in zip(times, (plain.stats, speculative.stats), strict=True):
                times[timed].append(stats.decode_seconds / stats.num_target_steps * 1e3)
            if fixed and temperature == 1.0:
                compared, different = through_every_row(target, request, plain.tokens, target.step_rows)
                totals.update(every_row_compared=compared, every_row_different=different)
        values = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "rows": target.step_rows,
            **totals,
            "acceptance_rate": round(accepted / max(drafted, 1), 3),
            **{key: round(statistics.median(found), 2) for key, found in times.items() if found},
            **cut,
        }
        record.row({"model": name, "mode": mode}, values)


def recorder_of(script: str, doc: str, arguments: argparse.Namespace, **given: Any) -> Recorder:
    """Of a benchmark of torch, on the device of its arguments."""
    on_gpu = arguments.device.startswith("cuda")
    return Recorder(
        script,
        doc,
        arguments,
        packages=("torch", "transformers"),
        accelerator=torch.cuda.get_device_name() if on_gpu else None,
        threads=torch.get_num_threads(),
        versions={"cuda": torch.version.cuda} if on_gpu else {},
        **given,
    )


def main() -> None:
    """Examine the models one after the other."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--modes", nargs="+", choices=("bitwise", "standard"), default=["bitwise", "standard"])
    options.add_argument("--prompt-lengths", type=int, nargs="+", default=[48, 500, 1000, 2040])
    options.add_argument("--device", default="cuda")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("-k", type=int, default=5)
    options.add_argument("--new-tokens", type=int, default=896)
    options.add_argument("--experts", help="experts_implementation of Transformers")
    options.add_argument("--scale", type=int, default=1, help="above 1: shrunken models, for a trial")
    options.add_argument("--seconds", type=float, default=3600.0, help="start no generation after this time")
    arguments = options.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    on_gpu = arguments.device.startswith("cuda")
    record = recorder_of(__file__, __doc__, arguments, constants={"wrong_drafts": WRONG_DRAFTS})
    for name in arguments.models:
        with torch.inference_mode():
            examine(name, arguments, deadline, record)
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
