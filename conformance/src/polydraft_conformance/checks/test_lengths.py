"""Lengths: prompts of one token, around the sizes of chunks, far contexts, and every k."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from polydraft.errors import PolydraftError
from polydraft.verification import GreedySampler, difference, first_difference

from polydraft_conformance.catalog import check, not_applicable, not_claimed
from polydraft_conformance.claims import expect, exposes_logits
from polydraft_conformance.counting import count_log, logged, stepping_engine
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.lengths import SHORT, critical_lengths, pattern_of
from polydraft_conformance.primitives import logits_of, prefill_logits
from polydraft_conformance.repeats import repeated, shows_ties
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from polydraft.contract import GenerationResult
    from polydraft.contract.requests import Speculate
    from polydraft.verification import Logits

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain")
_PRIMITIVES = ("test_rows_equal_single_steps", "test_steps_equal_prefill", "test_rollback_is_exact")
_LATE = (
    *(*_AFTER, *_PRIMITIVES, "test_statistics_equal_counts", "test_drafts_are_accepted", "test_rounds_draft_k_tokens"),
    *("test_eos_ends_the_output", "test_stop_string_inside_a_draft", "test_sampled_drafts_are_accepted"),
)
"""Checks of short outputs come first: they are cheaper, and say more."""
_FEW = 6
"""Tokens of an output that is compared with the one it continues."""
_DROPS = 8
"""Texts tried for one whose last logits show that a token is missing."""
_TEXTS = 3
"""A difference counts once it shows on this many texts: the routing of a mixture of experts may flip on one."""


@check(scope="once", after=_AFTER)
def test_short_prompts(polydraft_bench: Bench) -> None:
    """Prompts of 1, 2 and 3 tokens work, plainly and with speculation, and each continues the shorter one's output.

    Proves: the output after 1 token, with the first j tokens of that output appended to the prompt, goes on with the
    rest of it; and speculation changes nothing.
    A failure means: a prefill that needs two tokens (a shifted drafter input, a chunk split off the last token) or that
    confuses a prompt of one token with a step of decoding.
    Look at: the engine's prefill for one token, and what its drafter is given before the first step.
    """
    body = polydraft_bench.prompt(8)
    count = 8
    for first in (body[:1], [polydraft_bench.random("short prompts").choice(body[1:])]):
        base = _working(polydraft_bench, first, "off", count)
        prompts = [(length, [*first, *base.token_ids[: length - 1]]) for length in SHORT]
        for length, prompt in prompts:
            rest = _rest(base, length - 1)
            if length > 1:
                plain = _working(polydraft_bench, prompt, "off", count - length + 1)
                polydraft_bench.same(
                    rest,
                    plain,
                    wrong=f"A prompt of {length} tokens gives another output than the prompt of 1 token that it "
                    "continues: a short prefill is wrong.",
                    names=("after 1 token", f"after {length} tokens"),
                )
            found = _working(polydraft_bench, prompt, "auto", count - length + 1)
            polydraft_bench.same(rest, found, wrong=f"With a prompt of {length} tokens speculation changed the output.")


@check(scope="once", after=_LATE, claims=exposes_logits, time_factor=4)
def test_prefill_at_every_length(polydraft_bench: Bench) -> None:
    """A prefill of n tokens gives the logits of a shorter one and steps, for n around every size of a chunk.

    Proves: one sequence is stepped past 512 tokens; at 1, 2, 3 tokens, at 64, 128, 256, 512 and other multiples of 64,
    each -1, 0 and +1, and at drawn lengths a fresh prefill has its logits, and so have the steps after it.
    A failure means: a prefill in chunks drops, repeats or misplaces a token where a chunk is full or holds one token;
    or steps at far positions go wrong (the message says from which length on).
    Look at: how the engine cuts the prompt into chunks, the positions and the mask of each, and the last chunk's size.
    """
    longest = _longest(polydraft_bench, polydraft_bench.k + 2)
    lengths = critical_lengths(polydraft_bench.random("prefill lengths"), longest, quick=polydraft_bench.quick)
    polydraft_bench.numbers["lengths"] = [*SHORT, *lengths]
    limit = polydraft_bench.tolerance
    gaps: dict[int, float] = {}

    def attempt(text: int, only: Collection[int]) -> dict[int, str]:
        found = _prefill_gaps(polydraft_bench, only or [*SHORT, *lengths], text)
        for length, gap in found.items():
            gaps.setdefault(length, gap)
        return {length: f"{gap:.3g}" for length, gap in found.items() if gap > limit}

    failed = repeated(polydraft_bench, attempt, _TEXTS)
    polydraft_bench.numbers["largest_difference"] = max(gaps.values())
    if failed:
        raise AssertionError(
            f"A prefill and steps to the same length disagree {pattern_of(failed, gaps.keys() - failed)}: logits "
            f"differ by up to {max(gaps[length] for length in failed):.3g}, on {_TEXTS} texts; the engine's own noise "
            f"explains at most {limit:.3g}."
        )
    if polydraft_bench.is_fine:
        # A model of few words back gives some tokens the same row whatever stands before them: not every text shows it.
        dropped = 0.0
        for variant in range(_DROPS):
            text = polydraft_bench.prompt(lengths[0], variant)
            whole, short = (prefill_logits(polydraft_bench.engine, ids) for ids in (text, [*text[:-2], text[-1]]))
            dropped = difference(whole[-1], short[-1])
            if dropped > limit:
                return
        not_applicable(
            f"Without the token before the last the model's logits change by {dropped:.3g} only, on {_DROPS} texts: a "
            "token that a prefill drops cannot be seen in this model. One that looks further back gives the proof."
        )


@check(scope="once", after=(*_LATE, "test_long_output_equals_plain"), time_factor=4)
def test_outputs_continue_themselves(polydraft_bench: Bench) -> None:
    """The output after a prompt and the first j tokens of its output is the rest of it, for every critical length.

    Proves: for whole engines, what ``test_prefill_at_every_length`` proves for stepping ones. A prompt of at most 50
    tokens is decoded plainly past 512 tokens; prompts cut from that text at the critical lengths must give what follows
    there, and, where log-probabilities are claimed, their values.
    A failure means: a prefill in chunks drops, repeats or misplaces a token at these lengths, or decoding goes wrong
    from some length on.
    Look at: how the engine cuts the prompt into chunks (max_num_batched_tokens, ubatch size), and its prefix cache.
    """
    if stepping_engine(polydraft_bench.session) is not None and polydraft_bench.capabilities.exposes_logits:
        not_claimed("A stepping engine's logits are compared by test_prefill_at_every_length.")
    longest = _longest(polydraft_bench, _FEW + 2)
    random = polydraft_bench.random("continued lengths")
    lengths = critical_lengths(random, longest, quick=polydraft_bench.quick)
    polydraft_bench.numbers["lengths"] = lengths
    compared: set[int] = set()

    def attempt(text: int, only: Collection[int]) -> dict[int, str]:
        base = _long_plain(polydraft_bench, random.randint(24, 50), max(lengths) + _FEW + 1, text)
        start = len(base.prompt_token_ids)
        tried = [length for length in only or lengths if length > start]
        compared.update(tried)
        found = {length: _continuation(polydraft_bench, base, length - start) for length in tried}
        return {length: how for length, how in found.items() if how}

    failed = repeated(polydraft_bench, attempt, _TEXTS)
    if failed:
        raise AssertionError(
            f"The output depends on where the prompt ends, {pattern_of(failed, compared - failed.keys())}, on {_TEXTS} "
            f"texts: {next(iter(failed.values()))}"
        )


@check(scope="method", after=_LATE, time_factor=4)
def test_long_output_equals_plain(polydraft_bench: Bench) -> None:
    """A long greedy output, past 400 tokens of context, is the plain one, token by token.

    Proves: speculation changes nothing at far positions, where chunk sizes, windows and blocks have been crossed many
    times over.
    A failure means: positions, masks or KV slots of drafted rows go wrong from some length on; the message says where
    the first difference is.
    Look at: buffers with a fixed size, position tables, rings of sliding layers, rollback across a block's edge.
    """
    run = polydraft_bench.long_run
    plain, found = run.plain, run.streamed.result
    polydraft_bench.numbers["tokens_compared"] = len(plain.token_ids)
    place = first_difference(plain.token_ids, found.token_ids)
    total = run.prompt_length + len(plain.token_ids)
    wrong = (
        f"Speculation changed a long output at context {run.prompt_length + (place or 0)} of {total}: the first "
        f"{place} tokens are the same."
    )
    if place is None or shows_ties(polydraft_bench):
        polydraft_bench.same(plain, found, wrong=wrong)
        return
    # An engine that shows no numbers may have near ties: one, but not one after the other.
    differences, start = 0, 0
    while start < len(plain.token_ids):
        rest = _rest(plain, start)
        found = polydraft_bench.session.generate(list(rest.prompt_token_ids), **greedy_settings(len(rest.token_ids)))
        position = first_difference(rest.token_ids, found.token_ids)
        if position is None:
            break
        differences += 1
        start += position + 1
        expect(differences < 3, f"{wrong} Started again behind each difference, it differed {differences} times.")


@check(scope="once", after=(*_AFTER, "test_drafts_are_made", "test_rounds_draft_k_tokens"), time_factor=6)
def test_every_k_drafts_k(polydraft_bench: Bench) -> None:
    """Every k up to the backend's largest loads, drafts k tokens in a round, and changes no token of the output.

    Proves: a session for the largest k and for a drawn one (in a full run for each from 9 on as well) says that it runs
    it, makes a round of just k drafts, never a longer one, and gives the plain greedy output.
    A failure means: k is capped in silence (a buffer for 8 drafts), or steps of many rows are wrong.
    Look at: the number of rows that the engine's step, masks and buffers are made for.
    """
    suite, pair = polydraft_bench.suite, polydraft_bench.case.pair
    most = polydraft_bench.capabilities.max_speculative_tokens
    tested = set(suite.k_values)
    others = [k for k in range(1, most) if k not in tested]
    drawn = polydraft_bench.random("every k")
    chosen = others if not polydraft_bench.quick else drawn.sample(others, min(1, len(others)))
    if not polydraft_bench.quick:
        chosen = [k for k in others if k > 8] if len(others) <= 16 else drawn.sample(others, 8)
    plain_prompt = polydraft_bench.prompt(max(4, polydraft_bench.window - 5), 3)
    for k in sorted({*chosen, *({most} - tested)}, reverse=True):
        case = pair.case(k)
        with closing(suite.load(case)) as session:
            bench = type(polydraft_bench)(suite, case, session, polydraft_bench.numbers)
            plain = bench.plain(plain_prompt, **greedy_settings(3 * most + 8))
            running = session.running.num_speculative_tokens
            expect(running == k, f"k={k} was asked for, but session.running says k={running}.")
            with logged(session) as logs:
                pieces = streamed(session, plain_prompt, **greedy_settings(len(plain.token_ids)))
            bench.same(plain, pieces.token_ids, wrong=f"With k={k} speculation changed the greedy output.")
            if logs:
                positions = count_log(logs[-1], len(pieces.token_ids)).accepted_per_position or ()
                drafted: list[int | None] = [len(positions)]
            else:
                drafted = [chunk.num_draft_tokens for chunk in pieces.chunks]
            longest = max((count or 0 for count in drafted), default=0)
            if None not in drafted and case.kind != "ngram":
                expect(longest == k, f"k={k} is not what is drafted: at most {longest} tokens in a round of {k}.")
            # A round can give k+1 tokens at most; more would be of two rounds.
            largest = max(len(chunk.token_ids) for chunk in pieces.chunks)
            expect(
                not logs or largest <= k + 1,
                f"With k={k} a round gave {largest} tokens, more than k drafts and a bonus token.",
            )
    polydraft_bench.numbers["k"] = sorted({*chosen, most, *tested})


# Prefills -----------------------------------------------------------------------------------------------------------


def _prefill_gaps(bench: Bench, lengths: Collection[int], text: int) -> dict[int, float]:
    """Length -> by how much logits after a prefill of it, and after the steps that follow, differ from those of steps.

    Args:
        bench: Its engine is stepped.
        lengths: Of the prefills.
        text: Variant of the text.
    """
    k = bench.k
    start = 5  # not critical itself
    last = max([*lengths, start + k]) + k + 1
    tokens = bench.prompt(last, text)
    needed = {length + offset for length in lengths for offset in range(k + 2)} | set(range(start, start + 2 * k + 4))
    wanted = _stepped(bench, tokens, start, last, needed)
    gaps: dict[int, float] = {}
    for length in sorted(lengths):
        try:
            # Steps after a short prefill go on until there are rows to compare.
            rows = _stepped(bench, tokens, length, max(length + k + 1, start + 2), needed)
        except PolydraftError as error:
            raise AssertionError(f"A prefill of {length} tokens fails: {type(error).__name__}: {error}") from error
        gaps[length] = max(difference(row, wanted[at]) for at, row in rows.items() if at in wanted)
    return gaps


def _stepped(bench: Bench, text: Sequence[int], start: int, last: int, needed: Collection[int]) -> dict[int, Logits]:
    """Length -> logits after it: a prefill of ``start`` tokens, then steps of k+1 tokens up to ``last``."""
    engine, size = bench.engine, bench.k + 1
    sampler = GreedySampler(engine)
    rows: dict[int, Logits] = {}
    with closing(engine.open_sequence()) as sequence:
        rows[start] = logits_of(sequence.prefill(list(text[:start]), sampler, keep_logits=True))[-1].copy()
        for first in range(start, last, size):
            block = list(text[first : min(first + size, last)])
            logits = logits_of(sequence.verify(block, sampler, keep_logits=True))
            for row, length in enumerate(range(first + 1, first + 1 + len(block))):
                if length in needed:
                    rows[length] = logits[row].copy()
    return rows


# Outputs ------------------------------------------------------------------------------------------------------------


def _working(bench: Bench, prompt: Sequence[int], speculate: Speculate, count: int) -> GenerationResult:
    """Generate; an error fails the check by the prompt's length."""
    try:
        return bench.session.generate(list(prompt), speculate=speculate, **greedy_settings(count))
    except PolydraftError as error:
        raise AssertionError(
            f"A prompt of {len(prompt)} tokens fails (speculate={speculate!r}): {type(error).__name__}: {error}"
        ) from error


def _rest(base: GenerationResult, count: int) -> GenerationResult:
    """The output of ``base`` from its token ``count`` on, as that of a longer prompt."""
    return base.model_copy(
        update={
            "prompt_token_ids": (*base.prompt_token_ids, *base.token_ids[:count]),
            "token_ids": base.token_ids[count:],
            "logprobs": base.logprobs and base.logprobs[count:],
        }
    )


def _long_plain(bench: Bench, prompt_length: int, total: int, variant: int) -> GenerationResult:
    """A plain greedy output to ``total`` tokens of context, with log-probabilities where they are claimed."""
    settings = greedy_settings(total - prompt_length)
    if "logprobs" in bench.capabilities.sampling and stepping_engine(bench.session) is None:
        settings["logprobs"] = 5
    return bench.plain(bench.prompt(prompt_length, variant), **settings)


def _continuation(bench: Bench, base: GenerationResult, count: int) -> str:
    """How the output after ``base``'s prompt and ``count`` tokens of its output is not the rest of it; empty if it is.

    Near ties are no difference where log-probabilities show them.
    """
    rest = _rest(base, count)
    prompt = list(rest.prompt_token_ids)
    settings: dict[str, Any] = greedy_settings(_FEW)
    if base.logprobs:
        settings["logprobs"] = 5
    modes: tuple[Speculate, ...] = ("auto", "off") if len(prompt) % 64 == 0 else ("auto",)
    for speculate in modes:
        how = "plainly" if speculate == "off" else "with speculation"
        try:
            found = bench.session.generate(prompt, speculate=speculate, **settings)
        except PolydraftError as error:
            return f"a prompt of {len(prompt)} tokens fails {how}: {type(error).__name__}: {error}"
        try:
            same = bench.same(rest, found, wrong=f"{how}:", length=_FEW, names=("decoded", "prefilled"))
        except AssertionError as error:
            return str(error)
        if same and base.logprobs and found.logprobs:
            gap = _logprob_gap(rest, found)
            # A sixteenth of a nat: far above rounding in any dtype that tokens survive, far below a lost token.
            bound = 0.0625 if bench.is_fine else 0.5
            if gap > bound:
                return f"log-probabilities after {len(prompt)} tokens differ by {gap:.3g} {how}, the tokens do not."
    return ""


def _logprob_gap(rest: GenerationResult, found: GenerationResult) -> float:
    """The largest difference of the first token's best log-probabilities."""
    one, other = (dict(result.logprobs[0].top) for result in (rest, found) if result.logprobs)
    return max((abs(one[token] - other[token]) for token in one.keys() & other.keys()), default=0.0)


def _longest(bench: Bench, room: int) -> int:
    """The longest prompt that leaves this room in the context."""
    return bench.session.running.context_length - room
