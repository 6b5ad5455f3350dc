"""Greedy speculative decoding of one sequence, as simple as possible, for scoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, Gemma4AssistantForCausalLM, PreTrainedModel

from .architectures import SLIDING_WINDOW, F, S
from .targets import logits_of
from .tokenizer import STOP_IDS


@dataclass
class Outcome:
    """The tokens and statistics of one generation."""

    tokens: list[int] = field(default_factory=list)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted / rounds."""
        return 1 + self.accepted / max(1, self.rounds)


class Runner:
    """A model with a full-length cache in every layer, so that a rollback only crops it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.gemma = model.config.model_type == "gemma4_text"
        self.cache = DynamicCache()
        self.length = 0

    def run(self, tokens: list[int]) -> Any:
        """Append tokens; return the decoder's output for them."""
        ids = torch.tensor([tokens], device=self.model.device)
        query = torch.arange(self.length, self.length + len(tokens), device=ids.device)
        masks = None
        if self.gemma:
            distance = query[:, None] - torch.arange(self.length + len(tokens), device=ids.device)
            full = distance >= 0
            masks = {F: full[None, None], S: (full & (distance < SLIDING_WINDOW))[None, None]}
        options = {"return_shared_kv_states": True} if self.gemma else {}
        output = self.model.model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=query[None],
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        self.length += len(tokens)
        return output

    def choices(self, output: Any) -> list[int]:
        """The greedy choice after every token of the last run."""
        return logits_of(self.model, output.last_hidden_state)[0].argmax(-1).tolist()

    def cut(self, length: int) -> None:
        """Roll back to the first `length` tokens."""
        if length < self.length:
            self.cache.crop(length - self.length)
            self.length = length


class MtpDrafter:
    """A Gemma assistant, which has no cache."""

    def __init__(self, model: Gemma4AssistantForCausalLM) -> None:
        self.model = model

    def propose(self, tokens: list[int], k: int, target: Runner, output: Any, row: int) -> list[int]:
        """Draft `k` tokens after `tokens`.

        The last of `tokens` has not been run through the target yet; `row` is the last accepted row of its `output`.
        """
        position = len(tokens) - 1
        shared = {
            kind: (k_[:, :, :position], v_[:, :, :position]) for kind, (k_, v_) in output.shared_kv_states.items()
        }
        state = output.last_hidden_state[:, row : row + 1]
        token, drafts = tokens[-1], []
        for _ in range(k):
            embed = target.model.model.embed_tokens(torch.tensor([[token]], device=state.device))
            answer = self.model(
                inputs_embeds=torch.cat([embed, state], -1),
                position_ids=torch.tensor([[position]], device=state.device),
                shared_kv_states=shared,
            )
            state = answer.last_hidden_state
            token = int(answer.logits[0, -1].argmax())
            drafts.append(token)
        return drafts


class ModelDrafter:
    """Any model with the same tokens, with its own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.runner = Runner(model)

    def propose(self, tokens: list[int], k: int, target: Runner, output: Any, row: int) -> list[int]:
        """Run the tokens that are not in the cache yet, then draft one token at a time."""
        self.runner.cut(min(self.runner.length, len(tokens) - 1))
        pending, drafts = tokens[self.runner.length :], []
        for _ in range(k):
            token = self.runner.choices(self.runner.run(pending))[-1]
            drafts.append(token)
            pending = [token]
        # Drafts may be rejected: keep only accepted tokens in the cache.
        self.runner.cut(len(tokens))
        return drafts


Drafter = MtpDrafter | ModelDrafter


@torch.no_grad()
def decode(target: PreTrainedModel, drafter: Drafter | None, prompt: list[int], *, new_tokens: int, k: int) -> Outcome:
    """Greedy decoding; without a drafter plain, one token per round."""
    runner, outcome = Runner(target), Outcome()
    output = runner.run(prompt)
    tokens = [*prompt, runner.choices(output)[-1]]
    row, stop = len(prompt) - 1, len(prompt) + new_tokens
    while len(tokens) < stop and tokens[-1] not in STOP_IDS:
        drafts: list[int] = []
        if drafter is not None:
            drafts = drafter.propose(tokens, min(k, stop - len(tokens) - 1), runner, output, row)
        output = runner.run([tokens[-1], *drafts])
        choices = runner.choices(output)
        row = 0
        while row < len(drafts) and drafts[row] == choices[row]:
            row += 1
        outcome.rounds += 1
        outcome.drafted += len(drafts)
        emitted = choices[: row + 1]
        for index, token in enumerate(emitted):
            if token in STOP_IDS:
                emitted = emitted[: index + 1]
                break
        outcome.accepted += min(row, len(emitted))
        tokens += emitted
        runner.cut(len(tokens) - 1)
    outcome.tokens = tokens[len(prompt) :]
    return outcome
