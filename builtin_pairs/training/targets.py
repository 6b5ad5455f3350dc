"""Train a target on next-token loss, and generate continuations to train its drafter on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .batches import Stream, target_masks
from .experts import Balance, use_dense_experts
from .fused import use_fused_norms
from .schedule import Budget, optimizer, rate, update

PEAK = 3e-3
LONG_EVERY = 4
BALANCE_WEIGHT = 0.01


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The head's logits in fp32, soft-capped if the model does so."""
    logits = model.lm_head(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    capped: torch.Tensor = logits if cap is None else cap * torch.tanh(logits / cap)
    return capped


def forward(model: PreTrainedModel, rows: torch.Tensor, **options: Any) -> Any:
    """The decoder's output over whole rows, without a cache."""
    gemma = model.config.model_type == "gemma4_text"
    masks = target_masks(rows.shape[1], str(rows.device)) if gemma else None
    return model.model(input_ids=rows, attention_mask=masks, use_cache=False, **options)


def next_token_loss(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of next tokens."""
    logits = logits_of(model, forward(model, rows).last_hidden_state[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train_target(model: PreTrainedModel, stream: Stream, budget: Budget, *, batch_tokens: int) -> list[float]:
    """Train in place; return the loss of every hundredth step."""
    device = stream.tokens.device.type
    model.train()
    use_dense_experts(model)
    use_fused_norms(model)
    balance = Balance(model)
    adam = optimizer(model, PEAK)
    losses: list[float] = []
    for step in budget:
        length = 1536 if step % LONG_EVERY == LONG_EVERY - 1 else 512
        rows = stream.rows(max(1, batch_tokens // length), length)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = next_token_loss(model, rows)
            total = loss + BALANCE_WEIGHT * balance.loss()
        update(model, adam, total, PEAK * rate(step, budget.progress))
        if step % 100 == 0:
            losses.append(round(loss.item(), 4))
            print(f"target step {step} {budget.elapsed:.0f} s loss {losses[-1]}", flush=True)
    model.train(False)
    return losses


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: Stream, *, batches: int, count: int) -> float:
    """Mean next-token loss on the held-out modules."""
    return sum(next_token_loss(model, stream.rows(count, 512)).item() for _ in range(batches)) / batches


@torch.no_grad()
def continuations(model: PreTrainedModel, stream: Stream, *, count: int, length: int, seed: int) -> torch.Tensor:
    """Rows of `length` tokens: short starts of texts, continued by the target.

    Half are continued greedily and half sampled, at temperatures 0.6 and 1.0.
    """
    device = stream.tokens.device
    torch.manual_seed(seed)
    rows: list[torch.Tensor] = []
    for index, temperature in enumerate((0.0, 0.6, 0.0, 1.0)):
        prompt = stream.rows(max(1, count // 4), (24, 48, 96, 192)[index])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            cache, ids, step = None, prompt, prompt
            while ids.shape[1] < length:
                output = model.model(input_ids=step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = logits_of(model, output.last_hidden_state[:, -1])
                if temperature:
                    step = torch.multinomial((logits / temperature).softmax(-1), 1)
                else:
                    step = logits.argmax(-1, keepdim=True)
                ids = torch.cat([ids, step], 1)
        rows.append(ids)
    mixed = torch.cat(rows)
    return mixed[torch.randperm(mixed.shape[0], device=device)]
