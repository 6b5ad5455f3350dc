"""Ends of the output inside drafts: length limits, stop ids, stop strings, EOS, and a full context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.errors import ContextLengthError
from polydraft.verification import first_difference

from polydraft_conformance.bench import EOS_LIMIT
from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import expect, has_model_drafter, samples
from polydraft_conformance.counting import stepping_engine, wrapped_sequences
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.scripted import ScriptedSequence
from polydraft_conformance.signals import ModelsDoNotSuit
from polydraft_conformance.streams import Streamed, pick, stop_strings, streamed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_drafts_are_made", "test_drafts_are_accepted")
_NEW_TOKENS = 48


@check(scope="kind", after=_AFTER)
def test_length_limit_inside_a_draft(polydraft_bench: Bench) -> None:
    """max_new_tokens ends the output at just that token, wherever it falls in a round.

    Proves: For every limit from 1 to two rounds and a bit, exactly so many tokens come out, and they are the first ones
    of the unlimited output.
    A failure means: Accepted drafts past the limit are emitted, a round near the limit is dropped, or a shorter last
    round computes other tokens.
    Look at: How a whole engine counts tokens and calls `Generation.emit`; how a stepping engine runs steps of fewer
    than k+1 tokens.
    """
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
    """A stop id ends the output with that token, wherever it falls in a round.

    Proves: A stop id ends the output at its first occurrence, whether it was an accepted draft, the last draft or a
    bonus token.
    A failure means: The stop was noticed only at the end of a round, so that the drafts after it came out as well; or
    the reason given for the end is wrong.
    Look at: `Generation.emit`, which cuts a round at its end. If the engine looks for stops itself, whether it does so
    for each token of a round.
    """

    def usable(plain: Streamed) -> list[int]:
        return [index for index, token in enumerate(plain.token_ids) if plain.token_ids.index(token) == index]

    for cut in _cuts(polydraft_bench, usable):
        stop = cut.plain.token_ids[cut.index]
        result = polydraft_bench.session.generate(cut.prompt, stop_token_ids=[stop], **greedy_settings(_NEW_TOKENS))
        _expect_cut(
            polydraft_bench, cut.plain.result, cut.index, result, stop, f"Stop id {stop} (output token {cut.index})"
        )


@check(scope="kind", after=(*_AFTER, "test_stop_id_inside_a_draft"))
def test_stop_string_inside_a_draft(polydraft_bench: Bench) -> None:
    """A stop string ends the text before its match, wherever it falls in a round and across two tokens.

    Proves: The text ends just before the match, also where the match begins in one token and ends in another, and
    streams never show text that belongs to a match.
    A failure means: A match was missed inside a round or across its edge, or text was given out that should have been
    held back.
    Look at: `Generation.emit`, and `Tokenizer.token_bytes`, from which the core makes the text. Whether the engine also
    looks for stops, by other rules.
    """

    def usable(plain: Streamed) -> list[int]:
        return [index for index in range(len(plain.token_ids)) if stop_strings(plain, index)]

    for cut in _cuts(polydraft_bench, usable):
        stops = stop_strings(cut.plain, cut.index)
        for stop in stops:
            settings = {**greedy_settings(_NEW_TOKENS), "stop": [stop]}
            result = polydraft_bench.session.generate(cut.prompt, **settings)
            where = f"Stop string {stop!r} (completed by output token {cut.index})"
            text = cut.plain.text[: cut.plain.text.index(stop)]
            if not _expect_cut(polydraft_bench, cut.plain.result, cut.index, result, stop, where):
                continue
            expect(
                result.text == text,
                f"{where} was missed inside a draft: the text is {result.text!r}, not {text!r}.",
            )
            if stop == stops[-1]:  # the text must be held back while it may become a match
                pieces = streamed(polydraft_bench.session, cut.prompt, **settings)
                if _expect_cut(
                    polydraft_bench, cut.plain.result, cut.index, pieces.result, stop, f"{where}, streamed,"
                ):
                    expect(pieces.text == text, f"{where}: streamed, the text is {pieces.text!r}, not {text!r}.")


@check(scope="kind", after=(*_AFTER, "test_near_ties_as_rare_as_in_control"))
def test_eos_ends_the_output(polydraft_bench: Bench) -> None:
    """Output ends with the EOS token, as in plain decoding.

    Proves: Where plain decoding ends by itself, speculation ends at the same token, with the same text, thinking and
    tool calls.
    A failure means: An EOS inside a draft was passed over, or the reason given for the end is wrong. With "proves
    nothing": none of the target's answers ends by itself.
    Look at: `Tokenizer.eos_token_ids`, and `TokenRequest.eos_token_ids`, which a whole engine must use.
    """
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
    """EOS as the first, .. the last draft and as the bonus token of a round: nothing comes out after it.

    Proves: Drafts are placed such that EOS is the first, each further and the last draft of a round, and the bonus
    token: nothing comes out after it.
    A failure means: In the round that the message names, tokens after EOS were emitted, or the output changed.
    Look at: `EngineSequence.verify` and `rollback` for steps that end the output; nothing may depend on what follows
    EOS.
    """
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
    """EOS is not chosen before min_new_tokens, not even in drafts, and the output stays that of plain decoding.

    Proves: EOS is suppressed up to the minimum, with and without speculation, counted in tokens and not in rounds.
    A failure means: The output ended too early, or drafts were made under other rules than the target's choices.
    Look at: A stepping engine gets this from `Sampler.choose`, given the right `first_position`. A whole engine: how it
    translates `min_new_tokens`.
    """
    for _, first in polydraft_bench.ended_by_eos[:2]:
        least = len(first.token_ids) + 3
        settings: dict[str, Any] = {"max_new_tokens": least + 8, "min_new_tokens": least}
        prompt = list(first.prompt_token_ids)
        plain = polydraft_bench.session.generate(prompt, speculate="off", **settings)
        result = polydraft_bench.session.generate(prompt, **settings)
        for name, found in (("Plain decoding", plain), ("Speculation", result)):
            expect(len(found.token_ids) >= least, f"{name} ended after {len(found.token_ids)} of {least} tokens.")
        polydraft_bench.same(plain, result, wrong=f"min_new_tokens={least} is counted differently in drafts.")


@check(scope="target", after=_AFTER)
def test_full_context(polydraft_bench: Bench) -> None:
    """Output ends when the context is full, at the same token as plainly; a longer prompt is refused.

    Proves: Output ends when prompt and output fill the context, at the same token as plainly, and a prompt that is
    longer is refused.
    A failure means: A draft was written past the end of the buffers, the last tokens are wrong or missing, or the
    context is not as long as was asked for.
    Look at: `RunningInfo.context_length`, which must be `LoadRequest.context_length` where that is given
    (`polydraft.engine_parts.context_length`); spare rows for k drafts at the end of the buffers;
    `TokenRequest.max_total_tokens` in a whole engine.
    """
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


@check(scope="method", after=(*_AFTER, "test_stop_id_inside_a_draft"))
def test_stop_id_at_every_token(polydraft_bench: Bench) -> None:
    """A stop id ends the output at the first token, at the second, and so on through two rounds.

    Proves: the output ends with the stop id wherever a round has it, the token that prefill chooses included.
    A failure means: the first token, a draft's last place or the bonus token is not looked at, or one too many is.
    Look at: which tokens of a round are compared with the stop ids, and in which order.
    """
    length = polydraft_bench.random("stop ids").randint(6, 30)
    count = 2 * polydraft_bench.case.k + 4
    prompt = polydraft_bench.prompt(length, 5)
    plain = polydraft_bench.plain(prompt, **greedy_settings(count))
    whole = polydraft_bench.session.generate(prompt, **greedy_settings(count))
    same = first_difference(plain.token_ids, whole.token_ids)
    polydraft_bench.same(plain, whole, wrong="Speculation changed the output.")
    for index, stop in enumerate(whole.token_ids[:same]):
        if whole.token_ids.index(stop) != index:
            continue
        result = polydraft_bench.session.generate(prompt, stop_token_ids=[stop], **greedy_settings(count))
        _expect_cut(polydraft_bench, whole, index, result, stop, f"Stop id {stop} (output token {index})")


@check(scope="once", after=(*_AFTER, "test_stop_string_inside_a_draft"))
def test_stop_strings_in_odd_places(polydraft_bench: Bench) -> None:
    """Stop strings that overlap, begin in the prompt, or never end match where they should, streamed as well.

    Proves: a stop string that begins in the prompt's last token does not match; of two that overlap, the one completed
    first ends the output; one whose beginning only comes out leaves the text whole, in chunks as in the result.
    A failure means: the prompt's text is searched as well, the first of a list wins instead of the first match, or text
    held back as the possible start of a match is lost.
    Look at: the text that stop strings are matched in, and what is released at the end.
    """
    bench = polydraft_bench
    prompt, count = bench.prompt(bench.random("odd stops").randint(8, 30), 6), 32
    plain = bench.plain(prompt, **greedy_settings(count))
    text = plain.text
    if plain.raw_text != text or len(text) < 16 or "\N{REPLACEMENT CHARACTER}" in text[:-3]:
        not_claimed("The output holds special tokens or halves of characters: its text tells nothing about stops.")
    before = bench.session.tokenizer.token_bytes(prompt[-1]).decode("utf-8", "ignore")
    cases: list[tuple[str, list[str], str]] = [("never ends", [text[-2:] + "\x00never"], text)]
    if before and before[-1] + text[:2] not in text:
        cases.append(("begins in the prompt", [before[-1] + text[:2]], text))
    middle = len(text) // 2
    long, short = text[middle - 3 : middle + 8], text[middle : middle + 2]
    ends = text.find(short)
    if ends + len(short) < text.find(long) + len(long) - 6:  # in an earlier token, surely
        cases.append(("lies inside another one", [long, short], text[:ends]))
    for name, stops, wanted in cases:
        pieces = streamed(bench.session, prompt, **greedy_settings(count), stop=stops)
        for how, found in (("result", pieces.result.text), ("stream", pieces.text)):
            if first_difference(plain.token_ids[: len(pieces.token_ids)], pieces.token_ids) is not None:
                bench.same(plain, pieces.token_ids, wrong="Stop strings changed the output.", length=count)
                continue
            expect(
                found == wanted,
                f"A stop string that {name} is matched wrongly: with stop={stops!r} the {how}'s text is {found!r}, not "
                f"{wanted!r}.",
            )


@check(scope="once", after=(*_AFTER, "test_stop_string_inside_a_draft"))
def test_split_characters(polydraft_bench: Bench) -> None:
    """Characters whose bytes come in several tokens and rounds are whole in every chunk.

    Proves: an output with characters of two to four bytes (forced where that is claimed) has the text of all its bytes,
    chunk by chunk without U+FFFD, and the stream's text is the result's.
    A failure means: bytes are decoded token by token or by rounds, or ``token_bytes`` gives a token's printed form.
    Look at: the tokenizer's ``token_bytes`` for byte tokens, and the decoder that holds back unfinished characters.
    """
    bench = polydraft_bench
    session, prompt = bench.session, bench.prompt(bench.random("characters").randint(5, 20), 7)
    settings: dict[str, Any] = greedy_settings(40)
    word = "".join(bench.random("characters").choices("éü€→日語🎉🚀", k=8))
    if "forced_token_ids" in bench.capabilities.sampling:
        bare = session.generate("a", max_new_tokens=1, speculate="off").prompt_token_ids
        ids = session.generate("a" + word, max_new_tokens=1, speculate="off").prompt_token_ids[len(bare) :]
        settings["forced_token_ids"] = dict(enumerate(ids[:30], 1))
    for speculate in ("off", "auto"):
        pieces = streamed(session, prompt, speculate=speculate, **settings)
        spelled = b"".join(session.tokenizer.token_bytes(token) for token in pieces.token_ids)
        raw = pieces.result.raw_text
        expect(
            raw == spelled.decode("utf-8", "replace"),
            f"Characters of several tokens are broken (speculate={speculate!r}): raw_text is {raw!r}, the tokens' "
            f"bytes are {spelled!r}.",
        )
        expect(
            pieces.text == pieces.result.text,
            f"Streamed text is another one (speculate={speculate!r}): {pieces.text!r}, the result's is "
            f"{pieces.result.text!r}.",
        )
        halves = sum(chunk.text.count("\N{REPLACEMENT CHARACTER}") for chunk in pieces.chunks[:-1])
        expect(
            halves <= raw[:-1].count("\N{REPLACEMENT CHARACTER}"),
            f"Characters are cut between chunks (speculate={speculate!r}): {halves} chunks hold U+FFFD.",
        )


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place to end an output at: output token ``index`` of a prompt's plain stream."""

    prompt: list[int]
    plain: Streamed
    index: int


def _expect_cut(
    bench: Bench, whole: GenerationResult, index: int, result: GenerationResult, stop: int | str, where: str
) -> bool:
    """A result ends with token ``index`` of the whole output, by this stop. False: a near tie came before it."""
    expected = whole.token_ids[: index + 1]
    differ = first_difference(expected, result.token_ids)
    if differ is not None and differ < min(len(expected), len(result.token_ids)):
        bench.same(whole, result, wrong=f"{where} changed the output.", length=len(expected))
        return False
    expect(
        result.token_ids == expected,
        f"{where} was missed inside a draft: {len(result.token_ids)} tokens came out, not {index + 1}.",
    )
    expect(
        (result.finish_reason, result.stop_match) == ("stop", stop),
        f"{where}: finish_reason and stop_match are {result.finish_reason!r} and {result.stop_match!r}.",
    )
    return True


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
        unreported = all(chunk.num_accepted_tokens is None for chunk in speculative.chunks)
        # Any place may be inside a draft, and of twice as many some are.
        share = 2 if unreported else 1
        if unreported:
            inside = list(range(len(plain.token_ids)))
        indices = [index for index in usable(plain) if same is None or index < same]
        mine = pick([index for index in indices if index in inside], share * (2 if bench.quick else 5))
        others = pick([index for index in indices if index not in inside], 1 if bench.quick else 3)
        inside_count += len(mine)
        outside_count += len(others)
        for index in sorted([*mine, *others]):
            yield _Cut(prompt, plain, index)
        if inside_count >= share * (2 if bench.quick else 4) and (outside_count or unreported):
            return
    if not inside_count and bench.case.kind == "ngram" and stepping_engine(bench.session):
        # The core's own drafts: the engine has no part in which tokens they repeat.
        raise ModelsDoNotSuit(
            f"{pair.name} does not suit this check: no accepted n-gram draft has a token that is new in the output and "
            "could end it. Use a model that repeats more of its prompt, or another pair for n-grams."
        )
    expect(inside_count > 0, "The check proves nothing: no place to end at lies inside an accepted draft.")


def _stream(bench: Bench, key: Hashable, prompt: list[int], **settings: Any) -> Streamed:
    return bench.suite.cache.once(
        key, lambda: streamed(bench.session, prompt, **settings, **greedy_settings(_NEW_TOKENS))
    )
