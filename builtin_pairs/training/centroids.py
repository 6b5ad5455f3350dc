"""The centroid head: a balanced clustering of the head's rows, and centroids trained to pick the right clusters."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Gemma4AssistantForCausalLM
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantMaskedEmbedder


def balanced_clusters(rows: torch.Tensor, clusters: int, *, rounds: int = 12, seed: int = 0) -> torch.Tensor:
    """The cluster of every row; all clusters have the same size.

    Lloyd's algorithm with a capacity: the closest (row, cluster) pairs are matched first.
    """
    rows = nn.functional.normalize(rows.detach().float().cpu(), dim=1)
    count, capacity = rows.shape[0], rows.shape[0] // clusters
    if capacity * clusters != count:
        raise ValueError(f"{count} rows do not divide into {clusters} clusters")
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(count, generator=generator)[:clusters]]
    assigned = torch.zeros(count, dtype=torch.long)
    for _ in range(rounds):
        order = (rows @ centres.T).flatten().argsort(descending=True).tolist()
        taken, room, left = [-1] * count, [capacity] * clusters, count
        for pair in order:
            row, cluster = divmod(pair, clusters)
            if taken[row] < 0 and room[cluster]:
                taken[row] = cluster
                room[cluster] -= 1
                left -= 1
                if not left:
                    break
        assigned = torch.tensor(taken)
        sums = torch.zeros_like(centres).index_add_(0, assigned, rows)
        centres = nn.functional.normalize(sums, dim=1)
    return assigned


def centroid_head(model: Gemma4AssistantForCausalLM) -> Gemma4AssistantMaskedEmbedder:
    """The drafter's centroid head; raises `ValueError` for a dense head."""
    if model.masked_embedding is None:
        raise ValueError("this drafter has no centroid head")
    return model.masked_embedding


def install(model: Gemma4AssistantForCausalLM, *, seed: int = 0) -> torch.Tensor:
    """Cluster the head's rows, write `token_ordering`, and set the centroids to the clusters' means.

    Returns the cluster of every token, for `cluster_loss`.
    """
    head = centroid_head(model)
    weight = model.lm_head.weight
    assigned = balanced_clusters(weight, head.num_centroids, seed=seed).to(weight.device)
    with torch.no_grad():
        head.token_ordering.copy_(assigned.argsort(stable=True))
        sums = torch.zeros_like(head.centroids.weight).index_add_(0, assigned, weight)
        head.centroids.weight.copy_(sums / head.vocab_size_per_centroid)
    return assigned


def cluster_loss(
    model: Gemma4AssistantForCausalLM, hidden: torch.Tensor, wanted: torch.Tensor, assigned: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy per row of the centroids' scores against the wanted probability of each cluster."""
    head = centroid_head(model)
    scores = head.centroids(hidden).float().log_softmax(-1)
    mass = torch.zeros(*wanted.shape[:-1], head.num_centroids, device=wanted.device, dtype=wanted.dtype)
    mass = mass.index_add_(-1, assigned, wanted)
    loss: torch.Tensor = -(mass * scores).sum(-1)
    return loss


def recall(model: Gemma4AssistantForCausalLM, hidden: torch.Tensor) -> float:
    """How often the selected clusters contain the dense head's first choice."""
    head = centroid_head(model)
    clusters = head.token_ordering.argsort() // head.vocab_size_per_centroid
    best = model.lm_head(hidden).argmax(-1)
    selected = head.centroids(hidden).topk(head.centroid_intermediate_top_k, dim=-1).indices
    return float((selected == clusters[best][..., None]).any(-1).float().mean())
