"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

__all__ = [
    "AcceptanceOption",
    "BackendOption",
    "BanToken",
    "CommandState",
    "ContextLength",
    "Debug",
    "Device",
    "DrafterOption",
    "Dtype",
    "EngineOption",
    "ExactnessOption",
    "ForceToken",
    "FrequencyPenalty",
    "IgnoreEos",
    "Json",
    "K",
    "LogitBias",
    "MaxNewTokens",
    "MinNewTokens",
    "MinP",
    "Model",
    "Offline",
    "PresencePenalty",
    "RepetitionPenalty",
    "Revision",
    "Seed",
    "Stop",
    "Temperature",
    "TopK",
    "TopP",
    "TrustRemoteCode",
]


@dataclass
class CommandState:
    """What outlives a command: how its error shall be told."""

    debug: bool = False


def _note_debug(context: typer.Context, value: bool) -> bool:
    if value and isinstance(context.obj, CommandState):
        context.obj.debug = True
    return value


_LOADING, _SAMPLING, _OUTPUT = "What runs", "How it generates", "Output"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="TARGET",
        help="Hub id, folder or builtin:<name> of the target. Default: the built-in pair, if installed.",
        rich_help_panel=_LOADING,
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        "-d",
        metavar="DRAFTER",
        help="auto: the target's own, else n-gram; ngram: looked up in the text so far; none: plain decoding; or a "
        "Hub id, folder or builtin:<name>.  [default: auto]",
        rich_help_panel=_LOADING,
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="auto, or a name that `polydraft backends` lists.",
        rich_help_panel=_LOADING,
    ),
]
K = Annotated[
    int | None,
    typer.Option(
        "-k",
        "--num-speculative-tokens",
        metavar="K",
        help="Tokens drafted in one round, the bonus token excluded. Default: what the registry recommends, else 4.",
        rich_help_panel=_LOADING,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_LOADING)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...", rich_help_panel=_LOADING)]
ContextLength = Annotated[
    int | None,
    typer.Option(
        "--context-length",
        metavar="TOKENS",
        help="Prompt and output together. Default: the model's own, within memory.",
        rich_help_panel=_LOADING,
    ),
]
ExactnessOption = Annotated[
    str,
    typer.Option("--exactness", help="standard, or bitwise where the backend has it.", rich_help_panel=_LOADING),
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option",
        metavar="NAME=VALUE",
        help="An option of the backend's own, value in JSON or plain text. May be repeated.",
        rich_help_panel=_LOADING,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of the target on the Hub; a drafter's: --drafter org/name@revision.",
        rich_help_panel=_LOADING,
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use models of the local Hub cache only.", rich_help_panel=_LOADING)
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow code that a checkpoint brings.", rich_help_panel=_LOADING),
]

MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", "-n", metavar="N", help="Tokens to generate at most.", rich_help_panel=_SAMPLING),
]
MinNewTokens = Annotated[
    int | None,
    typer.Option("--min-new-tokens", metavar="N", help="No end of sequence before so many.", rich_help_panel=_SAMPLING),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", metavar="T", help="0 is greedy.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Nucleus sampling.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", metavar="N", help="Keep the N largest logits; 0: all.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", metavar="P", help="Drop tokens below P times the best one's probability.", rich_help_panel=_SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="P",
        help="Of tokens that prompt or output have; above 1 discourages.",
        rich_help_panel=_SAMPLING,
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty", metavar="P", help="Of tokens that the output has, -2 to 2.", rich_help_panel=_SAMPLING
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        metavar="P",
        help="The same, times their number in the output, -2 to 2.",
        rich_help_panel=_SAMPLING,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID=BIAS",
        help="Added to the logit of a token id, -100 to 100. May be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
BanToken = Annotated[
    list[int] | None,
    typer.Option(
        "--ban-token", metavar="ID", help="Never choose this token id. May be repeated.", rich_help_panel=_SAMPLING
    ),
]
ForceToken = Annotated[
    list[str] | None,
    typer.Option(
        "--force-token",
        metavar="INDEX=ID",
        help="The token id at an index of the output, from 0. May be repeated.",
        rich_help_panel=_SAMPLING,
    ),
]
AcceptanceOption = Annotated[
    str | None,
    typer.Option(
        "--acceptance",
        metavar="RULE",
        help="exact-match, or rejection: then the tokens of a seed depend on k and drafter.  [default: exact-match]",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Drawn, and told with --json, if not given.", rich_help_panel=_SAMPLING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text. May be repeated.", rich_help_panel=_SAMPLING),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on past the end of sequence.", rich_help_panel=_SAMPLING)
]

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object on standard output, and nothing else there; nothing at all if the command fails.",
        rich_help_panel=_OUTPUT,
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_note_debug, is_eager=True, help="Show the traceback of an error.", rich_help_panel=_OUTPUT
    ),
]
