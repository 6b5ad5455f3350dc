"""Measure acceptance on the shipped prompts, and compare it with Transformers' own loop."""

from __future__ import annotations

import json
import platform
import time
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .architectures import DEFAULT_K, LLAMA, PAIRS, SHAPES
from .checkpoint import load
from .corpus import load_tokenizer
from .package import DATA, ROOT
from .prompts import prompt_ids
from .protocol import Drafter, ModelDrafter, MtpDrafter, Outcome, decode
from .tokenizer import STOP_IDS

SCORES = ROOT / "scores.json"
CROSS_CHECKED = ("text-00", "text-02", "text-03", "text-07", "chat-00", "chat-03")


def ratio(outcomes: list[Outcome]) -> dict[str, Any]:
    """Averages over prompts, without those whose answer ended with its first token and so had no rounds."""
    lengths = [outcome.mean_acceptance_length for outcome in outcomes if outcome.rounds]
    rounds = sum(outcome.rounds for outcome in outcomes)
    accepted = sum(outcome.accepted for outcome in outcomes)
    return {
        "mean_acceptance_length": round(sum(lengths) / len(lengths), 3),
        "pooled_acceptance_length": round(1 + accepted / rounds, 3),
        "lowest": round(min(lengths), 3),
        "highest": round(max(lengths), 3),
        "acceptance_rate": round(accepted / sum(outcome.drafted for outcome in outcomes), 3),
        "prompts": len(lengths),
        "tokens": sum(len(outcome.tokens) for outcome in outcomes),
        "rounds": rounds,
    }


def measure(
    target: PreTrainedModel, drafter: Any, prompts: dict[str, list[int]], new_tokens: int, k: int
) -> dict[str, Outcome]:
    """Decode every prompt greedily with the drafter."""
    outcomes: dict[str, Outcome] = {}
    for name, ids in prompts.items():
        mtp = drafter.config.model_type == "gemma4_assistant"
        one: Drafter = MtpDrafter(drafter) if mtp else ModelDrafter(drafter)
        outcomes[name] = decode(target, one, ids, new_tokens=new_tokens, k=k)
    return outcomes


def upstream(target: Any, drafter: Any, ids: list[int], new_tokens: int) -> Outcome:
    """Decode with `generate(assistant_model=)`; rounds are the target's forwards after the prefill."""
    forwards: list[int] = []
    hook = target.register_forward_hook(lambda *_: forwards.append(1))
    answer = target.generate(
        torch.tensor([ids], device=target.device),
        assistant_model=drafter,
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        max_new_tokens=new_tokens,
        eos_token_id=list(STOP_IDS),
    )
    hook.remove()
    tokens = answer[0, len(ids) :].tolist()
    return Outcome(tokens=tokens, rounds=len(forwards) - 1, accepted=len(tokens) - len(forwards))


def agreement(outcomes: dict[str, Outcome], plain: dict[str, Outcome]) -> int:
    """Number of prompts whose speculative output equals the plain one."""
    return sum(outcomes[name].tokens == plain[name].tokens for name in plain)


def score_pair(name: str, prompts: dict[str, list[int]], new_tokens: int, device: str) -> dict[str, Any]:
    """Score one pair with our loop, per kind of prompt, and compare with plain decoding and Transformers."""
    target, drafter = load(DATA / name, device=device), load(DATA / PAIRS[name], device=device)
    plain = {key: decode(target, None, ids, new_tokens=new_tokens, k=0) for key, ids in prompts.items()}
    outcomes = measure(target, drafter, prompts, new_tokens, DEFAULT_K)
    scores: dict[str, Any] = {
        "drafter": PAIRS[name],
        **ratio(list(outcomes.values())),
        "same_as_plain": agreement(outcomes, plain),
        "ended_by_stop_token": sum(outcome.tokens[-1] in STOP_IDS for outcome in plain.values()),
        **{kind: ratio([one for key, one in outcomes.items() if key.startswith(kind)]) for kind in ("text", "chat")},
        "first_32_tokens": ratio(list(measure(target, drafter, prompts, 32, DEFAULT_K).values())),
        "by_k": {
            str(k): ratio(list(measure(target, drafter, prompts, new_tokens, k).values()))["mean_acceptance_length"]
            for k in (1, 2, 8)
        },
    }
    chosen = [key for key in CROSS_CHECKED if key in prompts]
    theirs = {key: upstream(target, drafter, prompts[key], new_tokens) for key in chosen}
    scores["transformers_generate"] = {
        "prompts": len(theirs),
        "mean_acceptance_length": mean_length(theirs),
        "ours_on_the_same": mean_length({key: outcomes[key] for key in theirs}),
        "same_tokens_as_plain": agreement(theirs, {key: plain[key] for key in theirs}),
    }
    return scores


def mean_length(outcomes: dict[str, Outcome]) -> float:
    """Acceptance length averaged over prompts."""
    lengths = [outcome.mean_acceptance_length for outcome in outcomes.values() if outcome.rounds]
    return round(sum(lengths) / len(lengths), 3)


@torch.no_grad()
def score_all(*, new_tokens: int, device: str, threads: int) -> None:
    """Score every pair, and the other models as draft models of tiny-31b; write `scores.json`."""
    torch.set_num_threads(threads)
    started = time.monotonic()
    tokenizer = load_tokenizer(DATA / LLAMA)
    records = ROOT / "training" / "records"
    listed = json.loads((DATA.parent / "prompts.json").read_text(encoding="utf-8"))
    prompts = {prompt["id"]: prompt_ids(tokenizer, prompt) for prompt in listed}
    result: dict[str, Any] = {
        "k": DEFAULT_K,
        "new_tokens": new_tokens,
        "prompts": len(prompts),
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pairs": {},
        "draft_model": {},
        "samples": {},
        "training": {name: json.loads((records / f"{name}.json").read_text(encoding="utf-8")) for name in PAIRS},
    }
    for name in PAIRS:
        result["pairs"][name] = score_pair(name, prompts, new_tokens, device)
        print(name, json.dumps(result["pairs"][name]), flush=True)
    target = load(DATA / "tiny-31b", device=device)
    few = dict(list(prompts.items())[::3])
    for name in (*SHAPES, LLAMA, PAIRS[LLAMA]):
        if name != "tiny-31b":
            outcomes = measure(target, load(DATA / name, device=device), few, new_tokens, DEFAULT_K)
            result["draft_model"][f"tiny-31b drafted by {name}"] = ratio(list(outcomes.values()))
    for name in PAIRS:
        model = load(DATA / name, device=device)
        for key in ("text-02", "text-04", "text-16", "chat-00", "chat-03", "chat-05"):
            tokens = decode(model, None, prompts[key], new_tokens=64, k=0).tokens
            result["samples"][f"{name} {key}"] = tokenizer.decode(tokens, skip_special_tokens=False)
    result["seconds"] = round(time.monotonic() - started, 1)
    SCORES.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
