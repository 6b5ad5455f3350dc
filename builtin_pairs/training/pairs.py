"""Train one pair: target, its continuations, drafter; write both checkpoints and a record."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .architectures import PAIRS, build_drafter, build_target
from .batches import Stream
from .checkpoint import load, round_to_bf16, save
from .corpus import load_tokenizer, load_tokens
from .drafters import train_drafter
from .experts import use_dense_experts
from .fused import use_fused_norms
from .schedule import Budget
from .targets import continuations, held_out_loss, train_target


@dataclass(frozen=True)
class Plan:
    """Limits of a training: optimizer steps, seconds, tokens per batch; rows that the target generates."""

    target_steps: int = 6000
    target_seconds: float = 235.0
    target_batch_tokens: int = 16384
    drafter_steps: int = 5000
    drafter_seconds: float = 190.0
    drafter_batch_tokens: int = 8192
    own_rows: int = 4096
    own_length: int = 320
    seed: int = 7


def facts_of(name: str, model: PreTrainedModel, budget: Budget) -> dict[str, Any]:
    """The record of a trained model; tied parameters count once."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"name": name, "parameters": parameters, "steps": budget.done, "seconds": round(budget.elapsed, 1)}


def train_pair(name: str, corpus: Path, out: Path, plan: Plan, device: str) -> dict[str, Any]:
    """Train a pair; write `<name>/`, its drafter's folder and `<name>.json` into `out`; return the record."""
    started = time.monotonic()
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = load_tokenizer(corpus)
    train, held = load_tokens(corpus)
    stream, scoring = Stream.of(train, device, plan.seed), Stream.of(held, device, plan.seed)
    target = build_target(name).to(device)
    budget = Budget(plan.target_steps, plan.target_seconds)
    target_losses = train_target(target, stream, budget, batch_tokens=plan.target_batch_tokens)
    round_to_bf16(target)
    save(target.cpu(), out / name, tokenizer)
    # Reload: without the training's replacements and hooks, and with the weights that engines will load.
    target = load(out / name, device=device)
    target.requires_grad_(False)
    use_fused_norms(target)
    use_dense_experts(target)
    target_held = held_out_loss(target, scoring, batches=4, count=8 if device == "cuda" else 1)
    print(f"{name}: held-out loss {target_held:.3f} after {budget.done} steps, {budget.elapsed:.0f} s", flush=True)

    own = continuations(target, stream, count=plan.own_rows, length=plan.own_length, seed=plan.seed)
    print(f"{name}: {own.numel()} tokens of own text at {time.monotonic() - started:.0f} s", flush=True)

    torch.manual_seed(plan.seed + 1)
    drafter = build_drafter(name).to(device)
    drafter_budget = Budget(plan.drafter_steps, plan.drafter_seconds)
    facts = train_drafter(
        drafter, target, stream, own, drafter_budget, batch_tokens=plan.drafter_batch_tokens, seed=plan.seed
    )
    round_to_bf16(drafter)
    save(drafter.cpu(), out / PAIRS[name], tokenizer)
    record: dict[str, Any] = {
        "plan": asdict(plan),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "target": {**facts_of(name, target, budget), "losses": target_losses, "held_out_loss": round(target_held, 4)},
        "drafter": {**facts_of(PAIRS[name], drafter, drafter_budget), "own_tokens": own.numel(), **facts},
        "seconds": round(time.monotonic() - started, 1),
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record
