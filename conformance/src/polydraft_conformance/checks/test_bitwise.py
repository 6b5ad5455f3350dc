"""``exactness="bitwise"``: steps of one fixed shape, so that speculation changes not one bit, in bfloat16 neither."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polydraft_conformance.bits import BitwiseRun, bits_of, bitwise_sessions, run_bitwise
from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import engine_of, expect, is_bitwise
from polydraft_conformance.comparison import expect_same
from polydraft_conformance.counting import stepping_engine
from polydraft_conformance.noise import context_of
from polydraft_conformance.primitives import greedy, logits_of, open_sequence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polydraft import Session
    from polydraft.contract import SteppingEngine

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

_AFTER = ("test_generates", "test_drafts_are_made", "test_greedy_equals_plain", "test_rollback_is_exact")
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 17}


@check(
    scope="kind",
    after=(*_AFTER, "test_seed_decides_the_output", "test_sample_equals_plain"),
    claims=is_bitwise,
    time_factor=4,
)
def test_bitwise_output_equals_plain(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_numbers: dict[str, Any]
) -> None:
    """Bitwise: greedy and seeded outputs are the plain ones, token by token; near ties do not count."""
    compared: dict[str, int] = {}
    for session, runs in _runs(polydraft_suite, polydraft_case, polydraft_numbers):
        for run in runs:
            expect_same(
                polydraft_suite,
                polydraft_case,
                session,
                run.plain.prompt_token_ids,
                run.plain.token_ids,
                run.speculative.token_ids,
                wrong=f"Bitwise exactness is broken in {session.running.dtype}: speculation changed the output "
                f"(prompt {run.prompt.place} of the window, {_said(run.settings)}).",
                settings=run.settings,
            )
            dtype = session.running.dtype
            compared[dtype] = compared.get(dtype, 0) + len(run.plain.token_ids)
    polydraft_numbers["tokens_compared"] = compared


@check(scope="kind", after=(*_AFTER, "test_bitwise_output_equals_plain"), claims=is_bitwise)
def test_bitwise_logits_equal_plain(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_numbers: dict[str, Any]
) -> None:
    """Bitwise: the logits that each token is chosen from are the plain ones, bit by bit."""
    compared: dict[str, int] = {}
    key = ("bitwise", polydraft_case)
    if key not in polydraft_suite.cache:
        for _ in _runs(polydraft_suite, polydraft_case, polydraft_numbers):
            pass
    polydraft_numbers["refused"] = polydraft_suite.cache[key].refused
    for dtype, runs in polydraft_suite.cache[key].runs.items():
        for run in runs:
            where = f"(prompt {run.prompt.place} of the window, {_said(run.settings)})"
            if polydraft_suite.cache[key].whole:
                _expect_same_logprobs(run, f"in {dtype} {where}")
                continue
            other = [place for place in run.positions if run.plain_bits.get(place) != run.speculative_bits.get(place)]
            expect(
                not other,
                f"Bitwise exactness is broken in {dtype}: the logits of {len(other)} of {len(run.positions)} tokens "
                f"have other bits with speculation, first for output token "
                f"{(other or [0])[0] - run.positions.start} {where}.",
            )
            compared[dtype] = compared.get(dtype, 0) + len(run.positions)
    polydraft_numbers["rows_compared"] = compared


@check(scope="target", after=(*_AFTER, "test_bitwise_logits_equal_plain"), claims=is_bitwise, time_factor=4)
def test_bitwise_rows_do_not_depend_on_their_place(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_numbers: dict[str, Any]
) -> None:
    """Bitwise: a position has the same logits in every row of a step, beside any other rows, and after a rollback."""
    text = context_of(polydraft_suite, polydraft_case, polydraft_session)
    window = polydraft_case.pair.window
    compared: dict[str, int] = {}
    for session in bitwise_sessions(polydraft_suite, polydraft_case, polydraft_numbers.setdefault("refused", {})):
        engine = engine_of(session)
        dtype, k = session.running.dtype, min(polydraft_case.k, engine.max_draft_tokens)
        for start in (max(1, window // 2), max(1, window - 2), 2 * window):
            found = dict(_in_every_row(engine, text, start, k))
            wanted = next(iter(found.values()))
            other = [place for place, bits in found.items() if bits != wanted]
            expect(
                not other,
                f"Bitwise exactness is broken in {dtype}: the logits at position {start + k} have other bits "
                f"{'; '.join(other)} (of {len(found)} ways; sliding window {window}).",
            )
            compared[dtype] = compared.get(dtype, 0) + len(found)
    polydraft_numbers["rows_compared"] = compared


def _in_every_row(engine: SteppingEngine, text: Sequence[int], start: int, k: int) -> Iterator[tuple[str, bytes]]:
    """The bits of the logits behind ``text[start + k]``: with its token in each row of a step of k+1, and otherwise."""
    vocab = engine.tokenizer.vocab_size
    sampler = greedy(engine)
    position = start + k
    fillers = {
        "the text's own": list(text[position + 1 : position + 1 + k]),
        "wrong": [(token + 1) % vocab for token in text[position + 1 : position + 1 + k]],
    }
    for row in range(k + 1):
        for name, behind in fillers.items():
            if row == k and name != "wrong":
                continue  # nothing is behind the last row
            with open_sequence(engine) as sequence:
                sequence.prefill(list(text[:start]), sampler)
                for token in text[start : position - row]:
                    sequence.verify([token], sampler)
                block = [*text[position - row : position + 1], *behind[: k - row]]
                logits = logits_of(sequence.verify(block, sampler, keep_logits=True))
                yield f"in row {row} of {k + 1}, behind it {name} tokens", bits_of(logits[row])
    with open_sequence(engine) as sequence:
        sequence.prefill(list(text[:start]), sampler)
        for token in text[start:position]:
            length = sequence.length
            sequence.verify([token, *fillers["wrong"]], sampler)
            sequence.rollback(length + 1)
        yield (
            "in a step of its own, after rollbacks",
            bits_of(logits_of(sequence.verify([text[position]], sampler, keep_logits=True))[0]),
        )


def _runs(suite: Suite, case: Case, numbers: dict[str, Any]) -> Iterator[tuple[Session, list[BitwiseRun]]]:
    """A session for each dtype, with its outputs; greedy, and sampled where a seed says what comes out."""
    settings: list[dict[str, Any]] = [{"temperature": 0.0}]
    if suite.capabilities is not None and suite.capabilities.seed_identical:
        settings.append(_SAMPLED)
    if suite.capabilities is not None and "logprobs" in suite.capabilities.sampling:
        settings[0]["logprobs"] = 1
    found = _Found(numbers.setdefault("refused", {}))
    for session in bitwise_sessions(suite, case, found.refused):
        expect(
            session.running.exactness == "bitwise",
            f"exactness='bitwise' was asked for, session.running says {session.running.exactness!r}.",
        )
        runs = run_bitwise(suite, case, session, stepping_engine(session), settings)
        found.runs[session.running.dtype] = runs
        found.whole = stepping_engine(session) is None
        drafted = [run.speculative.stats.num_draft_tokens for run in runs]
        expect(None in drafted or any(drafted), "The check shows nothing: no draft was made.")
        yield session, runs
    suite.cache["bitwise", case] = found


@dataclass
class _Found:
    """The outputs of a case's bitwise sessions."""

    refused: dict[str, str]
    """Dtype -> why the backend refused it."""
    runs: dict[str, list[BitwiseRun]] = field(default_factory=dict)
    """Dtype -> outputs."""
    whole: bool = False
    """Whether the engine is a whole one, which shows no logits."""


def _expect_same_logprobs(run: BitwiseRun, where: str) -> None:
    """What a whole engine shows of its logits."""
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


def _said(settings: dict[str, Any]) -> str:
    return f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
