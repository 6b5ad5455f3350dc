"""Second and later turns: what a request leaves behind is not in the next one's output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import reuses_prefixes
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.repeats import repeated

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextlib import AbstractContextManager
    from random import Random

    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_drafts_are_accepted")
_TURN = 10
"""Tokens of an output that shows what was left behind."""
_TURNS = 6
"""Turns of the conversation."""
_FIRST_TURN, _WHOLE_FIRST_TURN = 150, 420
"""Tokens of its first prompt. Whole engines may reuse whole blocks only, and not the last ones: vLLM on a CPU nothing
below 400 tokens, with a drafter and a sliding window."""
_Calls = list[tuple[Sequence[int], Sequence[int]]]
"""Prompts and outputs."""
_VARIANTS = 100
"""Texts of one set of turns: another set has others."""


@check(
    scope="method",
    after=(*_AFTER, "test_stop_id_inside_a_draft", "test_stop_string_inside_a_draft", "test_eos_ends_the_output"),
)
def test_next_turn_after_every_end(polydraft_bench: Bench) -> None:
    """A prompt that goes on from an earlier output gives what a fresh session gives, however that output ended.

    Proves: the next turn's prompt is the last prompt, its output and some more. It is right after an output ended by a
    limit, a stop id, a stop string, EOS, or a cancel, at places inside drafts and at their ends.
    A failure means: rows of rejected or cut-off drafts stay in the KV cache, or in a prefix cache that the next prompt
    reads (ghost KV).
    Look at: what is rolled back when an output ends, and how many tokens a prefix cache believes to hold.
    """

    def attempt(text: int, _only: Collection[str]) -> dict[str, str]:
        seen: list[_Seen] = []
        turns = _known(polydraft_bench, text).turns
        for turn, truth in turns:
            # That it is the plain output up to its end is what other checks test; a near tie may change it.
            _make_first_turn(bench, turn)
            found = bench.session.generate(turn.prompt, **greedy_settings(_TURN))
            wrong = (
                f"The turn after an output that {turn.end} ended is not what a fresh session gives: something of the "
                "first turn is left (ghost KV)."
            )
            said = turn.prompt[len(turn.first) :]  # the first output, and what the fresh prompt adds
            seen.append(_Seen(turn.kind, truth, found, wrong, [(turn.first, said)]))
        bench.numbers["turns"] = len(turns)
        return _failed(bench, seen)

    with _reusing(polydraft_bench) as bench:
        for message in repeated(bench, attempt).values():
            raise AssertionError(message)


@check(scope="method", after=_AFTER)
def test_prompts_that_resemble_the_last(polydraft_bench: Bench) -> None:
    """Prompts that share a beginning or a length with the last one give what a fresh session gives.

    Proves: the same prompt again, with another last, middle or first token, of the same length with other tokens, cut
    short, grown over three turns, grown from a changed answer, and two conversations in turn: each output is the fresh
    session's.
    A failure means: a prefix cache or a kept KV cache is taken for another prompt's: matched by length, by a hash of
    some tokens, by whole blocks, or one token too far.
    Look at: how a kept cache is compared with the new prompt; that at least the last token is run again.
    """

    def attempt(text: int, _only: Collection[str]) -> dict[str, str]:
        seen: list[_Seen] = []
        series = _known(polydraft_bench, text).series
        earlier: _Calls = []
        for name, prompt, truth in series:
            found = bench.session.generate(list(prompt), **greedy_settings(_TURN))
            wrong = f"{name} gives another output than in a fresh session: an earlier prompt's cache was used."
            seen.append(_Seen(name, truth, found, wrong, list(earlier)))
            earlier.append((prompt, found.token_ids))
        bench.numbers["prompts"] = len(series)
        return _failed(bench, seen)

    with _reusing(polydraft_bench) as bench:
        for message in repeated(bench, attempt).values():
            raise AssertionError(message)


@check(scope="method", after=(*_AFTER, "test_next_turn_after_every_end"), claims=reuses_prefixes)
def test_turns_reuse_what_is_there(polydraft_bench: Bench) -> None:
    """A conversation of six turns runs what is new of each prompt, and gives what a session without reuse gives.

    Proves: from the second turn on, a turn reuses KV of the one before it, at most as much as the two prompts have in
    common, and its statistics say so. All outputs are those of a session with ``prefix_cache_bytes=0``, which reuses
    nothing. So is that of a prompt that shares only a beginning with the conversation, which the sliding window has
    long passed.
    A failure means: the KV that is reused is not that of the prompt, the claim is empty, or the count is made up.
    Look at: ``EngineSequence.reusable``: what a sliding layer still holds; the rollback of a kept sequence; in a whole
    engine, its prefix cache, and what ``Generation.report_reused`` is given.
    """

    def attempt(text: int, _only: Collection[str]) -> dict[str, str]:
        failed: dict[str, str] = {}
        seen: list[_Seen] = []
        counts: list[int] = []
        before: tuple[int, ...] = ()
        earlier: _Calls = []
        for number, (prompt, truth) in enumerate(_known(bench, text).conversation, 1):
            found = bench.session.generate(list(prompt), **greedy_settings(_TURN))
            what = f"Turn {number}" if number <= _TURNS else "A prompt that shares a beginning with the conversation"
            wrong = f"{what} gives another output than without reuse: the KV that it reuses is not that of its prompt."
            seen.append(_Seen(what, truth, found, wrong, list(earlier)))
            earlier.append((prompt, found.token_ids))
            reused, shared = found.stats.num_reused_tokens, _shared(before, prompt)
            if reused is None:
                failed["silent"] = f"{what} does not say how many tokens it reuses, which reuses_prefixes claims."
            # A session that was used before may know the beginning of the first turn.
            elif number > 1 and reused > shared:
                failed["count"] = (
                    f"{what} shares {shared} tokens with what came before, and reports {reused} as reused."
                )
            counts.append(reused or 0)
            before = (*prompt, *found.token_ids)
        off = [truth.stats.num_reused_tokens for _, truth in _known(bench, text).conversation]
        if any(off):
            failed["off"] = f"With `prefix_cache_bytes=0`, {max(filter(None, off))} tokens were reused."
        if not any(counts):
            failed["none"] = (
                f"{len(counts)} prompts of a conversation reused nothing, though reuses_prefixes is claimed."
            )
        bench.numbers["reused"] = counts
        return _failed(bench, seen) | failed

    with _reusing(polydraft_bench) as bench:
        for message in repeated(bench, attempt).values():
            raise AssertionError(message)


def _reusing(bench: Bench) -> AbstractContextManager[Bench]:
    """A session as users have it: the suite's own sessions of stepping engines reuse nothing."""
    claims = bench.capabilities
    if claims.exposes_logits and claims.reuses_prefixes:
        return bench.opened(prefix_cache_bytes=None)
    return nullcontext(bench)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that two texts have in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


@dataclass(frozen=True, slots=True)
class _Turn:
    """A first turn, how it is ended, and the prompt of the second."""

    kind: str
    end: str
    """What ends it, in words."""
    first: list[int]
    settings: dict[str, Any]
    prompt: list[int]
    cancel: int | None = None
    """After how many chunks the first turn is cancelled; None: it ends by itself."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Turns and prompts with the plain outputs of a fresh session."""

    turns: list[tuple[_Turn, GenerationResult]]
    series: list[tuple[str, list[int], GenerationResult]]
    conversation: list[tuple[list[int], GenerationResult]]
    """The turns of one conversation, and at last a prompt that shares only a beginning with it."""


def _known(bench: Bench, text: int) -> _Known:
    """Made in one session of its own, which only decodes plainly; all drafter kinds share it."""

    def make() -> _Known:
        random = bench.random(f"turns {text}")
        with bench.opened(prefix_cache_bytes=0) as fresh:
            turns, series = _turns(fresh, random, text), _series(fresh, random, text)
            conversation = _conversation(fresh, text)
            prompts = [turn.prompt for turn in turns] + [prompt for _, prompt in series]
            truths = _truths(fresh, prompts, random)
        return _Known(
            list(zip(turns, truths, strict=False)),
            [(name, prompt, truth) for (name, prompt), truth in zip(series, truths[len(turns) :], strict=True)],
            conversation,
        )

    return bench.suite.cache.once(("turns", bench.case.pair, text), make)


def _make_first_turn(bench: Bench, turn: _Turn) -> None:
    """With speculation, to its end."""
    if turn.cancel is None:
        bench.session.generate(turn.first, **turn.settings)
        return
    with closing(bench.session.stream(turn.first, **turn.settings)) as stream:
        for _ in range(turn.cancel):
            next(stream)


@dataclass(frozen=True, slots=True)
class _Seen:
    """An output of the session that reuses, with what it must equal."""

    name: str
    truth: GenerationResult
    found: GenerationResult
    wrong: str
    """What is wrong if they differ."""
    earlier: _Calls


def _failed(bench: Bench, seen: Sequence[_Seen]) -> dict[str, str]:
    """What differs, by name. Asked when all outputs are there: a verdict drops what the session keeps of its calls."""
    failed: dict[str, str] = {}
    for one in seen:
        names = ("fresh session", "this session")
        try:
            bench.same(one.truth, one.found, wrong=one.wrong, names=names, earlier=one.earlier)
        except AssertionError as error:
            failed.setdefault(one.name, str(error))
    return failed


def _turns(fresh: Bench, random: Random, text: int) -> list[_Turn]:
    """Each on a text of its own, so that no turn profits from another one's cache."""
    k = fresh.case.k
    count = 2 * k + 6
    turns: list[_Turn] = []

    def plain(settings: dict[str, Any] | None = None) -> GenerationResult:
        prompt = fresh.prompt(random.randint(14, 40), text * _VARIANTS + len(turns))
        return fresh.plain(prompt, **(settings or greedy_settings(count)))

    def add(kind: str, end: str, first: GenerationResult, length: int, cancel: int | None = None, **ends: Any) -> None:
        prompt, output = list(first.prompt_token_ids), first.token_ids[:length]
        more = fresh.prompt(random.randint(4, 6), text * _VARIANTS + 50 + len(turns))[1:]
        settings = {**greedy_settings(count if cancel is None else 100), **ends}
        turns.append(_Turn(kind, end, prompt, settings, [*prompt, *output, *more], cancel))

    for number in range(2 if fresh.quick else 4):
        limit = random.randint(2, k + 3)
        add("limit", f"max_new_tokens={limit}", plain(), limit, max_new_tokens=limit)
        first = plain()
        places = [place for place in range(1, count) if first.token_ids.index(first.token_ids[place]) == place]
        place = random.choice(places or [0])
        add("stop id", f"a stop id at token {place}", first, place + 1, stop_token_ids=[first.token_ids[place]])
        first = plain()
        middle = random.randint(2, max(2, len(first.text) // 2))
        stop = first.text[middle : middle + 2]
        if stop.strip() and "\N{REPLACEMENT CHARACTER}" not in stop and first.raw_text == first.text:
            prompt = list(first.prompt_token_ids)
            ended = fresh.session.generate(prompt, speculate="off", **greedy_settings(count), stop=[stop])
            add("stop string", f"the stop string {stop!r}", first, len(ended.token_ids), stop=[stop])
        # As many tokens as surely come out: the next turn's prompt need not hold all that was emitted.
        add("cancel", f"a cancel after {number + 1} chunks", plain(), number + 1, cancel=number + 1)
    for _, ended in fresh.ended_by_eos[: 1 if fresh.quick else 2]:
        size = len(ended.token_ids)
        add("EOS", "EOS", ended, size, max_new_tokens=size + k, ignore_eos=False)
    return turns


def _series(fresh: Bench, random: Random, text: int) -> list[tuple[str, list[int]]]:
    """Prompts in the order in which they are given, each named by what it has in common with those before."""
    vocabulary = fresh.prompt(200)[1:]
    length = random.randint(18, 36)

    def prompt(length: int, number: int) -> list[int]:
        return fresh.prompt(length, text * _VARIANTS + 80 + number)

    def answered(prompt: list[int]) -> list[int]:
        return [*prompt, *fresh.plain(prompt, **greedy_settings(_TURN)).token_ids]

    base, apart = prompt(length, 0), prompt(length + 3, 1)

    def changed(place: int) -> list[int]:
        other = random.choice([token for token in vocabulary if token != base[place]])
        return [*base[:place], other, *base[place + 1 :]]

    second = [*answered(base), *prompt(6, 2)[1:]]

    def edited(first: list[int], count: int) -> list[int]:
        turn = answered(first)
        for at in range(len(turn) - 1 - count, len(turn) - 1):  # the last one has never been run
            turn[at] = random.choice([token for token in vocabulary if token != turn[at]])
        return [*turn, *prompt(7, 6)[1:]]

    return [
        ("A prompt", base),
        ("The same prompt again", base),
        ("The prompt with another last token", changed(length - 1)),
        ("A prompt of the same length with other tokens", [base[0], *prompt(length, 3)[1:]]),
        ("The prompt with another token in the middle", changed(length // 2)),
        ("The prompt with another token near its start", changed(1)),
        ("The prompt again after others", base),
        # Longer than what is kept, and another in its last block only.
        ("The second turn after an answer whose last token was changed", edited(base, 1)),
        ("The prompt after a changed answer", base),
        ("The second turn after an answer whose end was changed", edited(base, random.randint(3, 6))),
        ("The second turn of a conversation", second),
        ("Another conversation", apart),
        ("The second turn after an answer whose last two tokens were changed", edited(apart, 2)),
        ("Another conversation again", apart),
        ("The third turn of the first conversation", [*answered(second), *prompt(5, 4)[1:]]),
        ("The second turn of the other conversation", [*answered(apart), *prompt(5, 5)[1:]]),
        ("The first turn, cut short", base[: length - 4]),
        ("The first turn without its last token", base[:-1]),
    ]


def _conversation(fresh: Bench, text: int) -> list[tuple[list[int], GenerationResult]]:
    """Each turn's prompt is the last one, its plain output, and some more."""
    said: list[tuple[list[int], GenerationResult]] = []
    wanted = _FIRST_TURN if fresh.capabilities.exposes_logits else _WHOLE_FIRST_TURN
    first = prompt = fresh.prompt(min(wanted, fresh.session.running.context_length // 2), text * _VARIANTS + 90)
    for turn in range(_TURNS + 1):
        if turn == _TURNS:
            prompt = [*first[: len(first) // 2], *fresh.prompt(12, text * _VARIANTS + 98)[1:]]
        truth = fresh.session.generate(list(prompt), speculate="off", **greedy_settings(_TURN))
        said.append((prompt, truth))
        prompt = [*prompt, *truth.token_ids, *fresh.prompt(6, text * _VARIANTS + 91 + turn)[1:]]
    return said


def _truths(fresh: Bench, prompts: Sequence[Sequence[int]], random: Random) -> list[GenerationResult]:
    """Plain greedy outputs of a session that is given no two similar prompts one after the other.

    Between any two comes a prompt of other tokens and another length: what a session keeps of the last request, it
    keeps of that one.
    """
    order = list(range(len(prompts)))
    random.shuffle(order)
    results: dict[int, GenerationResult] = {}
    lengths = {len(prompt) for prompt in prompts}
    unlike = next(length for length in range(5, 10_000) if length not in lengths)
    for number, index in enumerate(order):
        fresh.session.generate(fresh.prompt(unlike, 900 + number), max_new_tokens=1, speculate="off")
        results[index] = fresh.session.generate(list(prompts[index]), speculate="off", **greedy_settings(_TURN))
    return [results[index] for index in range(len(prompts))]
