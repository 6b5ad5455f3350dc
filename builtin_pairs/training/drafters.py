"""Train a Gemma drafter on its target's distribution, over the steps of the drafting protocol itself.

To draft after position p, the drafter gets the embedding of token p and the target's last hidden state of p - 1, uses
position p in every step of the round, and attends to the target's keys and values before p. From the second step on,
its own projected state replaces the target's. All positions of a row are rounds of one batch, separated by masks. The
tokens of a round are teacher-forced, as if the drafts were accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Gemma4AssistantForCausalLM, PreTrainedModel

from .batches import Stream, drafter_masks
from .centroids import cluster_loss, install, recall
from .experts import use_dense_experts
from .fused import use_fused_norms
from .schedule import Budget, optimizer, rate, update
from .targets import forward, logits_of

STEPS = 5
PEAK = 3e-3
DEAD_WEIGHT = 0.1
HARD_SHARE = 0.5
OWN_SHARE = 0.7
CLUSTER_FROM = 0.55
CLUSTER_WEIGHT = 0.5


@dataclass
class Rounds:
    """The target's outputs for a batch of rows, for the rounds at positions 1..count.

    Shapes: `embeds` and `hidden` (batch, length, hidden size), `wanted` (batch, length, vocab), `best` and `rows`
    (batch, length); `shared` holds keys and values per layer type.
    """

    embeds: torch.Tensor
    hidden: torch.Tensor
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]]
    wanted: torch.Tensor
    best: torch.Tensor
    rows: torch.Tensor
    count: int


@torch.no_grad()
def ask_target(target: PreTrainedModel, rows: torch.Tensor) -> Rounds:
    """One forward of the target over whole rows."""
    output = forward(target, rows, return_shared_kv_states=True)
    logits = logits_of(target, output.last_hidden_state)
    return Rounds(
        embeds=target.model.embed_tokens(rows),
        hidden=output.last_hidden_state,
        shared=dict(output.shared_kv_states),
        wanted=logits.softmax(-1),
        best=logits.argmax(-1),
        rows=rows,
        count=rows.shape[1] - STEPS,
    )


def draft_step(
    drafter: Gemma4AssistantForCausalLM, rounds: Rounds, step: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of every round: the hidden states for the head, and the projected state for the next step."""
    length = rounds.rows.shape[1]
    tokens = rounds.embeds[:, 1 + step : 1 + step + rounds.count]
    inputs = drafter.pre_projection(torch.cat([tokens, state.to(tokens.dtype)], -1))
    hidden = drafter.model(
        inputs_embeds=inputs,
        attention_mask=drafter_masks(length, rounds.count, str(inputs.device)),
        position_ids=torch.arange(1, rounds.count + 1, device=inputs.device)[None],
        shared_kv_states=rounds.shared,
        use_cache=False,
    ).last_hidden_state
    return hidden, drafter.post_projection(hidden)


def round_loss(
    drafter: Gemma4AssistantForCausalLM, rounds: Rounds, assigned: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over all steps, and how often each step's first choice is the target's, over live rounds.

    A round is alive while its tokens are the target's greedy choices; later steps have the weight `DEAD_WEIGHT`.
    """
    state = rounds.hidden[:, : rounds.count]
    alive = torch.ones(rounds.rows.shape[0], rounds.count, device=state.device)
    total = torch.zeros((), device=state.device)
    agreed: list[torch.Tensor] = []
    for step in range(STEPS):
        hidden, state = draft_step(drafter, rounds, step, state)
        window = slice(1 + step, 1 + step + rounds.count)
        wanted, best = rounds.wanted[:, window], rounds.best[:, window]
        scores = drafter.lm_head(hidden).float().log_softmax(-1)
        soft = -(wanted * scores).sum(-1)
        hard = -scores.gather(-1, best[..., None]).squeeze(-1)
        loss = (1 - HARD_SHARE) * soft + HARD_SHARE * hard
        if assigned is not None:
            hardened = (1 - HARD_SHARE) * wanted
            hardened = hardened.scatter_add(-1, best[..., None], torch.full_like(hardened[..., :1], HARD_SHARE))
            loss = loss + CLUSTER_WEIGHT * cluster_loss(drafter, hidden, hardened, assigned)
        weight = alive + DEAD_WEIGHT * (1 - alive)
        total = total + (loss * weight).sum() / weight.sum()
        hit = (scores.argmax(-1) == best).float()
        agreed.append((hit * alive).sum() / alive.sum().clamp(min=1))
        following = rounds.rows[:, 2 + step : 2 + step + rounds.count]
        if step + 1 < STEPS:
            alive = alive * (following == best).float()
    return total / STEPS, torch.stack(agreed).detach()


def plain_loss(drafter: PreTrainedModel, target: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """The mean loss of a plain model that drafts with its own cache."""
    with torch.no_grad():
        logits = logits_of(target, forward(target, rows).last_hidden_state)
    scores = logits_of(drafter, forward(drafter, rows).last_hidden_state).log_softmax(-1)
    soft = -(logits.softmax(-1) * scores).sum(-1).mean()
    hard = nn.functional.nll_loss(scores.flatten(0, 1), logits.argmax(-1).flatten())
    return (1 - HARD_SHARE) * soft + HARD_SHARE * hard


def train_drafter(
    drafter: Any,
    target: PreTrainedModel,
    stream: Stream,
    own: torch.Tensor,
    budget: Budget,
    *,
    batch_tokens: int,
    seed: int,
) -> dict[str, object]:
    """Train in place on the target's continuations and the corpus; return the losses and the centroids' recall."""
    mtp = isinstance(drafter, Gemma4AssistantForCausalLM)
    centroids = mtp and drafter.masked_embedding is not None
    device = stream.tokens.device.type
    generator = torch.Generator().manual_seed(seed)
    drafter.train()
    for model in (drafter, target):
        use_fused_norms(model)
        use_dense_experts(model)
    adam = optimizer(drafter, PEAK)
    assigned: torch.Tensor | None = None
    losses: list[float] = []
    for step in budget:
        if centroids and assigned is None and budget.progress > CLUSTER_FROM:
            assigned = install(drafter, seed=seed)
        if torch.rand((), generator=generator).item() < OWN_SHARE:
            chosen = torch.randint(0, own.shape[0], (max(1, batch_tokens // own.shape[1]),), generator=generator)
            rows = own[chosen.to(own.device)]
        else:
            length = 1024 if mtp and step % 3 == 0 else 512
            rows = stream.rows(max(1, batch_tokens // length), length)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if mtp:
                loss, agreed = round_loss(drafter, ask_target(target, rows), assigned)
            else:
                loss, agreed = plain_loss(drafter, target, rows), None
        update(drafter, adam, loss, PEAK * rate(step, budget.progress))
        if step % 100 == 0:
            losses.append(round(loss.item(), 4))
            shown = "" if agreed is None else f" agreed {[round(value, 3) for value in agreed.tolist()]}"
            print(f"drafter step {step} {budget.elapsed:.0f} s loss {losses[-1]}{shown}", flush=True)
    drafter.train(False)
    facts: dict[str, object] = {"losses": losses}
    if centroids:
        with torch.no_grad():
            rounds = ask_target(target, own[: max(1, batch_tokens // own.shape[1])])
            hidden, _ = draft_step(drafter, rounds, 0, rounds.hidden[:, : rounds.count])
            facts["centroid_recall"] = round(recall(drafter, hidden), 4)
    return facts
