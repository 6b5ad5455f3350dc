"""Speed of our loop against mlx-lm's draft_model= and mlx-vlm's MTP, on the same pair, prompt and k.

    pip install mlx-vlm==0.7.10          # beside polydraft-mlx and polydraft-builtin-pairs
    python plugins/mlx/benchmarks/peers.py --out plugins/mlx/benchmarks/results.json [--only tiny-e2b]

Runs alternate (ours, theirs, ours, ...), each in this process and greedy; medians are reported, and the median of the
peer's time over ours in runs that followed one another. A round is one draft of k tokens and the target forward that
verifies it. Times run from the first emitted tokens to the last: prefill is not in them. All must emit the same tokens,
or the comparison is refused. ``--only`` measures one pair, and leaves the others in the file as they are.

mlx-vlm's text-only class cannot be used with assistants, so its target is the same weights in its multimodal class,
beside a vision tower that is never run; and its habit of changing k by itself is switched off
(``prefer_requested_block_size``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import polydraft
from mlx_lm import stream_generate
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model
from polydraft_builtin_pairs import path as builtin_path
from polydraft_mlx.config import overrides

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
    session = polydraft.load(f"builtin:{target}", backend="mlx", dtype=dtype, num_speculative_tokens=K)

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


def compare(name: str, sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Alternate the sides."""
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, generate in sides.items():
            run = measured(generate)
            if repeat:  # the first one compiles and allocates
                runs[side].append(run)
    shortest = min(len(found[0].token_ids) for found in runs.values())
    if len({found[0].token_ids[:shortest] for found in runs.values()}) != 1:
        raise SystemExit(f"{name}: the sides emit different tokens")
    result: dict[str, Any] = {}
    for side, found in runs.items():
        result[side] = {
            "ms_per_round": round(statistics.median(1e3 * run.seconds / run.rounds for run in found), 2),
            "cpu_ms_per_round": round(statistics.median(1e3 * run.cpu_seconds / run.rounds for run in found), 2),
            "tokens_per_second": round(statistics.median((len(run.token_ids) - 1) / run.seconds for run in found), 1),
            "tokens_per_round": round(statistics.median((len(run.token_ids) - 1) / run.rounds for run in found), 3),
            "peak_mib": round(max(run.peak_bytes for run in found) / 2**20, 2),
        }
        if side not in {"polydraft", "polydraft, plain"}:
            pairs = zip(found, runs["polydraft"], strict=True)
            ratios = [
                tuple(
                    taken * own.rounds / one.rounds / ours
                    for taken, ours in ((one.seconds, own.seconds), (one.cpu_seconds, own.cpu_seconds))
                )
                for one, own in pairs
            ]
            for what, values in zip(("time", "cpu_time"), zip(*ratios, strict=True), strict=True):
                result[side][f"{what}_per_round_over_polydrafts"] = round(statistics.median(values), 3)
    print(name, json.dumps(result, indent=2), flush=True)
    return result


def main() -> None:
    """Run all comparisons and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--only", choices=("tiny-llama", "tiny-e2b", "tiny-31b"))
    arguments = parser.parse_args()
    with polydraft.load("builtin:tiny-llama", backend="mlx", drafter=None) as session:
        prompt = list(session.generate(PROMPT, max_new_tokens=1).prompt_token_ids)
    results: dict[str, Any] = {}
    if arguments.only and arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))["results"]
    for target in [arguments.only] if arguments.only else ["tiny-llama", "tiny-e2b", "tiny-31b"]:
        for dtype in ("float32", "bfloat16"):
            given = (dtype, prompt, arguments.tokens)
            sides = {"polydraft": ours(target, *given), "polydraft, plain": ours(target, *given, "off")}
            drafter = "tiny-llama-draft" if target == "tiny-llama" else f"{target}-assistant"
            if target == "tiny-llama":
                sides["mlx-lm"] = theirs_mlx_lm(target, drafter, *given)
            else:
                try:
                    sides["mlx-vlm"] = theirs_mlx_vlm(target, drafter, *given)
                except ImportError as error:
                    raise SystemExit(f"{error}: install mlx-vlm 0.7.10 to compare with it") from error
            results[f"{target} + {drafter}, {dtype}"] = compare(f"{target}, {dtype}", sides, arguments.repeats)
    record = {"machine": machine(), "k": K, "prompt_tokens": len(prompt), "new_tokens": arguments.tokens,
              "repeats": arguments.repeats, "results": results}  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What it was measured on."""
    versions = {}
    for name in ("mlx", "mlx-lm", "mlx-vlm", "polydraft-mlx"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "device": str(mx.default_device()),
        "cpu": str(mx.device_info(mx.cpu).get("device_name", platform.processor())),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": commit(),
        **versions,
    }


def commit() -> str:
    """The repository's."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


if __name__ == "__main__":
    main()
