"""Options that several commands share, and how a command takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from polydraft._flags import FLAGS
from polydraft._presentable import presentable

__all__ = [
    "MEASURING",
    "CommandState",
    "Debug",
    "Json",
    "LoadLimit",
    "MeasuredPrompts",
    "Verbose",
    "engine_names",
    "given_flags",
    "loading_options",
    "takes_options",
    "target_names",
]

MEASURING = "How it measures"
"""The panel of what `bench` and `tune` have in common."""


@dataclass
class CommandState:
    """State kept for the error handler: whether to print a traceback."""

    debug: bool = False


def _note_debug(context: typer.Context, value: bool) -> bool:
    if value and isinstance(context.obj, CommandState):
        context.obj.debug = True
    return value


def _show_log(value: bool) -> bool:
    if value:
        import logging

        class Presentable(logging.Formatter):
            """Names in messages come from files and servers."""

            def format(self, record: logging.LogRecord) -> str:
                return presentable(super().format(record))

        handler = logging.StreamHandler()
        handler.setFormatter(Presentable("%(message)s"))
        logging.basicConfig(handlers=[handler], force=True)
        logging.getLogger("polydraft").setLevel(logging.INFO)
    return value


MeasuredPrompts = Annotated[
    Path | None,
    typer.Option(
        *FLAGS["prompts"],
        metavar="FILE",
        help="Prompts to measure: plain text with lines of --- between them, .json or .jsonl. Default: code, "
        "prose, chats and lists.",
        rich_help_panel=MEASURING,
    ),
]
LoadLimit = Annotated[
    float | None,
    typer.Option(
        *FLAGS["load_limit"],
        metavar="SECONDS",
        help="Give up an engine that has not been loaded by then. Default: 600.",
        rich_help_panel=MEASURING,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object on standard output, and nothing else there; nothing if the command cannot run.",
        rich_help_panel="Output",
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_note_debug, is_eager=True, help="Show the traceback of an error.", rich_help_panel="Output"
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_show_log,
        is_eager=True,
        help="Show on standard error why this backend and this drafter were chosen.",
        rich_help_panel="Output",
    ),
]


def _backends(incomplete: str) -> list[str]:
    from polydraft._plugins import default_host

    return _starting(incomplete, ["auto", *default_host().backends()])


def engine_names(incomplete: str) -> list[str]:
    """For completion: the engines that can be installed."""
    from polydraft._registry.engines import known_engines

    return _starting(incomplete, known_engines())


def target_names(incomplete: str) -> list[str]:
    """For completion: the targets that have a name here."""
    from polydraft._plugins import default_host
    from polydraft._registry.pairs import PairRegistry

    host = default_host()
    own = [f"builtin:{name}" for name in host.local_models()]
    return _starting(incomplete, [*own, *(entry.pair.target for entry in PairRegistry.of(host).entries)])


def _one_of(*values: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return _starting(incomplete, values)

    return complete


def _starting(incomplete: str, values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value.startswith(incomplete)})


def _option(
    panel: str,
    argument: str,
    kind: Any,
    text: str,
    *,
    default: Any = None,
    metavar: str | None = None,
    complete: Callable[[str], list[str]] | None = None,
) -> inspect.Parameter:
    """A command's parameter for an argument of the library.

    The help is the command line's own. ``GenerationSettings`` describes the same settings, but importing it would
    triple the time that ``--help`` takes.
    """
    option = typer.Option(
        default, *FLAGS[argument], metavar=metavar, help=text, rich_help_panel=panel, autocompletion=complete
    )
    return inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


_loads = partial(_option, "What runs")
_sets = partial(_option, "How it generates")
_COUNT, _NUMBER, _TEXT, _TEXTS = int | None, float | None, str | None, list[str] | None

_GROUPS = {
    "loading": (
        _loads(
            "target",
            _TEXT,
            "Hub id, folder or builtin:<name> of the target. Default: a built-in pair that the backend loads.",
            metavar="TARGET",
            complete=target_names,
        ),
        _loads(
            "drafter",
            _TEXT,
            "auto, the default: the target's own, else n-gram; ngram: looked up in the text so far; none: plain "
            "decoding; or a Hub id, folder or builtin:<name>.",
            metavar="DRAFTER",
        ),
        _loads(
            "backend",
            str,
            "auto, or a name that `polydraft backends` lists.",
            default="auto",
            metavar="NAME",
            complete=_backends,
        ),
        _loads(
            "num_speculative_tokens",
            _TEXT,
            "Tokens drafted in one round, the bonus token excluded; auto: picked for each round, 0 included, by "
            "measured times and acceptance. Default: what the registry recommends, else 4.",
            metavar="K",
        ),
        _loads(
            "quantization",
            str,
            "auto: the least quantized weights that fit into memory; none: not quantized; or q4_0, 8bit, ...: see "
            "`polydraft pairs MODEL`.",
            default="auto",
            metavar="NAME",
        ),
        _loads(
            "dtype",
            str,
            "auto, float32, bfloat16 or float16.",
            default="auto",
            metavar="NAME",
            complete=_one_of("auto", "float32", "bfloat16", "float16"),
        ),
        _loads(
            "device",
            str,
            "auto, cpu, cuda, cuda:1, mps, ...",
            default="auto",
            metavar="NAME",
            complete=_one_of("auto", "cpu", "cuda", "mps"),
        ),
        _loads(
            "context_length",
            _COUNT,
            "Prompt and output together. Default: the model's own, within memory.",
            metavar="TOKENS",
        ),
        _loads(
            "prefix_cache_bytes",
            _COUNT,
            "Memory for the KV that the next turns reuse; 0: every prompt is run from its start. Default: 1 GiB.",
            metavar="BYTES",
        ),
        _loads(
            "exactness",
            str,
            "standard, or bitwise where the backend has it.",
            default="standard",
            metavar="NAME",
            complete=_one_of("standard", "bitwise"),
        ),
        _loads(
            "isolation",
            str,
            "process: the engine in a process of its own; none: in this one; auto: in this one, unless it is installed "
            "elsewhere or clashes with what is loaded.",
            default="auto",
            metavar="NAME",
            complete=_one_of("auto", "process", "none"),
        ),
        _loads(
            "engine_options",
            _TEXTS,
            "An option of the backend's own, value in JSON or plain text. May be repeated.",
            metavar="NAME=VALUE",
        ),
        _loads(
            "revision",
            _TEXT,
            "Branch, tag or commit of the target on the Hub; a drafter's: --drafter org/name@revision.",
        ),
        _loads("local_files_only", bool, "Use models of the local Hub cache only.", default=False),
        _loads("trust_remote_code", bool, "Allow engines to run code from a checkpoint.", default=False),
        _loads(
            "install",
            str,
            "An engine that is not installed: ask, at a terminal; yes: install it; no.",
            default="ask",
            metavar="WHEN",
            complete=_one_of("ask", "yes", "no"),
        ),
    ),
    "settings": (
        _sets("max_new_tokens", _COUNT, "Tokens to generate at most, EOS included.", metavar="N"),
        _sets("min_new_tokens", _COUNT, "EOS is suppressed until this many are generated.", metavar="N"),
        _sets("temperature", _NUMBER, "0 is greedy.", metavar="T"),
        _sets("top_p", _NUMBER, "Nucleus sampling.", metavar="P"),
        _sets("top_k", _COUNT, "Keep the N largest logits; 0 keeps all.", metavar="N"),
        _sets("min_p", _NUMBER, "Drop tokens below P times the largest probability.", metavar="P"),
        _sets("typical_p", _NUMBER, "Locally typical sampling.", metavar="P"),
        _sets("repetition_penalty", _NUMBER, "For tokens of prompt and output; above 1 discourages.", metavar="P"),
        _sets("presence_penalty", _NUMBER, "Subtracted from logits of the output's tokens, -2 to 2.", metavar="P"),
        _sets("frequency_penalty", _NUMBER, "Subtracted times their number in the output, -2 to 2.", metavar="P"),
        _sets("logit_bias", _TEXTS, "Added to a token's logit, -100 to 100. May be repeated.", metavar="ID=BIAS"),
        _sets("banned_token_ids", list[int] | None, "Never choose this token. May be repeated.", metavar="ID"),
        _sets("forced_token_ids", _TEXTS, "The token at an index of the output. May be repeated.", metavar="INDEX=ID"),
        _sets(
            "guided",
            _TEXTS,
            "What the output must match: json=SCHEMA, regex=TEXT, grammar=TEXT, or choice=TEXT, which may be repeated; "
            "json=@FILE reads a file.",
            metavar="KIND=VALUE",
        ),
        _sets(
            "acceptance",
            _TEXT,
            "exact-match, the default; or rejection: then the tokens of a seed depend on k and drafter.",
            metavar="RULE",
        ),
        _sets("seed", _COUNT, "Drawn where it is not given; --json shows it.", metavar="N"),
        _sets("stop", _TEXTS, "End before this text. May be repeated.", metavar="TEXT"),
        _sets("ignore_eos", bool, "Continue past the end of sequence.", default=False),
    ),
}
"""The options that a command's parameter stands for: ``loading`` for arguments of ``load``, ``settings`` for those of
``generate``. The command gets them as a dict."""


def loading_options(*but: str) -> list[str]:
    """The names of the options in ``loading``, without some of them."""
    return [option.name for option in _GROUPS["loading"] if option.name not in but]


def given_flags(context: typer.Context, *but: str) -> list[str]:
    """The flags that were given to a command, without those of some parameters."""
    return [
        option.opts[0]
        for option in context.command.params
        if option.name not in but and _is_given(context, option.name)
    ]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: ``loading`` and ``settings`` become options, ``--verbose`` and ``--debug`` are added."""
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: group for name, group in _GROUPS.items() if name in own}
    added = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("verbose", Verbose), ("debug", Debug))
        if name not in own
    }

    @wraps(command)
    def run(**given: Any) -> None:
        for name in added:
            del given[name]
        for name, group in groups.items():
            given[name] = {option.name: given.pop(option.name) for option in group}
        command(**given)

    shown = [option for name, one in own.items() for option in groups.get(name, (one,))]
    keyword_only = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in shown]
    run.__signature__ = inspect.Signature([*keyword_only, *added.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {}  # typer is to read the signature
    return run
