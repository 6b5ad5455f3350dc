"""``exactness="bitwise"``: steps of one fixed shape, so that speculation changes no bit, even in bfloat16."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft.verification import GreedySampler

from polydraft_conformance.bits import BitwiseRun, bits_of, bitwise_sessions, run_bitwise
from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import expect, is_bitwise
from polydraft_conformance.counting import stepping_engine
from polydraft_conformance.primitives import logits_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from polydraft.contract import SteppingEngine

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_drafts_are_made", "test_greedy_equals_plain", "test_rollback_is_exact")
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 17}


@dataclass
class _Runs:
    """The outputs of a case's bitwise sessions."""

    refused: dict[str, str] = field(default_factory=dict)
    """Dtype -> why the backend refused it."""
    by_dtype: dict[str, list[BitwiseRun]] = field(default_factory=dict)
    whole: bool = False
    """Whether the engine is a whole one, which shows no logits."""


@check(
    scope="kind",
    after=(*_AFTER, "test_seed_decides_the_output", "test_sample_equals_plain"),
    claims=is_bitwise,
    time_factor=4,
)
def test_bitwise_output_equals_plain(polydraft_bench: Bench) -> None:
    """Bitwise: greedy and seeded outputs are the plain ones, token by token; near ties do not count.

    Proves: In sessions with `exactness="bitwise"`, in the suite's dtype and in bfloat16, speculation changes no token,
    greedy or sampled with a seed. There is no tolerance.
    A failure means: A step with drafts computes other logits than a step with one token, and a close choice came out
    differently.
    Look at: What decides the shape of a step: padding to k+1 rows, the length of the key-value buffers, kernels chosen
    by size, experts whose rows depend on one another.
    """
    compared: dict[str, int] = {}
    made = polydraft_bench.suite.cache.once(("bitwise", polydraft_bench.case), lambda: _make(polydraft_bench))
    polydraft_bench.numbers["refused"] = made.refused
    _need_a_session(made.by_dtype, made.refused)
    for dtype, runs in made.by_dtype.items():
        for run in runs:
            expect(not run.difference, run.difference)
        compared[dtype] = sum(len(run.plain.token_ids) for run in runs)
    polydraft_bench.numbers["tokens_compared"] = compared


@check(scope="kind", after=(*_AFTER, "test_bitwise_output_equals_plain"), claims=is_bitwise)
def test_bitwise_logits_equal_plain(polydraft_bench: Bench) -> None:
    """Bitwise: the logits that each token is chosen from are the plain ones, bit by bit.

    Proves: The tokens are equal because the logits are, not because no choice was close. Of a whole engine, which shows
    no logits, log-probabilities are compared.
    A failure means: A position's logits depend on how many tokens its step had, or on which they were.
    Look at: As for `test_bitwise_output_equals_plain`. The message names the first output token whose bits differ.
    """
    compared: dict[str, int] = {}
    made = polydraft_bench.suite.cache.once(("bitwise", polydraft_bench.case), lambda: _make(polydraft_bench))
    polydraft_bench.numbers["refused"] = made.refused
    _need_a_session(made.by_dtype, made.refused)
    for dtype, runs in made.by_dtype.items():
        for run in runs:
            if made.whole:
                _expect_same_logprobs(run, f"in {dtype} {run.place}")
                continue
            other = [place for place in run.positions if run.plain_bits.get(place) != run.speculative_bits.get(place)]
            expect(
                not other,
                f"Bitwise exactness is broken in {dtype}: the logits of {len(other)} of {len(run.positions)} tokens "
                f"have other bits with speculation, first for output token "
                f"{(other or [0])[0] - run.positions.start} {run.place}.",
            )
            compared[dtype] = compared.get(dtype, 0) + len(run.positions)
    polydraft_bench.numbers["rows_compared"] = compared


@check(scope="target", after=(*_AFTER, "test_bitwise_logits_equal_plain"), claims=is_bitwise, time_factor=4)
def test_bitwise_rows_do_not_depend_on_their_place(polydraft_bench: Bench) -> None:
    """Bitwise: a position has the same logits in every row of a step, next to any other rows, and after a rollback.

    Proves: A position may be any row of a step, next to right or wrong drafts, before or after a rollback, and its bits
    stay the same. Drafts that happen to be placed well cannot hide a dependence.
    A failure means: Rows influence each other, or a kernel treats the last row of a step differently.
    Look at: Matrix products that split by the number of rows, attention over padding, experts that are sorted or
    grouped by token, and what a rollback leaves in the buffers.
    """
    text, window = polydraft_bench.context, polydraft_bench.window
    compared: dict[str, int] = {}
    refused = polydraft_bench.numbers.setdefault("refused", {})
    for bench in bitwise_sessions(polydraft_bench, refused):
        dtype, k = bench.session.running.dtype, bench.k
        starts = (max(1, window // 2), max(1, window - 2), 2 * window)
        for start in starts[1:] if bench.quick else starts:
            found = dict(_in_every_row(bench.engine, text, start, k))
            wanted = next(iter(found.values()))
            other = [place for place, bits in found.items() if bits != wanted]
            expect(
                not other,
                f"Bitwise exactness is broken in {dtype}: the logits at position {start + k} have other bits "
                f"{'; '.join(other)} (of {len(found)} ways; sliding window {window}).",
            )
            compared[dtype] = compared.get(dtype, 0) + len(found)
    _need_a_session(compared, refused)
    polydraft_bench.numbers["rows_compared"] = compared


def _need_a_session(made: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """The check is not claimed where every dtype was refused on this device."""
    if not made:
        not_claimed("; ".join(f"{dtype} is refused on this device: {reason}" for dtype, reason in refused.items()))


def _in_every_row(engine: SteppingEngine, text: Sequence[int], start: int, k: int) -> Iterator[tuple[str, bytes]]:
    """The bits of the logits after ``text[start + k]``: its token in each row of a step of k+1, and in other ways."""
    vocab = engine.tokenizer.vocab_size
    sampler = GreedySampler(engine)
    position = start + k
    fillers = {
        "the text's own": list(text[position + 1 : position + 1 + k]),
        "wrong": [(token + 1) % vocab for token in text[position + 1 : position + 1 + k]],
    }
    for row in range(k + 1):
        for name, following in fillers.items():
            if row == k and name != "wrong":
                continue  # nothing follows the last row
            with closing(engine.open_sequence()) as sequence:
                sequence.prefill(list(text[:start]), sampler)
                for token in text[start : position - row]:
                    sequence.verify([token], sampler)
                block = [*text[position - row : position + 1], *following[: k - row]]
                logits = logits_of(sequence.verify(block, sampler, keep_logits=True))
                yield f"in row {row} of {k + 1}, followed by {name} tokens", bits_of(logits[row])
    with closing(engine.open_sequence()) as sequence:
        sequence.prefill(list(text[:start]), sampler)
        for token in text[start:position]:
            length = sequence.length
            sequence.verify([token, *fillers["wrong"]], sampler)
            sequence.rollback(length + 1)
        logits = logits_of(sequence.verify([text[position]], sampler, keep_logits=True))
        yield "in a separate step, after rollbacks", bits_of(logits[0])


def _make(bench: Bench) -> _Runs:
    """The outputs of a session in each dtype: greedy, and sampled where a seed decides the sample."""
    settings: list[dict[str, Any]] = [{"temperature": 0.0}]
    if bench.capabilities.seed_identical:
        settings.append(_SAMPLED)
    if "logprobs" in bench.capabilities.sampling:
        settings[0]["logprobs"] = 1
    made = _Runs()
    for other in bitwise_sessions(bench, made.refused):
        running = other.session.running
        expect(
            running.exactness == "bitwise",
            f"exactness='bitwise' was asked for, but session.running says {running.exactness!r}.",
        )
        runs = run_bitwise(other, settings)
        made.by_dtype[running.dtype] = runs
        made.whole = stepping_engine(other.session) is None
        drafted = [run.speculative.stats.num_draft_tokens for run in runs]
        expect(None in drafted or any(drafted), "The check proves nothing: no draft was made.")
    return made


def _expect_same_logprobs(run: BitwiseRun, where: str) -> None:
    """The logits that a whole engine shows."""
    if run.plain.logprobs is None or run.speculative.logprobs is None:
        if run.settings.get("logprobs") is None:
            return
        not_claimed("The engine shows neither logits nor log-probabilities.")
    for index, (left, right) in enumerate(zip(run.plain.logprobs, run.speculative.logprobs, strict=True)):
        expect(
            left == right,
            f"Bitwise exactness is broken {where}: the log-probability of output token {index} is {right.logprob!r} "
            f"with speculation, {left.logprob!r} plainly.",
        )
