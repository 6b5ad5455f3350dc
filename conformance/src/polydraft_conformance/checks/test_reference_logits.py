"""Logits of target and drafter equal those that the Transformers backend gives for the built-in pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from polydraft.verification import EPSILON, first_difference

from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import expect, exposes_logits
from polydraft_conformance.reference_logits import Rows, largest_gap, recorded, recorded_prompts, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polydraft_conformance.bench import Bench

_TOLERANCE = 512 * EPSILON["float32"]
"""Times the largest logit. Two implementations add in different orders: more noise than within one of them."""
_NOISE = 16
"""Times the engine's own noise, where that is larger: it is measured on a short context, by one processor's kernels. A
wrong position changes logits by hundreds of times as much."""


@check(scope="target", after=("test_generates",))
def test_prompt_tokens_equal_reference(polydraft_bench: Bench) -> None:
    """Texts and chats become the token ids that the Transformers backend makes of them, BOS once.

    Proves: Texts and chats become the same token ids as with Transformers, with one BOS.
    A failure means: The tokenizer or the chat template differs, or BOS is added twice or not at all.
    Look at: The plugin's tokenizer, and `polydraft.text.prompt_format.PromptFormat`, which adds BOS and lays out chats.
    """
    records = recorded_prompts(polydraft_bench.case)
    if not records:
        not_claimed(f"No prompts are recorded for {polydraft_bench.case.pair.name}.")
    for record in records:
        found = polydraft_bench.session.generate(record["prompt"], max_new_tokens=1).prompt_token_ids
        wanted = tuple(record["token_ids"])
        position = first_difference(wanted, found)
        expect(
            position is None,
            f"The prompt {str(record['prompt'])[:60]!r} becomes other tokens than recorded, from token {position} on: "
            f"{list(found)[position or 0 :][:8]}, not {list(wanted)[position or 0 :][:8]}.",
        )


@check(scope="target", after=("test_rows_equal_single_steps", "test_steps_equal_prefill"), claims=exposes_logits)
def test_target_logits_equal_reference(polydraft_bench: Bench) -> None:
    """The target's logits are those of the Transformers backend: the weights and the architecture are right.

    Proves: The target computes what another, independent implementation computes from the same weights.
    A failure means: Weights are read or the architecture is implemented wrongly, at the context length that the message
    names.
    Look at: If only long contexts fail: sliding window and rotary positions. If all do: norms, scaling, soft-caps,
    transposed or permuted weights.
    """
    worst = 0.0
    for record, rows in _compared(polydraft_bench):
        gap, bound = largest_gap(rows.target, record["target"]), _bound(polydraft_bench, record["target"])
        worst = max(worst, gap)
        expect(
            gap <= bound,
            f"The target's logits differ from the recorded ones by {gap:.3g} after {len(record['context'])} tokens; "
            f"rounding explains {bound:.3g} (sliding window {polydraft_bench.window}).",
        )
    polydraft_bench.numbers["largest_difference"] = worst


@check(scope="kind", after=("test_target_logits_equal_reference", "test_drafts_are_made"), claims=exposes_logits)
def test_drafter_logits_equal_reference(polydraft_bench: Bench) -> None:
    """The drafter's logits are those of the Transformers backend: it is given the right position and context.

    Proves: The drafter is given the right position, hidden state and keys and values, which acceptance alone hardly
    shows.
    A failure means: The drafter's input is wrong, from the draft on that the message names.
    Look at: The position of the newest token (`length`), the hidden row before it, and the keys and values that the
    drafter attends to.
    """
    polydraft_bench.need_model_drafter()
    worst = 0.0
    for record, rows in _compared(polydraft_bench):
        if rows.drafter is None:
            not_claimed("The engine's drafter gives no logits.")
        for index, row in enumerate(record["drafter"]):
            gap, bound = largest_gap(rows.drafter[index], row), _bound(polydraft_bench, row)
            worst = max(worst, gap)
            expect(
                gap <= bound,
                f"The drafter's logits for draft {index + 1} differ from the recorded ones by {gap:.3g} after "
                f"{len(record['context'])} tokens; rounding explains {bound:.3g}. Its position, its keys and "
                f"values, or the hidden state it is given are wrong.",
            )
            if index >= len(rows.drafts) or rows.drafts[index] != record["drafts"][index]:
                break  # a tie chosen otherwise: later rows follow another token
    polydraft_bench.numbers["largest_difference"] = worst


def _compared(bench: Bench) -> Iterator[tuple[dict[str, Any], Rows]]:
    """Each record with what the engine computes after the same context."""
    if bench.session.running.dtype.rpartition(".")[2] != "float32":
        not_claimed("Logits are recorded in float32, and the session runs in another dtype.")
    records = recorded(bench.case)
    if not records:
        not_claimed(f"No logits are recorded for {bench.case.pair.name} with {bench.case.drafter}.")
    for record in records:
        k = min(len(record["drafter"]), bench.engine.max_draft_tokens)
        yield record, rows_of(bench.engine, record["context"], k)


def _bound(bench: Bench, record: dict[str, Any]) -> float:
    return max(_TOLERANCE * float(np.abs(record["logits"]).max()), _NOISE * bench.noise.most)
