"""Outputs that must match: what ``guided`` asks for as a grammar of llguidance, checked, and made ready for a model.

llguidance (https://github.com/guidance-ai/llguidance) says after each prefix which tokens may come next. It is an
optional dependency, ``polydraft[structured]``, of the process that the engine runs in.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

from polydraft.errors import InvalidRequestError, UnsupportedError
from polydraft.sampling._grammar import GrammarRun, in_short
from polydraft.sampling._grammar_depth import depth_of
from polydraft.sampling._schema_shape import misused_keyword
from polydraft.text.ids_only import IdsOnlyTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polydraft.contract.requests import Guided, TokenRequest
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["JSON_LAYOUT", "Grammars", "check_guided", "depth_of", "lark_of", "misused_keyword"]

JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON on one line, as ``json.dumps`` writes it: with free white space, a model may go on with it to no end. A schema
changes it by a key ``x-guidance`` of its own, which llguidance reads."""

_KEPT = 32
"""Grammars that are kept ready: making one takes milliseconds, and calls repeat themselves."""
_LONGEST = 1 << 20
_DEEPEST = 200
"""Brackets inside one another: deeper ones end a process in llguidance's recursion."""
_LONGEST_CHAIN = 500
"""Brackets and rules inside one another: 2,000 end a thread whose stack has 8 MiB."""
_NAMES = {"json": "JSON schema", "regex": "regular expression", "choice": "list of choices", "grammar": "grammar"}
_NOT_TAKEN_BACK = re.compile(r"^\s*[\w-]+\s*\[[^\]]*\b(?:stop|max_tokens|temperature)\s*=[^\]]*\]\s*:", re.MULTILINE)
"""Attributes of a rule: llguidance does not roll back past them, or leaves the choice of tokens to others."""
_OUR_LINES = re.compile(r"^(?:ERROR: )?at \d+\(\d+\): |\n\s*1 \| .*", re.DOTALL)
"""Where an error of llguidance quotes the grammar that is made of a schema, an expression or choices."""
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def check_guided(guided: Guided) -> None:
    """Refuse what llguidance cannot read, before a model is asked.

    Raises:
        InvalidRequestError: It is malformed, nothing can match it, or it is too large.
        UnsupportedError: A schema has keywords that llguidance does not know; or llguidance is not installed.
    """
    _check_size(guided)
    grammar = _grammar(guided)
    _check_chains(guided, grammar)
    message = _library().LLMatcher.validate_grammar(grammar)
    if message and not message.startswith("WARNING"):
        _refuse(guided, message)
    if guided.kind != "grammar":  # which may name tokens of the model
        # A thought before it would put off what goes wrong.
        answer = _grammar(guided.model_copy(update={"thought": None}))
        _check_start(guided, _library().LLMatcher(_bytes(), answer, log_level=0))


class Grammars:
    """The grammars of one model: its vocabulary in llguidance's form, and the latest grammars, ready for use.

    Any thread may call it.

    Args:
        tokenizer: The target's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._made: OrderedDict[str, Any] = OrderedDict()
        self._vocabulary: Any = None

    def check(self, guided: Guided) -> None:
        """Refuse what cannot be matched: errors are those of ``run``."""
        self._matcher(guided)

    def run(self, request: TokenRequest) -> GrammarRun | None:
        """What the output of a request must match, at its start; None: nothing.

        Raises:
            InvalidRequestError: The grammar is malformed, nothing can match it, or it is too large.
            UnsupportedError: A schema has keywords that llguidance does not know; llguidance is not installed; or the
                model has no tokenizer, or no end-of-sequence token.
        """
        guided = request.settings.guided
        if guided is None:
            return None
        matcher = self._matcher(guided).deep_copy()
        lost = partial(self._forget, guided)
        return GrammarRun(matcher, len(request.prompt_token_ids), request.eos_token_ids, lost)

    def _forget(self, guided: Guided) -> None:
        """Make the grammar anew next time: what went wrong in one copy is remembered in what all share."""
        with self._lock:
            self._made.pop(guided.model_dump_json(), None)

    def _matcher(self, guided: Guided) -> Any:
        """An ``llguidance.LLMatcher`` at its start, to be copied."""
        key = guided.model_dump_json()
        with self._lock:
            made = self._made.get(key)
            if made is None:
                check_guided(guided)
                made = _library().LLMatcher(self._words(), _grammar(guided), log_level=0)
                _check_start(guided, made)
                self._made[key] = made
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return made

    def _words(self) -> Any:
        """The vocabulary; making it takes about a second for 262,144 tokens."""
        if self._vocabulary is None:
            library, tokenizer = _library(), self._tokenizer
            if isinstance(tokenizer, IdsOnlyTokenizer):
                raise UnsupportedError(
                    "`guided` was given, and this model has no tokenizer to match the output's text.",
                    "Save the model's tokenizer next to its weights.",
                )
            ends = sorted(one for one in tokenizer.eos_token_ids if one < tokenizer.vocab_size)
            if not ends:
                raise UnsupportedError(
                    "`guided` was given, and this model has no end-of-sequence token, which ends an output that "
                    "matches.",
                    "Name it in the checkpoint's generation_config.json (`eos_token_id`).",
                )
            wrapped = library.TokenizerWrapper(vocabulary := _Vocabulary(tokenizer, ends))
            self._vocabulary = library.LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, eos_token=ends)
            # It has been read; some ten megabytes.
            wrapped.tokens = vocabulary.tokens = []
        return self._vocabulary


class _Vocabulary:
    """A tokenizer with the attributes that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        from polydraft.text._chat_parser import marks_of

        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        # What brackets a thought or a call is no text, even if the tokenizer does not call it special.
        special: Iterable[int] = {*tokenizer.special_token_ids, *ends, *marks_of(tokenizer)}
        self.special_token_ids = sorted(one for one in special if one < tokenizer.vocab_size)

    def __call__(self, text: bytes | str) -> list[int]:
        """Token ids of a text, for drafts of what a grammar forces."""
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def lark_of(guided: Guided) -> str | None:
    """What ``guided`` asks for as one Lark grammar, a thought before it included; None for a grammar after a thought.

    For engines that run llguidance themselves.
    """
    if guided.thought is None and guided.kind == "grammar":
        return _lark_grammar(guided)
    if guided.kind == "grammar":
        return None
    return f"{_thought_rules(guided)}answer: {_lark_value(guided)}\n"


def _grammar(guided: Guided) -> str:
    """The grammar in llguidance's own form, a JSON text."""
    lark = lark_of(guided)
    if lark is not None:
        return json.dumps({"grammars": [{"lark_grammar": lark}]})
    rules = _thought_rules(guided).replace("start: answer", "start: @answer").replace(" answer\n", " @answer\n")
    parts = [{"lark_grammar": rules}, {"name": "answer", "lark_grammar": _lark_grammar(guided)}]
    return json.dumps({"grammars": parts})


def _thought_rules(guided: Guided) -> str:
    """The start of a grammar whose rule ``answer`` follows."""
    thought = guided.thought
    if thought is None:
        return "start: answer\n"
    # Tokens by their ids. What lies between them is text: no special token.
    begun, end = f"<[{thought.open}]>", f"THOUGHT <[{thought.close}]> answer\n"
    start = f"start: {end}" if thought.begun else f"start: answer | {begun} {end}"
    return f"{start}THOUGHT: /(?s:.*)/\n"


def _lark_value(guided: Guided) -> str:
    if guided.kind == "json":
        schema = guided.data
        if schema is False:
            _refuse(guided, "no value matches the schema `false`")
        given = {} if schema is True else schema
        layout = given.get("x-guidance", {})
        if not isinstance(layout, dict):
            _refuse(guided, "its key x-guidance is no object")
        return f"%json {json.dumps({**given, 'x-guidance': {**JSON_LAYOUT, **layout}})}"
    if guided.kind == "choice":
        # A terminal, in capitals: as alternatives of a rule, 2,000 choices would be the most.
        return f"CHOICE\nCHOICE: {' | '.join(json.dumps(one, ensure_ascii=False) for one in guided.data)}"
    return f"/{_library().regex_to_lark(guided.text, '')}/"


def _lark_grammar(guided: Guided) -> str:
    """A grammar of the caller's, translated from GBNF if it is that."""
    if _NOT_TAKEN_BACK.search(guided.text):
        raise UnsupportedError(
            "The grammar in `guided` has `stop`, `max_tokens` or `temperature` in a rule, which cannot be taken back "
            "with rejected drafts.",
            "Use `suffix`, or an expression of limited length.",
        )
    if "::=" not in guided.text:
        return guided.text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(guided.text))
    except Exception as error:
        _refuse(guided, f"it is not GBNF: {error}")


def _check_start(guided: Guided, matcher: Any) -> None:
    """Refuse what goes wrong at the first token, or allows none: some limits of llguidance show only there."""
    for _ in range(2):  # that its lexer has come to its limits, a matcher tells the next copy
        copy = matcher.deep_copy()
        mask = copy.compute_bitmask()
        copy.compute_ff_tokens()
        if copy.is_error() and not copy.get_error().startswith("NoExtension"):
            _refuse(guided, copy.get_error())
        if copy.is_error() or not any(mask) or (copy.is_stopped() and not copy.is_accepting()):
            _refuse(guided, "no text matches it")


def _check_size(guided: Guided) -> None:
    if len(guided.text) > _LONGEST:
        _refuse(guided, f"it has {len(guided.text)} characters, and {_LONGEST} are the most")
    depth = deepest = 0
    for character in guided.text:
        depth = max(depth + _BRACKETS.get(character, 0), 0)
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        _refuse(guided, f"its brackets are {deepest} deep, and {_DEEPEST} are the most")


def _check_chains(guided: Guided, grammar: str) -> None:
    """Refuse rules, or references of a schema, that lead to one another in a long chain."""
    depth = 0
    for one in json.loads(grammar)["grammars"]:
        try:
            depth += depth_of(one["lark_grammar"])
        except ValueError as error:
            _refuse(guided, str(error))
    if depth > _LONGEST_CHAIN:
        _refuse(guided, f"its rules lie up to {depth} deep inside one another, and {_LONGEST_CHAIN} are the most")


def _refuse(guided: Guided, reason: str) -> NoReturn:
    if guided.kind != "grammar":  # the lines that are quoted, and their numbers, are not the caller's
        reason = _OUR_LINES.sub("", reason)
    reason = in_short(reason)
    if "nimplemented" in reason or "not supported" in reason:
        raise UnsupportedError(
            f"The {_NAMES[guided.kind]} in `guided` asks for what llguidance does not have: {reason}.",
            "Leave it out, and check it in the answer.",
        )
    raise InvalidRequestError(
        f"The {_NAMES[guided.kind]} in `guided` cannot be used: {reason}.",
        "Correct it; docs/structured-output.md says what is possible.",
        argument="guided",
    )


@cache
def _bytes() -> Any:
    """A vocabulary of bytes, for grammars without a model."""
    return _library().LLTokenizer("byte")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UnsupportedError(
            "`guided` needs llguidance, which is not installed where the engine runs.",
            "Run: pip install 'polydraft[structured]'",
        ) from error
    return llguidance
