"""Ends of the output inside drafts: length limits, stop ids, stop strings, EOS, and a full context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import ContextLengthError
from polydraft.verification import first_difference

from polydraft_conformance.bench import EOS_LIMIT
from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import expect, has_model_drafter, samples
from polydraft_conformance.counting import wrapped_sequences
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.scripted import ScriptedSequence
from polydraft_conformance.streams import Streamed, pick, stop_strings, streamed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_drafts_are_made", "test_drafts_are_accepted")
_NEW_TOKENS = 48


@check(scope="kind", after=_AFTER)
def test_length_limit_inside_a_draft(polydraft_bench: Bench) -> None:
    """max_new_tokens ends the output at just that token, wherever it falls in a round."""
    first = next(_cuts(polydraft_bench, lambda plain: list(range(len(plain.token_ids)))))
    for limit in range(1, 2 * polydraft_bench.case.k + 4):
        result = polydraft_bench.session.generate(first.prompt, **greedy_settings(limit))
        where = f"With max_new_tokens={limit}, k={polydraft_bench.case.k}"
        expect(
            len(result.token_ids) == limit,
            f"{where}: the length limit was missed inside a draft: {len(result.token_ids)} tokens came out, "
            f"{list(result.token_ids)}, not {list(first.plain.token_ids[:limit])}.",
        )
        # Drafts are cut short before the limit: other steps than without it, in which near ties may flip.
        polydraft_bench.same(
            first.plain.result,
            result,
            wrong=f"{where}: the limit changed the output.",
            length=limit,
            names=("plain", "limited"),
        )
        expect(result.finish_reason == "length", f"{where}: finish_reason is {result.finish_reason!r}, not 'length'.")


@check(scope="kind", after=_AFTER)
def test_stop_id_inside_a_draft(polydraft_bench: Bench) -> None:
    """A stop id ends the output with that token, wherever it falls in a round."""

    def usable(plain: Streamed) -> list[int]:
        return [index for index, token in enumerate(plain.token_ids) if plain.token_ids.index(token) == index]

    for cut in _cuts(polydraft_bench, usable):
        stop = cut.plain.token_ids[cut.index]
        result = polydraft_bench.session.generate(cut.prompt, stop_token_ids=[stop], **greedy_settings(_NEW_TOKENS))
        _expect_cut(cut, result, stop, f"Stop id {stop} (output token {cut.index})")


@check(scope="kind", after=(*_AFTER, "test_stop_id_inside_a_draft"))
def test_stop_string_inside_a_draft(polydraft_bench: Bench) -> None:
    """A stop string ends the text before its match, wherever it falls in a round and across two tokens."""

    def usable(plain: Streamed) -> list[int]:
        return [index for index in range(len(plain.token_ids)) if stop_strings(plain, index)]

    for cut in _cuts(polydraft_bench, usable):
        stops = stop_strings(cut.plain, cut.index)
        for stop in stops:
            settings = {**greedy_settings(_NEW_TOKENS), "stop": [stop]}
            result = polydraft_bench.session.generate(cut.prompt, **settings)
            where = f"Stop string {stop!r} (completed by output token {cut.index})"
            text = cut.plain.text[: cut.plain.text.index(stop)]
            expect(
                result.text == text,
                f"{where} was missed inside a draft: the text is {result.text!r}, not {text!r}.",
            )
            _expect_cut(cut, result, stop, where)
            if stop == stops[-1]:  # the text must be held back while it may become a match
                pieces = streamed(polydraft_bench.session, cut.prompt, **settings)
                expect(pieces.text == text, f"{where}: streamed, the text is {pieces.text!r}, not {text!r}.")


@check(scope="kind", after=(*_AFTER, "test_near_ties_as_rare_as_in_control"))
def test_eos_ends_the_output(polydraft_bench: Bench) -> None:
    """Output ends with the EOS token, as in plain decoding."""
    compared = 0
    for prompt, plain in polydraft_bench.ended_by_eos:
        result = polydraft_bench.session.generate(prompt, max_new_tokens=EOS_LIMIT)
        if not polydraft_bench.same(plain, result, wrong="EOS was missed inside a draft."):
            continue
        compared += 1
        expect(result.finish_reason == "eos", f"finish_reason is {result.finish_reason!r}, not 'eos'.")
        for name in ("text", "raw_text", "thinking", "tool_calls"):
            expect(getattr(result, name) == getattr(plain, name), f"The tokens are equal, but not the {name}.")
    polydraft_bench.numbers["outputs_ended_by_eos"] = compared
    if not compared:
        not_claimed("Near ties flip every output that EOS ends: in this precision the check proves nothing.")


@check(scope="kind", after=(*_AFTER, "test_eos_ends_the_output"), claims=has_model_drafter)
def test_eos_at_every_place_of_a_draft(polydraft_bench: Bench) -> None:
    """EOS as the first, .. the last draft and as the bonus token of a round: nothing comes out after it."""
    polydraft_bench.need_model_drafter()
    engine, k = polydraft_bench.engine, polydraft_bench.case.k
    plain = max((plain for _, plain in polydraft_bench.ended_by_eos), key=lambda result: len(result.token_ids))
    prompt = list(plain.prompt_token_ids)
    past_eos = polydraft_bench.plain(prompt, **greedy_settings(len(plain.token_ids) + k))
    truth = [*prompt, *past_eos.token_ids]
    for shift in range(k + 1):

        def wrap(inner: Any, shift: int = shift) -> ScriptedSequence:
            return ScriptedSequence(inner, truth, engine.tokenizer.vocab_size, lambda _round: k, first_length=shift)

        with wrapped_sequences(engine, wrap):
            result = polydraft_bench.session.generate(prompt, max_new_tokens=EOS_LIMIT)
        wrong = (
            f"EOS was missed inside a draft (drafts all right, shifted by {shift}): {len(result.token_ids)} tokens "
            f"came out, not {len(plain.token_ids)}."
        )
        if polydraft_bench.same(plain, result, wrong=wrong):
            reason = result.finish_reason
            expect(reason == "eos", f"finish_reason is {reason!r}, not 'eos' (shift {shift}).")


@check(scope="target", after=_AFTER, claims=samples("min_new_tokens"))
def test_min_new_tokens(polydraft_bench: Bench) -> None:
    """EOS is not chosen before min_new_tokens, not even in drafts, and the output stays that of plain decoding."""
    for _, first in polydraft_bench.ended_by_eos[:2]:
        least = len(first.token_ids) + 3
        settings: dict[str, Any] = {"max_new_tokens": least + 8, "min_new_tokens": least}
        prompt = list(first.prompt_token_ids)
        plain = polydraft_bench.session.generate(prompt, speculate="off", **settings)
        result = polydraft_bench.session.generate(prompt, **settings)
        expect(len(plain.token_ids) >= least, f"Plain decoding ended after {len(plain.token_ids)} of {least} tokens.")
        polydraft_bench.same(plain, result, wrong=f"min_new_tokens={least} is counted differently in drafts.")


@check(scope="target", after=_AFTER)
def test_full_context(polydraft_bench: Bench) -> None:
    """Output ends when the context is full, at the same token as plainly; a longer prompt is refused."""
    prompt = polydraft_bench.prompt(polydraft_bench.window + 8)
    plain = polydraft_bench.plain(prompt, **greedy_settings(_NEW_TOKENS))
    wanted = len(prompt) + 2 * polydraft_bench.case.k + 3
    with polydraft_bench.opened(context_length=wanted) as bench:
        length = bench.session.running.context_length
        expect(length == wanted, f"context_length={wanted} was asked for, it is {length}.")
        for speculate in ("off", "auto"):
            result = bench.session.generate(prompt, speculate=speculate, **greedy_settings(500))
            total = len(prompt) + len(result.token_ids)
            expect(
                total == length,
                f"speculate={speculate!r}: prompt and output are {total} tokens, the context is {length}.",
            )
            expect(result.finish_reason == "context", f"finish_reason is {result.finish_reason!r}, not 'context'.")
            bench.same(
                plain,
                result,
                wrong="The context's limit changed the output.",
                length=len(result.token_ids),
                names=("plain", "limited"),
            )
        try:
            bench.session.generate(bench.prompt(length + 1), max_new_tokens=1)
        except ContextLengthError:
            return
        raise AssertionError(f"A prompt of {length + 1} tokens was accepted, but the context is {length}.")


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place to end an output at: output token ``index`` of a prompt's plain stream."""

    prompt: list[int]
    plain: Streamed
    index: int


def _expect_cut(cut: _Cut, result: GenerationResult, stop: int | str, where: str) -> None:
    """The output ends with the token at the cut, by this stop id or string."""
    expect(
        result.token_ids == cut.plain.token_ids[: cut.index + 1],
        f"{where} was missed inside a draft: {len(result.token_ids)} tokens came out, not {cut.index + 1}.",
    )
    expect(
        (result.finish_reason, result.stop_match) == ("stop", stop),
        f"{where}: finish_reason and stop_match are {result.finish_reason!r} and {result.stop_match!r}.",
    )


def _cuts(bench: Bench, usable: Callable[[Streamed], list[int]]) -> Iterator[_Cut]:
    """Places to end an output at, some inside drafts and some at the ends of rounds.

    Args:
        bench: Its case's drafts are looked at.
        usable: Which output tokens of a plain stream can be ended at.

    Raises:
        AssertionError: None lies inside a draft: the check would prove nothing.
    """
    inside_count = outside_count = 0
    window, pair = bench.window, bench.case.pair
    # More than are needed at most: n-gram drafts repeat earlier tokens, and few tokens are new in the output.
    for length in (max(4, window // 2), *(window + 8 + 11 * number for number in range(16))):
        prompt = bench.prompt(length)
        plain = _stream(bench, ("plain stream", pair, length), prompt, speculate="off")
        speculative = _stream(bench, ("speculative stream", bench.case, length), prompt)
        bench.same(plain.result, speculative.token_ids, wrong="Speculation changed the streamed output.")
        # Up to a near tie the two are the same; and a stop changes no round before it.
        same = first_difference(plain.token_ids, speculative.token_ids)
        inside = speculative.inside_drafts()
        if all(chunk.num_accepted_tokens is None for chunk in speculative.chunks):
            inside = list(range(len(plain.token_ids)))  # not reported: any place may be inside a draft
        indices = [index for index in usable(plain) if same is None or index < same]
        mine = pick([index for index in indices if index in inside], 2 if bench.quick else 5)
        others = pick([index for index in indices if index not in inside], 1 if bench.quick else 3)
        inside_count += len(mine)
        outside_count += len(others)
        for index in sorted([*mine, *others]):
            yield _Cut(prompt, plain, index)
        if inside_count >= (2 if bench.quick else 4) and outside_count:
            return
    expect(inside_count > 0, "The check proves nothing: no place to end at lies inside an accepted draft.")


def _stream(bench: Bench, key: Hashable, prompt: list[int], **settings: Any) -> Streamed:
    return bench.suite.cache.once(
        key, lambda: streamed(bench.session, prompt, **settings, **greedy_settings(_NEW_TOKENS))
    )
