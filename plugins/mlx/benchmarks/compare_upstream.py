"""Speed compared with mlx-lm's ``draft_model=`` and mlx-vlm's MTP: the same pair, prompt and k, greedy, in turn.

    pip install mlx-vlm==0.7.10          # as well as polydraft-mlx and polydraft-builtin-pairs
    python plugins/mlx/benchmarks/compare_upstream.py --save [--pairs tiny-e2b --keep]

All run in this process. ``time_per_round_over_polydraft`` is the median ratio of runs that followed one another. A
round is one draft of k tokens and the target forward that verifies it. Times run from the first emitted tokens to the
last: prefill is not in them. All must emit the same tokens, or the comparison is refused.

mlx-vlm's text-only class cannot be used with assistants, so its target is the same weights in its multimodal class,
next to a vision tower that is never run; and its habit of changing k by itself is switched off
(``prefer_requested_block_size``).
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import polydraft
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model
from polydraft_builtin_pairs import path as builtin_path
from polydraft_mlx.config import overrides

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, in_turn, parser

K = 4
PROMPT = """class Stack:
    '''A stack of items.'''

    def __init__(self):
        self.items = []

    def push(self, item):
"""


@dataclass(frozen=True)
class Run:
    """One generation: its tokens, rounds after the first one's, and what they took."""

    token_ids: tuple[int, ...]
    rounds: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measured(generate: Callable[[], tuple[list[int], int, float, float]]) -> Run:
    """Run once with a clean peak of memory."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    tokens, rounds, seconds, cpu = generate()
    return Run(tuple(tokens), rounds, seconds, cpu, int(mx.get_peak_memory()))


def timed(stream: Any) -> tuple[list[int], int, float, float]:
    """Read (token, begins a new round) pairs; time from the first round's end to the last's."""
    tokens: list[int] = []
    rounds = 0
    first = first_cpu = 0.0
    is_draft = False
    for token, is_draft in stream:
        tokens.append(int(token))
        if not is_draft:
            rounds += 1
            if rounds == 1:
                first, first_cpu = time.perf_counter(), time.process_time()
    rounds += is_draft  # the last round was cut before its bonus token
    return tokens, rounds - 1, time.perf_counter() - first, time.process_time() - first_cpu


def ours(target: str, dtype: str, prompt: list[int], count: int, speculate: str = "on") -> Callable[[], Any]:
    """Through ``polydraft.load``; with ``speculate="off"`` a round is one token."""
    session = polydraft.load(
        f"builtin:{target}", backend="mlx", dtype=dtype, num_speculative_tokens=K, prefix_cache_bytes=0
    )

    def generate() -> tuple[list[int], int, float, float]:
        def stream() -> Any:
            for chunk in session.stream(prompt, max_new_tokens=count, ignore_eos=True, speculate=speculate):
                accepted = chunk.num_accepted_tokens or 0
                for index, token in enumerate(chunk.token_ids):
                    yield token, index < accepted

        return timed(stream())

    return generate


def theirs_mlx_lm(target: str, drafter: str, dtype: str, prompt: list[int], count: int) -> Callable[[], Any]:
    """mlx-lm's ``stream_generate(draft_model=)``, which makes text as our session does."""
    models = []
    for name in (target, drafter):
        path = builtin_path(name)
        model, _ = load_model(path, model_config=overrides(json.loads((path / "config.json").read_text()), name))
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())
        models.append(model)
    tokenizer = load_tokenizer(builtin_path(target), eos_token_ids=[])
    tokenizer.eos_token_ids.clear()

    def generate() -> tuple[list[int], int, float, float]:
        steps = stream_generate(
            models[0], tokenizer, prompt, max_tokens=count, draft_model=models[1], num_draft_tokens=K
        )
        return timed((step.token, step.from_draft) for step in steps)

    return generate


def theirs_mlx_vlm(target: str, drafter: str, dtype: str, prompt: list[int], count: int) -> Callable[[], Any]:
    """mlx-vlm's MTP loop."""
    from mlx_vlm.generate import generate_step
    from mlx_vlm.models.gemma4 import Model, ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.speculative.drafters.gemma4_assistant import Gemma4AssistantDraftModel
    from mlx_vlm.speculative.drafters.gemma4_assistant import ModelConfig as DrafterConfig

    config = json.loads((builtin_path(target) / "config.json").read_text())
    text = {**config, **overrides(config, target)}
    vision = VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=32, global_head_dim=32, position_embedding_size=16,
    )  # fmt: skip
    model = Model(
        ModelConfig(
            text_config=TextConfig.from_dict(text), vision_config=vision, vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
        )
    )  # fmt: skip
    weights = mx.load(str(builtin_path(target) / "model.safetensors"))
    named = {f"model.language_model.{name.removeprefix('model.')}": value for name, value in weights.items()}
    model.load_weights(list(model.sanitize(named).items()), strict=False)
    drafter_config = json.loads((builtin_path(drafter) / "config.json").read_text())
    drafter_config["text_config"].update(overrides(drafter_config["text_config"], drafter))
    assistant = Gemma4AssistantDraftModel(DrafterConfig.from_dict(drafter_config))
    stored = mx.load(str(builtin_path(drafter) / "model.safetensors"))
    assistant.load_weights(list(assistant.sanitize(stored).items()), strict=True)
    assistant.prefer_requested_block_size = True
    for each in (model, assistant):
        each.set_dtype(getattr(mx, dtype))
        each.eval()
        mx.eval(each.parameters())

    def generate() -> tuple[list[int], int, float, float]:
        assistant.accept_lens = []
        tokens, marks = [], []
        steps = generate_step(
            mx.array([prompt]), model, None, None, max_tokens=count, draft_model=assistant, draft_kind="mtp",
            draft_block_size=K + 1, temperature=0.0,
        )  # fmt: skip
        for token, _ in steps:
            tokens.append(int(token))
            marks.append((time.perf_counter(), time.process_time()))
        # The first token is prefill's; the rounds after it are counted by the drafter.
        return tokens, len(assistant.accept_lens), marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1]

    return generate


def compare(case: dict[str, str], sides: dict[str, Callable[[], Any]], repeats: int, record: Recorder) -> None:
    """Measure all sides of a pair in one dtype."""
    found = in_turn({side: partial(measured, generate) for side, generate in sides.items()}, repeats)
    shortest = min(len(runs[0].token_ids) for runs in found.values())
    if len({runs[0].token_ids[:shortest] for runs in found.values()}) != 1:
        raise SystemExit(f"{case}: the sides emit different tokens")
    for side, runs in found.items():
        figures = {
            "ms_per_round": [1e3 * run.seconds / run.rounds for run in runs],
            "cpu_ms_per_round": [1e3 * run.cpu_seconds / run.rounds for run in runs],
            "tokens_per_second": [(len(run.token_ids) - 1) / run.seconds for run in runs],
            "tokens_per_round": [(len(run.token_ids) - 1) / run.rounds for run in runs],
        }
        values = {"peak_mib": round(max(run.peak_bytes for run in runs) / 2**20, 2)}
        if side == "polydraft":
            own = figures
        elif side != "polydraft, plain":
            for what in ("time", "cpu_time"):
                name = what.replace("time", "ms") + "_per_round"
                ratios = [theirs / ours for theirs, ours in zip(figures[name], own[name], strict=True)]
                values[f"{what}_per_round_over_polydraft"] = round(statistics.median(ratios), 3)
        record.row({**case, "side": side}, values, figures)


def main() -> None:
    """Run all comparisons."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--new-tokens", type=int, default=96)
    options.add_argument("--pairs", nargs="+", default=["tiny-llama", "tiny-e2b", "tiny-31b"])
    given = options.parse_args()
    with polydraft.load("builtin:tiny-llama", backend="mlx", drafter=None, prefix_cache_bytes=0) as session:
        prompt = list(session.generate(PROMPT, max_new_tokens=1).prompt_token_ids)
    record = Recorder(
        __file__,
        __doc__,
        given,
        packages=("polydraft-mlx", "mlx", "mlx-lm", "mlx-vlm"),
        constants={"k": K, "prompt_tokens": len(prompt), "device": str(mx.default_device())},
    )
    for target, dtype in ((target, dtype) for target in given.pairs for dtype in ("float32", "bfloat16")):
        settings = (dtype, prompt, given.new_tokens)
        sides = {"polydraft": ours(target, *settings), "polydraft, plain": ours(target, *settings, "off")}
        if target == "tiny-llama":
            sides["mlx-lm"] = theirs_mlx_lm(target, "tiny-llama-draft", *settings)
        else:
            try:
                sides["mlx-vlm"] = theirs_mlx_vlm(target, f"{target}-assistant", *settings)
            except ImportError as error:
                raise SystemExit(f"{error}: install mlx-vlm 0.7.10 to compare with it") from error
        compare({"pair": target, "dtype": dtype}, sides, given.repeats, record)


if __name__ == "__main__":
    main()
