"""Gemma 4's MTP drafter ("assistant"): it attends to the target's KV and stores none.

Protocol: ``SinglePositionMultiTokenCandidateGenerator`` in Transformers' generation/candidate_generator.py. To draft
after the newest token x at position p: input = concat(target embedding of x, h), where h is the target's final-normed
hidden row of position p-1; position p for all steps of the round; K/V = the target's for positions before p. Each step
gives logits and the h of the next step. Unlike upstream no K/V row of a rejected draft is ever seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from polydraft.contract import Proposal, Sampler
from polydraft.errors import UnsupportedError
from torch import Tensor
from torch.nn import functional

from polydraft_transformers.decoder import Decoder
from polydraft_transformers.device_rounds import DeviceRounds
from polydraft_transformers.gemma4 import Caches, Context, Gemma4Network, is_gemma4
from polydraft_transformers.kv_cache import KvCache, StepLayout
from polydraft_transformers.sequence import TorchLogits, TransformersSequence
from polydraft_transformers.shared_caches import SharedCaches
from polydraft_transformers.step_choice import ClusteredHead, Kind, choose, noise_keys

__all__ = ["MtpDrafter", "MtpSequence"]


class MtpDrafter:
    """A loaded assistant for one target.

    Args:
        assistant: ``Gemma4AssistantForCausalLM`` or its unified twin.
        target: The target it drafts for.

    Raises:
        UnsupportedError: The assistant's layers are of an unknown architecture.
    """

    def __init__(self, assistant: Any, target: Decoder) -> None:
        if not is_gemma4(assistant.model):
            raise UnsupportedError(
                f"Drafters with layers of kind {type(assistant.model).__name__} are not supported.",
                "Choose a Gemma 4 assistant, or `drafter='ngram'`.",
            )
        self.assistant = assistant.requires_grad_(False)  # as in ``Decoder``
        self._target = target
        shared = int(getattr(target.config, "num_kv_shared_layers", 0) or 0)
        sources: dict[str, tuple[int, int]] = {}
        for index, kind in enumerate(target.layer_types[: len(target.layer_types) - shared]):
            attention = target.layers[index].self_attn  # the last layer of each kind that stores KV
            sources[kind] = (index, attention.k_proj.weight.shape[0] // attention.head_dim)
        self._sources = sources
        self.network = Gemma4Network(assistant.model, sources)
        self._weight: Tensor = assistant.lm_head.weight
        embedder = assistant.masked_embedding
        self._clusters = None if embedder is None else ClusteredHead(embedder, self._weight)
        # A target that was trained further may have more tokens than its assistant.
        self._missing_columns = target.lm_head.weight.shape[0] - self._weight.shape[0]

    def step(
        self, embedded: Tensor, hidden: Tensor, contexts: dict[str, Context], cache: Caches
    ) -> tuple[Tensor, Tensor]:
        """One draft from the target's embedding of the token before it and h, both (1, hidden_size of the target).

        Returns its logits (1, vocab) and the h of the next step. ``cache`` is the target's, with the step laid out.
        """
        row, following = self._rows(embedded, hidden, contexts, cache)
        logits = torch.mm(row, self._weight.t()) if self._clusters is None else self._clusters.logits(row)
        if self._missing_columns:
            logits = functional.pad(logits, (0, self._missing_columns), value=-torch.inf)
        return logits, following

    def steps(self, contexts: dict[str, Context], cache: KvCache) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        """The steps of a round: ``step`` from a token's id, (1,), and h; recorded where the target's are."""
        target = self._target
        if target.traced is None:
            return lambda token, hidden: self.step(target.embedding(token), hidden, contexts, cache)
        layers = [layer for layer, _ in self._sources.values()]
        masked = {kind: masks[0] is not None for kind, (_, _, masks) in contexts.items()}
        shared = [part for cos, sin, masks in contexts.values() for part in (cos, sin, *masks) if part is not None]
        shared += chain(*map(cache.attended, layers))

        def run(token: Tensor, hidden: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            # What is recorded keeps this function: it holds no cache and no tensor of this round.
            rest = iter(others)
            contexts: dict[str, Context] = {
                kind: (next(rest), next(rest), [next(rest) if has_mask else None]) for kind, has_mask in masked.items()
            }
            layout = StepLayout(hidden, -1, dict.fromkeys(masked), near=1)
            seen = {layer: (next(rest), next(rest)) for layer in layers}
            return self.step(target.embedding(token), hidden, contexts, target.new_cache().stand_in(layout, seen))

        traced = target.traced
        return lambda token, hidden: traced.run("draft", run, (token, hidden, *shared))

    def chosen_step(
        self,
        embedded: Tensor,
        hidden: Tensor,
        contexts: dict[str, Context],
        cache: Caches,
        choose_by: tuple[Tensor, Tensor, Kind],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``step`` for one row of each sequence, with choices by their positions' keys, the state, and their kind.

        Returns the drafts and their largest logits, (sequences,) each, and the h of the next step.
        """
        row, following = self._rows(embedded, hidden, contexts, cache)
        # Columns that only the target has are never drafted.
        columns = len(self._weight) + min(self._missing_columns, 0)
        if self._clusters is None:
            token, largest = choose(functional.linear(row, self._weight)[:, :columns], *choose_by)
        else:
            token, largest = self._clusters.choose(row, *choose_by, columns)
        return token, largest, following

    def _rows(
        self, embedded: Tensor, hidden: Tensor, contexts: dict[str, Context], cache: Caches
    ) -> tuple[Tensor, Tensor]:
        inputs = torch.mm(torch.cat([embedded, hidden], dim=-1), self.assistant.pre_projection.weight.t())
        row = self.network.layers(inputs, contexts, cache)
        return row, torch.mm(row, self.assistant.post_projection.weight.t())

    def draft(self, state: Tensor, hidden: Tensor, k: int, kind: Kind, cache: SharedCaches) -> tuple[Tensor, Tensor]:
        """Drafts of a round, recorded: see ``Drafting``."""
        at = state[:, 1].contiguous()
        # All steps of a round have one position and see the same keys: rotations and masks are made once.
        cache.begin_step(at)
        contexts = self.network.contexts(cache.layout, self._target.dtype)
        positions = at[:, None] + torch.arange(k, device=at.device)
        keys = noise_keys(state, positions.flatten()).view(-1, k, 2).transpose(0, 1).contiguous()
        token = state[:, 0]
        drafts: list[Tensor] = []
        largest: list[Tensor] = []
        for own_keys in keys:
            embedded = self._target.embedding(token)
            token, most, hidden = self.chosen_step(embedded, hidden, contexts, cache, (own_keys, state, kind))
            drafts.append(token)
            largest.append(most)
        return torch.stack(drafts, 1), torch.stack(largest, 1)


class MtpSequence(TransformersSequence):
    """A target's sequence for which an assistant drafts.

    Args:
        target: The target.
        drafter: Its assistant.
        chunk: Prompt tokens run in one forward; None: as the model likes it.
        lock: Held while a model runs.
        rounds: That it shares with other sequences of the pair; None: its own, if the model runs rounds.
    """

    def __init__(
        self,
        target: Decoder,
        drafter: MtpDrafter,
        chunk: int | None,
        lock: threading.Lock,
        rounds: DeviceRounds | None = None,
    ) -> None:
        self._drafter = drafter
        super().__init__(target, chunk, lock, rounds)

    def drafting(self) -> MtpDrafter:
        """The drafter."""
        return self._drafter

    def propose(self, newest: int, k: int, sampler: Sampler, *, keep_logits: bool = False) -> Proposal:
        """Draft k tokens; none where the hidden row before ``newest`` is not one of the last forward's."""
        position = self.length
        row = position - 1 - self._hidden_from
        if k < 1 or self._hidden is None or not 0 <= row < len(self._hidden):
            return Proposal([])
        drafts: list[Tensor] = []
        kept: list[Tensor] = []
        prefix = [newest]
        hidden = self._hidden[row : row + 1]
        ran = self._ran = None if keep_logits else self._run_round(newest, k, sampler, hidden, "drafting tokens")
        if ran is not None:
            ran.choice.drafted(position + 1, ran.largest[:k])
            return Proposal(ran.drafts[:k], verified=True)
        with self._computing("drafting tokens"):
            # One copy to the device for both; each has shape (1,).
            token, at = torch.tensor([[newest], [position]], device=hidden.device).unbind()
            # All steps of a round have one position and see the same keys: rotations and masks are made once.
            step: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
            if self.target.captures:
                step = partial(self._captured_step, at=at)
            else:
                step = self._drafter.steps(self._contexts(at, position, all_seen=True), self.cache)
            for index in range(k):
                logits, hidden = step(token, hidden)
                token = sampler.choose_draft(logits, position + 1 + index, prefix if sampler.needs_prefix else None)
                drafts.append(token)
                if sampler.needs_prefix:
                    prefix.append(int(token))
                if keep_logits:
                    kept.append(logits.clone())
            return Proposal(torch.cat(drafts).tolist(), TorchLogits(torch.cat(kept)) if kept else None)

    def _contexts(self, at: Tensor, span: int, *, all_seen: bool = False) -> dict[str, Context]:
        """Rotations and masks, which all steps of a round share."""
        # What is captured looks up no masks: it is for any position.
        self.cache.begin_step(at, span, all_seen=all_seen, first=span if all_seen else None)
        return self._drafter.network.contexts(self.cache.layout, self.target.dtype)

    def _captured_step(self, token: Tensor, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        span = self.cache.span_at(self.length)

        def draft(token: Tensor, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            return self._drafter.step(self.target.embedding(token), hidden, self._contexts(at, span), self.cache)

        inputs = token, hidden, at
        logits, hidden = self.cache.captured("draft", span, draft, *inputs)(*inputs)
        return logits, hidden
