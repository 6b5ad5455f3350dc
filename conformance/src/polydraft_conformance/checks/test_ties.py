"""Tied logits: of equally likely tokens the lowest id is chosen, in every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polydraft_conformance.catalog import check, unchecked
from polydraft_conformance.claims import expect
from polydraft_conformance.counting import RowRecorder, stepping_engine, wrapped_sequences
from polydraft_conformance.evidence import greedy_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polydraft.contract.requests import Speculate
    from polydraft.verification import Logits

    from polydraft_conformance.bench import Bench


@check(
    scope="method",
    after=("test_generates", "test_greedy_equals_plain", "test_rows_equal_single_steps", "test_drafts_are_made"),
)
def test_ties_choose_the_lowest_id(polydraft_bench: Bench) -> None:
    """Of tokens with equal largest logits the lowest id is chosen, in plain steps and in every row of a draft.

    Proves: a logits processor rounds logits so coarsely that many are tied; every output token is the lowest id of its
    tied ones, recalculated from the engine's own row of logits.
    A failure means: ties are broken by the order of memory or of a sort, and differently in rows of several: plain and
    speculative outputs then differ where models are quantized coarsely.
    Look at: argmax over several rows (the last of equal values, a partition, a sort that is not stable).
    """
    claims = polydraft_bench.capabilities
    if stepping_engine(polydraft_bench.session) is None or not claims.exposes_logits:
        unchecked("Only a stepping engine's logits can be seen to be tied.")
    if "logits_processor" not in claims.sampling:
        unchecked("Tokens cannot be tied from outside: the backend does not claim logits_processor.")
    random = polydraft_bench.random("ties")
    grid = random.uniform(1.5, 3.0)
    settings = {**greedy_settings(40), "logits_processor": _rounded(grid)}
    ties: dict[str, int] = {}
    modes: tuple[Speculate, ...] = ("off", "auto")
    for speculate in modes:
        rows: dict[int, _Row] = {}
        prompt = polydraft_bench.prompt(max(3, polydraft_bench.window // 2), random.randint(0, 50))

        def keep(first: int, found: Logits, rows: dict[int, _Row] = rows) -> None:
            """A later step's row replaces an earlier one's."""
            rows.update((first + number, _Row(row.copy(), number, len(found))) for number, row in enumerate(found))

        with wrapped_sequences(polydraft_bench.engine, lambda inner, keep=keep: RowRecorder(inner, keep)):  # type: ignore[misc]
            result = polydraft_bench.session.generate(prompt, speculate=speculate, **settings)
        for position, token in enumerate(result.token_ids, len(prompt)):
            row = rows[position]
            tied = _tied(row.logits, grid)
            if tied is None:
                continue  # on an edge of the grid, where rounding decides
            place = f"in row {row.number} of a step of {row.count}"
            expect(
                token in tied,
                f"Token {token} is chosen {place}, which is not among the largest logits, {tied[:5]}: the processor's "
                "logits are not what is chosen from.",
            )
            expect(
                token == tied[0],
                f"Ties are not broken by the lowest id: token {token} is chosen {place} (speculate={speculate!r}), "
                f"with the same logit as {', '.join(map(str, tied[:5]))}.",
            )
            if len(tied) > 1:
                kind = "plain" if speculate == "off" else f"row {min(row.number, 1)}"
                ties[kind] = ties.get(kind, 0) + 1
    polydraft_bench.numbers["ties"] = ties
    expect(ties.get("plain", 0) > 0, "The check proves nothing: no two logits were tied.")


class _Row:
    """One row of logits, and where in its step it was."""

    def __init__(self, logits: Logits, number: int, count: int) -> None:
        self.logits, self.number, self.count = logits, number, count


def _rounded(grid: float) -> Callable[[Sequence[int], Any], Any]:
    """A pure processor that any array library can run: logits rounded to a grid."""

    def processor(_prefix_ids: Sequence[int], logits: Any) -> Any:
        # Not ``//``, which warns where a drafter's logits hold -inf.
        return (logits / grid).round()

    return processor


def _tied(row: Logits, grid: float) -> list[int] | None:
    """The ids with the largest rounded logit, the lowest first; None where one of them may lie on the other side."""
    scaled = row.astype(np.float64) / grid
    rounded = np.round(scaled)
    largest = rounded.max()
    # Just below or above the edge under the largest ones, or the one above them.
    near = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-3
    if (near & (scaled > largest - 1.0)).any():
        return None
    return [int(token) for token in np.flatnonzero(rounded == largest)]
