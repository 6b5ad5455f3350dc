"""Ends of the output inside drafts: length limits, stop ids, stop strings, EOS, and a full context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft.contract import Prompt
from polydraft.errors import ContextLengthError

from polydraft_conformance.catalog import check, not_claimed
from polydraft_conformance.claims import MODEL_KINDS, engine_of, expect, has_model_drafter
from polydraft_conformance.comparison import expect_same, first_difference
from polydraft_conformance.counting import wrapped_sequences
from polydraft_conformance.evidence import greedy_settings, plain_result
from polydraft_conformance.prompts import CHATS, TEXTS, prompt_of_length
from polydraft_conformance.scripted import ScriptedSequence
from polydraft_conformance.streams import Streamed, pick, stop_strings, streamed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from polydraft import Session
    from polydraft.contract import GenerationResult

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_drafts_are_made", "test_drafts_are_accepted")
_NEW_TOKENS = 48
_EOS_LIMIT = 96


@check(scope="kind", after=_AFTER)
def test_length_limit_inside_a_draft(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """max_new_tokens ends the output at just that token, wherever it falls in a round."""
    first = next(
        _cuts(polydraft_suite, polydraft_case, polydraft_session, lambda plain: list(range(len(plain.token_ids))))
    )
    for limit in range(1, 2 * polydraft_case.k + 4):
        wanted = first.plain.token_ids[:limit]
        result = polydraft_session.generate(first.prompt, **greedy_settings(limit))
        where = f"With max_new_tokens={limit}, k={polydraft_case.k}"
        expect(
            len(result.token_ids) == limit,
            f"{where}: the length limit was missed inside a draft: {len(result.token_ids)} tokens came out, "
            f"{list(result.token_ids)}, not {list(wanted)}.",
        )
        # Drafts are cut short before the limit: other steps than without it, where near ties may turn.
        expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            first.prompt,
            wanted,
            result.token_ids,
            wrong=f"{where}: the limit changed the output.",
            names=("plain", "limited"),
        )
        expect(result.finish_reason == "length", f"{where}: finish_reason is {result.finish_reason!r}, not 'length'.")


@check(scope="kind", after=_AFTER)
def test_stop_id_inside_a_draft(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """A stop id ends the output with that token, wherever it falls in a round."""

    def usable(plain: Streamed) -> list[int]:
        return [index for index, token in enumerate(plain.token_ids) if plain.token_ids.index(token) == index]

    for cut in _cuts(polydraft_suite, polydraft_case, polydraft_session, usable):
        stop = cut.plain.token_ids[cut.index]
        result = polydraft_session.generate(cut.prompt, stop_token_ids=[stop], **greedy_settings(_NEW_TOKENS))
        where = f"Stop id {stop} (output token {cut.index})"
        expect(
            result.token_ids == cut.plain.token_ids[: cut.index + 1],
            f"{where} was missed inside a draft: {len(result.token_ids)} tokens came out, not {cut.index + 1}.",
        )
        expect(
            (result.finish_reason, result.stop_match) == ("stop", stop),
            f"{where}: finish_reason and stop_match are {result.finish_reason!r} and {result.stop_match!r}.",
        )


@check(scope="kind", after=(*_AFTER, "test_stop_id_inside_a_draft"))
def test_stop_string_inside_a_draft(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """A stop string ends the text before its match, wherever it falls in a round and across two tokens."""

    def usable(plain: Streamed) -> list[int]:
        return [index for index in range(len(plain.token_ids)) if stop_strings(plain, index)]

    for cut in _cuts(polydraft_suite, polydraft_case, polydraft_session, usable):
        for stop in stop_strings(cut.plain, cut.index):
            settings = {**greedy_settings(_NEW_TOKENS), "stop": [stop]}
            result = polydraft_session.generate(cut.prompt, **settings)
            where = f"Stop string {stop!r} (completed by output token {cut.index})"
            text = cut.plain.text[: cut.plain.text.index(stop)]
            expect(
                result.text == text,
                f"{where} was missed inside a draft: the text is {result.text!r}, not {text!r}.",
            )
            expect(
                result.token_ids == cut.plain.token_ids[: cut.index + 1],
                f"{where}: {len(result.token_ids)} tokens came out, not {cut.index + 1}.",
            )
            expect(
                (result.finish_reason, result.stop_match) == ("stop", stop),
                f"{where}: finish_reason and stop_match are {result.finish_reason!r} and {result.stop_match!r}.",
            )
        # The text must be held back while it may become a match.
        for stop in stop_strings(cut.plain, cut.index)[-1:]:
            text = cut.plain.text[: cut.plain.text.index(stop)]
            pieces = streamed(polydraft_session, cut.prompt, stop=[stop], **greedy_settings(_NEW_TOKENS))
            where = f"Stop string {stop!r} (completed by output token {cut.index})"
            expect(pieces.text == text, f"{where}: streamed, the text is {pieces.text!r}, not {text!r}.")


@check(scope="kind", after=(*_AFTER, "test_near_ties_as_rare_as_in_control"))
def test_eos_ends_the_output(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session, polydraft_numbers: dict[str, Any]
) -> None:
    """Output ends with the EOS token, as in plain decoding."""
    ended = _ended_by_eos(polydraft_suite, polydraft_case, polydraft_session)
    compared = 0
    for prompt, plain in ended:
        result = polydraft_session.generate(prompt, max_new_tokens=_EOS_LIMIT)
        if not expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            plain.prompt_token_ids,
            plain.token_ids,
            result.token_ids,
            wrong="EOS was missed inside a draft.",
            settings={"max_new_tokens": _EOS_LIMIT},
        ):
            continue
        compared += 1
        expect(result.finish_reason == "eos", f"finish_reason is {result.finish_reason!r}, not 'eos'.")
        for name in ("text", "raw_text", "thinking", "tool_calls"):
            expect(getattr(result, name) == getattr(plain, name), f"The tokens are equal, but not the {name}.")
    polydraft_numbers["outputs_ended_by_eos"] = compared
    if not compared:
        not_claimed("Near ties turn every output that EOS ends: in this precision the check says nothing.")


@check(scope="kind", after=(*_AFTER, "test_eos_ends_the_output"), claims=has_model_drafter)
def test_eos_at_every_place_of_a_draft(
    polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session
) -> None:
    """EOS as the first, .. the last draft and as the bonus token of a round: nothing comes out behind it."""
    if polydraft_case.kind not in MODEL_KINDS:
        not_claimed("n-gram drafts are the core's own.")
    engine = engine_of(polydraft_session)
    ended = [plain for _, plain in _ended_by_eos(polydraft_suite, polydraft_case, polydraft_session)]
    plain = max(ended, key=lambda result: len(result.token_ids))
    after_eos = plain_result(
        polydraft_suite,
        polydraft_session,
        polydraft_case,
        plain.prompt_token_ids,
        greedy_settings(len(plain.token_ids) + polydraft_case.k),
    )
    truth = [*plain.prompt_token_ids, *after_eos.token_ids]
    for shift in range(polydraft_case.k + 1):

        def wrap(inner: Any, shift: int = shift) -> ScriptedSequence:
            k = polydraft_case.k
            return ScriptedSequence(inner, truth, engine.tokenizer.vocab_size, lambda _round: k, first_length=shift)

        with wrapped_sequences(engine, wrap):
            result = polydraft_session.generate(list(plain.prompt_token_ids), max_new_tokens=_EOS_LIMIT)
        if not expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            plain.prompt_token_ids,
            plain.token_ids,
            result.token_ids,
            wrong=f"EOS was missed inside a draft (drafts all right, shifted by {shift}): "
            f"{len(result.token_ids)} tokens came out, not {len(plain.token_ids)}.",
            settings={"max_new_tokens": _EOS_LIMIT},
        ):
            continue
        expect(result.finish_reason == "eos", f"finish_reason is {result.finish_reason!r}, not 'eos' (shift {shift}).")


@check(scope="target", after=_AFTER)
def test_min_new_tokens(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """EOS is not chosen before min_new_tokens, in drafts neither, and the output stays that of plain decoding."""
    capabilities = polydraft_suite.capabilities
    if capabilities is None or "min_new_tokens" not in capabilities.sampling:
        not_claimed("The backend does not claim the setting min_new_tokens.")
    for _, first in _ended_by_eos(polydraft_suite, polydraft_case, polydraft_session)[:2]:
        least = len(first.token_ids) + 3
        settings: dict[str, Any] = {"max_new_tokens": least + 8, "min_new_tokens": least}
        prompt = list(first.prompt_token_ids)
        plain = polydraft_session.generate(prompt, speculate="off", **settings)
        result = polydraft_session.generate(prompt, **settings)
        expect(len(plain.token_ids) >= least, f"Plain decoding ended after {len(plain.token_ids)} of {least} tokens.")
        expect_same(
            polydraft_suite,
            polydraft_case,
            polydraft_session,
            prompt,
            plain.token_ids,
            result.token_ids,
            wrong=f"min_new_tokens={least} counts otherwise in drafts.",
            settings=settings,
        )


@check(scope="target", after=_AFTER)
def test_full_context(polydraft_suite: Suite, polydraft_case: Case, polydraft_session: Session) -> None:
    """Output ends when the context is full, at the same token as plainly; a longer prompt is refused."""
    room = 2 * polydraft_case.k + 3
    prompt = prompt_of_length(polydraft_suite, polydraft_session, polydraft_case, polydraft_case.pair.window + 8)
    wanted = plain_result(polydraft_suite, polydraft_session, polydraft_case, prompt, greedy_settings(_NEW_TOKENS))
    # Another session: the shared one is closed first, since not every engine can hold two large models.
    with polydraft_suite.opened(polydraft_case, context_length=len(prompt) + room) as session:
        length = session.running.context_length
        expect(length == len(prompt) + room, f"context_length={len(prompt) + room} was asked for, it is {length}.")
        for speculate in ("off", "auto"):
            result = session.generate(list(prompt), speculate=speculate, **greedy_settings(500))
            expect(
                (total := len(prompt) + len(result.token_ids)) == length,
                f"speculate={speculate!r}: prompt and output are {total} tokens, the context is {length}.",
            )
            expect(result.finish_reason == "context", f"finish_reason is {result.finish_reason!r}, not 'context'.")
            expect_same(
                polydraft_suite,
                polydraft_case,
                session,
                prompt,
                wanted.token_ids[: len(result.token_ids)],
                result.token_ids,
                wrong="The context's limit changed the output.",
                names=("plain", "limited"),
            )
        too_long = prompt_of_length(polydraft_suite, session, polydraft_case, length + 1)
        try:
            session.generate(list(too_long), max_new_tokens=1)
        except ContextLengthError:
            return
        raise AssertionError(f"A prompt of {len(too_long)} tokens was taken, but the context is {length}.")


@dataclass(frozen=True, slots=True)
class _Cut:
    """A place to end an output at: output token ``index`` of a prompt's plain stream."""

    prompt: list[int]
    plain: Streamed
    index: int


def _cuts(suite: Suite, case: Case, session: Session, usable: Callable[[Streamed], list[int]]) -> Iterator[_Cut]:
    """Places to end an output at, some inside drafts and some at the ends of rounds.

    Args:
        suite: Keeps the outputs.
        case: Its drafts are looked at.
        session: The case's session.
        usable: Which output tokens of a plain stream can be ended at.

    Raises:
        AssertionError: None lies inside a draft: the check would show nothing.
    """
    inside_count = outside_count = 0
    window = case.pair.window
    # More than are needed at most: n-gram drafts hold tokens that were there before, and few are new in the output.
    for length in (max(4, window // 2), *(window + 8 + 11 * number for number in range(16))):
        prompt = list(prompt_of_length(suite, session, case, length))
        plain = _stream(suite, ("plain stream", case.pair, length), session, prompt, speculate="off")
        speculative = _stream(suite, ("speculative stream", case, length), session, prompt)
        expect_same(
            suite,
            case,
            session,
            prompt,
            plain.token_ids,
            speculative.token_ids,
            wrong="Speculation changed the streamed output.",
        )
        # Up to a near tie the two are the same; and a stop changes no round before it.
        same = first_difference(plain.token_ids, speculative.token_ids)
        inside = speculative.inside_drafts()
        if all(chunk.num_accepted_tokens is None for chunk in speculative.chunks):
            inside = list(range(len(plain.token_ids)))  # not reported: any place may be inside a draft
        indices = [index for index in usable(plain) if same is None or index < same]
        mine = pick([index for index in indices if index in inside], 2 if suite.options.quick else 5)
        others = pick([index for index in indices if index not in inside], 1 if suite.options.quick else 3)
        inside_count += len(mine)
        outside_count += len(others)
        for index in sorted([*mine, *others]):
            yield _Cut(prompt, plain, index)
        if inside_count >= (2 if suite.options.quick else 4) and outside_count:
            return
    expect(inside_count > 0, "The check shows nothing: no place to end at lies inside an accepted draft.")


def _stream(suite: Suite, key: Hashable, session: Session, prompt: list[int], **settings: Any) -> Streamed:
    if key not in suite.cache:
        suite.cache[key] = streamed(session, prompt, **settings, **greedy_settings(_NEW_TOKENS))
    stream: Streamed = suite.cache[key]
    return stream


def _ended_by_eos(suite: Suite, case: Case, session: Session) -> list[tuple[Any, GenerationResult]]:
    """A few prompts whose plain greedy outputs EOS ends, with these outputs.

    Raises:
        AssertionError: There is none: the check would show nothing.
    """
    key = ("ended by EOS", case.pair)
    if key not in suite.cache:
        found: list[tuple[Any, GenerationResult]] = []
        chats: list[Prompt] = [[{"role": "user", "content": chat}] for chat in CHATS]
        for prompt in [*chats, *TEXTS]:
            result = session.generate(prompt, max_new_tokens=_EOS_LIMIT, speculate="off")
            if result.finish_reason == "eos":
                found.append((prompt, result))
            if len(found) == (2 if suite.options.quick else 3):
                break
        suite.cache[key] = found
    ended: list[tuple[Any, GenerationResult]] = suite.cache[key]
    expect(bool(ended), "The check shows nothing: no plain output is ended by EOS.")
    return ended
