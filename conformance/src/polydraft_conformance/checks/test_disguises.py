"""Disguises: what holds for the suite's own requests holds for requests that do not look like the suite's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polydraft.contract import GenerationResult, Prompt
from polydraft.errors import PolydraftError

from polydraft_conformance.catalog import check
from polydraft_conformance.claims import MODEL_KINDS, expect
from polydraft_conformance.counting import logged
from polydraft_conformance.disguise import outputs_elsewhere
from polydraft_conformance.evidence import greedy_settings
from polydraft_conformance.prompts import chats, texts
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from polydraft.contract import GenerationStats

    from polydraft_conformance.bench import Bench

_AFTER = ("test_generates", "test_greedy_equals_plain", "test_drafts_are_made")
_PLAIN_PROCESS = "In a process without pytest"
_PROCESS = 4.0
"""A new process imports the engine again: it may take this many time limits of a check."""
_GAP = 0.25
"""Acceptance rates of the same greedy tokens lie nearer: only near ties of the drafter move them."""


@check(scope="method", after=_AFTER)
def test_usual_requests_equal_the_suites(polydraft_bench: Bench) -> None:
    """A request without the suite's habits gives the tokens of one with them, and is drafted on as well.

    Proves: texts, chats and token ids with a drawn length, which leave all other settings at their defaults, give the
    same tokens and about the same acceptance as the suite's requests (EOS ignored, calls logged, log-probabilities).
    A failure means: the backend is right only while a request looks like the suite's: ``ignore_eos``, ``logprobs``, the
    usual lengths, or a wrapper around the engine tell it that it is being tested.
    Look at: where the backend or its engine branches on these settings, or on the attributes of the engine.
    """
    random = polydraft_bench.random("usual requests")
    prompts = _usual_prompts(polydraft_bench, random)
    for number, prompt in enumerate(random.sample(prompts, min(len(prompts), 3 if polydraft_bench.quick else 6))):
        new_tokens = random.randrange(25, 50 if polydraft_bench.quick else 90)
        _expect_as_the_suite(polydraft_bench, prompt, new_tokens, stream=bool(number % 2))


def _expect_as_the_suite(bench: Bench, prompt: Prompt, new_tokens: int, *, stream: bool) -> None:
    """A user's request gives what the suite's one gives."""
    session = bench.session
    plain = session.generate(prompt, speculate="off", **greedy_settings(new_tokens))
    with logged(session):
        suites = session.generate(list(plain.prompt_token_ids), **greedy_settings(new_tokens))
    ends = [index for index, token in enumerate(plain.token_ids) if token in session.tokenizer.eos_token_ids]
    until_eos = plain.token_ids[: ends[0] + 1] if ends else plain.token_ids
    expected = plain.model_copy(update={"token_ids": until_eos})
    usual: list[tuple[str, GenerationResult]] = [
        (
            f"max_new_tokens={new_tokens} and nothing else",
            streamed(session, prompt, max_new_tokens=new_tokens).result
            if stream
            else session.generate(prompt, max_new_tokens=new_tokens),
        ),
        ("ignore_eos=True, not logged", session.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)),
    ]
    # Where the suite's own request is wrong as well, nothing is disguised.
    knows = suites.token_ids == plain.token_ids
    for name, found in usual:
        wanted = plain if name.startswith("ignore_eos") else expected
        if not bench.same(
            wanted,
            found,
            wrong=f"The backend knows the suite's habits: a request with {name} gives other tokens than the suite's."
            if knows
            else f"Speculation changed a greedy output of {new_tokens} tokens after a prompt of "
            f"{len(plain.prompt_token_ids)}, for the suite's own request as well: it fails after such prompts, or the "
            "backend knows the suite's lengths.",
        ):
            continue
        _expect_drafted_alike(
            (found.stats.num_draft_tokens, found.stats.num_accepted_tokens),
            (suites.stats.num_draft_tokens, suites.stats.num_accepted_tokens),
            f"The backend knows the suite's habits: with {name}",
            again=lambda: session.generate(list(plain.prompt_token_ids), **greedy_settings(new_tokens)).stats,
            whole=len(wanted.token_ids) == len(suites.token_ids) and wanted.token_ids == suites.token_ids,
        )


def _expect_drafted_alike(
    found: tuple[int | None, int | None],
    suites: tuple[int | None, int | None],
    where: str,
    *,
    again: Callable[[], GenerationStats],
    whole: bool,
) -> None:
    """Drafts are made as for the suite; over the same tokens, about as many are accepted.

    ``again`` makes the suite's request once more: where its own counts vary, it is not the request that decides.
    """
    drafted, accepted = found
    if not whole or not suites[0]:
        return
    expect(bool(drafted), f"{where} it drafts {drafted} tokens, for the suite {suites[0]}.")
    if drafted and accepted is not None and suites[1] is not None:
        rate, suites_rate = accepted / drafted, suites[1] / suites[0]
        if abs(rate - suites_rate) > _GAP:
            rates = [suites_rate, *(stats.acceptance_rate or 0.0 for stats in (again() for _ in range(4)))]
            expect(
                max(rates) - min(rates) <= _GAP / 2,
                "The statistics are made up, or drafts are drawn at random: of the same request, "
                f"{min(rates):.1%} to {max(rates):.1%} of the drafts are accepted.",
            )
        expect(
            abs(rate - suites_rate) <= _GAP,
            f"{where} {rate:.1%} of {drafted} drafts are accepted, for the suite {suites_rate:.1%} of {suites[0]}.",
        )


@check(scope="method", after=(*_AFTER, "test_usual_requests_equal_the_suites"))
def test_unknown_prompts_equal_plain(polydraft_bench: Bench) -> None:
    """Speculation changes no greedy output of prompts that are not the suite's texts.

    Proves: prompts of random tokens, and texts that the target itself has sampled, are continued greedily with the same
    tokens with and without speculation, and drafted on. Neither is made by the suite's grammar.
    A failure means: the backend is right on the suite's texts and wrong on others: it recognises them, or its fault
    shows with unusual tokens only.
    Look at: what the backend does with the prompt's tokens before the target or the drafter sees them.
    """
    session, random = polydraft_bench.session, polydraft_bench.random("unknown prompts")
    counts = {}
    for name, prompt in _unknown_prompts(polydraft_bench, random):
        new_tokens = random.randrange(18, 30 if polydraft_bench.quick else 60)
        plain = session.generate(prompt, speculate="off", max_new_tokens=new_tokens, ignore_eos=True)
        found = session.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
        wrong = f"speculation changed the greedy output of {name}."
        if found.token_ids != plain.token_ids and _is_wrong_on_own_texts(polydraft_bench, len(prompt), new_tokens):
            wrong = (
                f"S{wrong[1:]} It does so on some of the suite's texts of this length, too: it fails after such "
                "prompts, or the backend knows the suite's other texts."
            )
        else:
            wrong = f"The backend knows the suite's texts: {wrong}"
        polydraft_bench.same(plain, found, wrong=wrong)
        counts[name] = {"drafted": found.stats.num_draft_tokens, "accepted": found.stats.num_accepted_tokens}
        expect(
            found.stats.num_draft_tokens != 0 or polydraft_bench.case.kind not in MODEL_KINDS,
            f"The backend knows the suite's texts: it drafts nothing on {name}.",
        )
    polydraft_bench.numbers["unknown_prompts"] = counts


def _is_wrong_on_own_texts(bench: Bench, length: int, new_tokens: int) -> bool:
    """Whether speculation changes one of a few outputs of the suite's own texts."""
    settings = greedy_settings(new_tokens)
    for variant in range(4):
        prompt = bench.prompt(length, 500 + variant)
        if bench.session.generate(prompt, **settings).token_ids != bench.plain(prompt, **settings).token_ids:
            return True
    return False


@check(
    scope="once",
    after=("test_generates", "test_greedy_equals_plain", "test_seed_decides_the_output"),
    time_factor=_PROCESS,
)
def test_a_plain_process_gives_the_same(polydraft_bench: Bench) -> None:
    """A program without pytest gets the tokens, and the drafts, that the suite gets.

    Proves: a new process that has imported neither pytest nor the suite, without their environment variables, loads
    the pair and generates the same tokens with about the same acceptance. Plugins that are not installed are run in a
    thread of the suite's process from which pytest has been hidden.
    A failure means: the backend looks at the call stack, the loaded modules, the arguments or the environment, or it
    needs something that only the suite's process has.
    Look at: uses of ``sys.modules``, ``inspect``, ``sys.argv`` and ``os.environ``; state that imports leave behind.
    """
    bench, random = polydraft_bench, polydraft_bench.random("plain process")
    prompts = random.sample(_usual_prompts(bench, random), 3)
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "max_new_tokens": random.randrange(30, 70), "speculate": speculate}
        for prompt in prompts
        for speculate in ("auto", "off")
    ]
    if bench.capabilities.seed_identical:
        temperature = round(random.uniform(0.5, 1.2), 2)
        requests.append({**requests[0], "temperature": temperature, "seed": random.randrange(2**31)})
    options, case = bench.suite.options, bench.case
    load = {
        "target": case.pair.target,
        "drafter": case.drafter,
        "backend": options.backend,
        "num_speculative_tokens": case.k,
        "dtype": options.dtype,
        "device": options.device,
        "isolation": options.isolation,
        "prefix_cache_bytes": bench.suite.prefix_cache_bytes,
    }
    wanteds = [bench.session.generate(**request) for request in requests]
    if not options.device.startswith("cpu"):
        bench.suite.close()  # a device may not hold two engines
    outputs = outputs_elsewhere(bench.suite, load, requests, time_limit=_PROCESS * options.time_limit)
    bench = bench.on(bench.suite.session(case))
    for request, output, wanted in zip(requests, outputs, wanteds, strict=True):
        settings = {name: value for name, value in request.items() if name != "prompt"}
        drafts = output["drafted"], output["accepted"]
        try:
            if bench.same(
                wanted,
                output["token_ids"],
                wrong=f"{_PLAIN_PROCESS} the backend gives other tokens than to the suite ({settings}): it looks at "
                "the process.",
                names=("the suite's", "the process's"),
            ):
                counted = wanted.stats.num_draft_tokens, wanted.stats.num_accepted_tokens
                _expect_drafted_alike(
                    drafts,
                    counted,
                    f"{_PLAIN_PROCESS} ({settings})",
                    again=lambda request=request: bench.session.generate(**request).stats,  # type: ignore[misc]
                    whole=True,
                )
        except AssertionError as error:
            with bench.opened() as fresh:
                again = fresh.session.generate(**request)
            counted = again.stats.num_draft_tokens, again.stats.num_accepted_tokens
            if (again.token_ids, counted) != (tuple(output["token_ids"]), drafts):
                raise
            raise AssertionError(
                "A session that has served many requests gives something else than a fresh one, in this process as in "
                f"a new one: state is left behind by requests, or a counter runs over ({settings}). {error}"
            ) from error


def _usual_prompts(bench: Bench, random: Random) -> list[Prompt]:
    """What users send: texts, chats, and token ids."""
    seed = bench.suite.options.seed
    code, prose, imports = texts(seed)
    asked: list[Prompt] = [[{"role": "user", "content": chat}] for chat in random.sample(chats(seed), 2)]
    try:
        bench.session.tokenizer.chat([{"role": "user", "content": prose}])
    except PolydraftError:  # the model has no chat template
        asked = []
    start = random.randrange(200)
    return [
        *asked,
        code[start : start + random.randrange(40, 200)],
        prose,
        imports,
        bench.prompt(random.randrange(9, 60)),
    ]


def _unknown_prompts(bench: Bench, random: Random) -> list[tuple[str, list[int]]]:
    """Prompts that no grammar of the suite has made, with what to call them."""
    tokenizer, window = bench.session.tokenizer, bench.window
    usual = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special_token_ids))
    start = bench.prompt(1)
    found = [("random tokens", [*start, *(random.choice(usual) for _ in range(random.randrange(4, window + 12)))])]
    if "temperature" in bench.capabilities.sampling:
        settings: dict[str, Any] = {
            "temperature": 1.1,
            "ignore_eos": True,
            "max_new_tokens": random.randrange(12, window + 12),
        }
        sampled = bench.session.generate(start, speculate="off", **settings, **bench.seed(random.randrange(1000, 9000)))
        kept = [token for token in sampled.token_ids if token not in tokenizer.special_token_ids]
        found.append(("a text that the target has sampled", [*start, *(kept or usual[:1])]))
    return found
