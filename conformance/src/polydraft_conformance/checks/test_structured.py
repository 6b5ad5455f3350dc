"""Outputs that must match: ``guided`` decides what may come, in drafted rows as in others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polydraft.contract import Guided
from polydraft.errors import InvalidRequestError, PolydraftError, StructuredOutputError, UnsupportedError

from polydraft_conformance.catalog import check, unchecked
from polydraft_conformance.claims import expect, is_seed_identical, samples
from polydraft_conformance.counting import logged

if TYPE_CHECKING:
    from random import Random

    from polydraft import Speculate
    from polydraft.contract import GenerationResult

    from polydraft_conformance.bench import Bench

_LIMIT = 160
"""Tokens: more than the longest output that any of the tasks allows, byte by byte."""
_WORDS = ("able", "birch", "cedar", "delta", "ember", "fjord", "grape", "hazel", "iris", "jade", "kelp", "lotus")
_MALFORMED: tuple[dict[str, Any], ...] = (
    {"json": {"type": "no-such-type"}},
    {"json": False},
    {"regex": "(unclosed"},
    {"grammar": "start: no_such_rule"},
)
_AFTER = ("test_generates", "test_greedy_equals_plain", "test_rollback_is_exact", "test_eos_ends_the_output")


@check(scope="kind", after=_AFTER, claims=samples("guided"))
def test_outputs_match(polydraft_bench: Bench) -> None:
    """Every output matches what `guided` asks for, with speculation and without: the same tokens, greedy and seeded.

    Proves: what may not come is never chosen, in the first row of a round and in drafted ones, and the output ends
    where it is complete; speculation changes no token of it.
    A failure means: the rule is not applied to each row with the drafts before it, it is not taken back with rejected
    drafts, or it is ignored.
    Look at: in a stepping engine, whether each row of a step is chosen by `sampler.choose`, with all run tokens, and
    each draft by `sampler.choose_draft`, with `run_token_ids`. In a whole engine, what it does with `settings.guided`.
    """
    bench = polydraft_bench
    random = bench.random("structured")
    manners: list[dict[str, Any]] = [{}]
    if "temperature" in bench.capabilities.sampling:
        manners += [{"temperature": 1.3, **bench.seed(31 + number)} for number in range(1 if bench.quick else 3)]
    taken = 0
    for guided, holds in _tasks(random):
        for manner in manners if bench.takes({"guided": _record(guided)}) else ():
            prompt = bench.prompt(8 + random.randrange(8), random.randrange(100))
            settings = {"max_new_tokens": _LIMIT, "guided": guided, **manner}
            plain = _generated(bench, prompt, "off", settings)
            found = _generated(bench, prompt, "auto", settings)
            for name, result in (("plain", plain), ("speculative", found)):
                expect(
                    result.finish_reason == "eos" and result.matches is True and holds(result.text),
                    f"{_WRONG}: with {guided}, the {name} output is {result.text!r} "
                    f"(finish_reason {result.finish_reason!r}).",
                )
            if not manner or is_seed_identical(bench.capabilities) is None:
                bench.same(plain, found, wrong=f"Speculation changed an output that must match ({manner or 'greedy'}).")
            taken += 2
    bench.numbers["outputs_that_match"] = taken
    expect(taken > 0, "The check proves nothing: the backend claims `guided` and refuses every task.")


@check(scope="once", after=("test_generates", "test_outputs_match"), claims=samples("guided"))
def test_what_cannot_match_is_refused(polydraft_bench: Bench) -> None:
    """Malformed schemas, expressions and grammars, and settings that contradict them, are refused before any work.

    Proves: what the engine cannot follow is an error that says why, not an output that does not match.
    A failure means: it was accepted, or refused only after the prefill, or raised another error.
    Look at: `WholeEngine.check_settings`; the core checks what it runs itself.
    """
    session = polydraft_bench.session
    for guided in _MALFORMED:
        _expect_refused(polydraft_bench, (InvalidRequestError, UnsupportedError), {"guided": guided})
    good = {"choice": ["yes", "no"]}
    for contradiction in ({"ignore_eos": True}, {"response_format": {"type": "json_object"}}):
        _expect_refused(polydraft_bench, (InvalidRequestError,), {"guided": good, **contradiction})
    # The session is as good as before.
    expect(
        bool(session.generate("Hello", max_new_tokens=2).token_ids), "After refusals, the session does not generate."
    )


_WRONG = "An output does not match what `guided` asks for"


def _tasks(random: Random) -> list[tuple[dict[str, Any], Callable[[str], bool]]]:
    """What must match, and whether a text does; every output of them is short."""
    words = random.sample(_WORDS, 4)
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": words},
            "ready": {"type": "boolean"},
            "marks": {"type": "array", "items": {"enum": [1, 20, 300]}, "minItems": 2, "maxItems": 4},
            "more": {"anyOf": [{"type": "null"}, {"const": words[0]}]},
        },
        "required": ["name", "ready", "marks", "more"],
        "additionalProperties": False,
    }

    def follows(text: str) -> bool:
        try:
            found = json.loads(text)
        except ValueError:
            return False
        return (
            isinstance(found, dict)
            and list(found) == ["name", "ready", "marks", "more"]
            and found["name"] in words
            and isinstance(found["ready"], bool)
            and isinstance(found["marks"], list)
            and 2 <= len(found["marks"]) <= 4
            and set(found["marks"]) <= {1, 20, 300}
            and found["more"] in (None, words[0])
        )

    pattern = rf"(?:{words[1]}|{words[2]})-[0-9]{{2,4}}(?:, (?:[a-f]{{3}}|é{{1,2}})){{1,3}}"
    grammar = f'start: pair ("; " pair){{0,2}}\npair: WORD " = " NUMBER\nWORD: "{words[0]}" | "{words[3]}"\n'
    return [
        ({"json": schema}, follows),
        ({"choice": words[:3]}, lambda text: text in words[:3]),
        ({"regex": pattern}, lambda text: re.fullmatch(pattern, text) is not None),
        (
            {"grammar": f"{grammar}NUMBER: /[1-9][0-9]?/\n"},
            lambda text: all(
                re.fullmatch(rf"(?:{words[0]}|{words[3]}) = [1-9][0-9]?", one) for one in text.split("; ")
            ),
        ),
    ]


def _record(guided: dict[str, Any]) -> Guided:
    """What the engine is given for ``guided``."""
    ((kind, given),) = guided.items()
    return Guided.model_validate({"kind": kind, "text": given if isinstance(given, str) else json.dumps(given)})


def _generated(bench: Bench, prompt: list[int], speculate: Speculate, settings: dict[str, Any]) -> GenerationResult:
    try:
        return bench.session.generate(prompt, speculate=speculate, **settings)
    except UnsupportedError as error:
        if "llguidance" in error.message and "installed" in error.message:
            unchecked(f"{error.message} {error.hint}")
        raise
    except StructuredOutputError as error:
        raise AssertionError(f"{_WRONG}: {error}") from error


def _expect_refused(bench: Bench, errors: tuple[type[Exception], ...], settings: dict[str, Any]) -> None:
    with logged(bench.session) as logs:
        try:
            bench.session.generate("Hello", max_new_tokens=4, **settings)
        except errors as raised:
            expect(
                not isinstance(raised, PolydraftError) or bool(raised.message and raised.hint),
                f"The error for {settings} does not say what is wrong and what to do: {raised}",
            )
        except Exception as other:
            raise AssertionError(f"generate() with {settings} raised {type(other).__name__} ({other}).") from other
        else:
            raise AssertionError(f"generate() accepted {settings}.")
    expect(not any(log.prompt for log in logs or ()), f"generate() with {settings} was refused only after the prefill.")
