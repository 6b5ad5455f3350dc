"""What begins with a slash in a chat: commands that change the conversation, not messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from polydraft._cli.prompts import given_text
from polydraft._flags import FLAGS
from polydraft.checkpoints._names import did_you_mean
from polydraft.errors import InvalidRequestError

if TYPE_CHECKING:
    from polydraft._cli.conversation import Conversation

__all__ = ["HELP", "run_command"]

HELP = '''\
/set              shows the settings; /set temperature 0.7 changes one, /unset temperature restores its default
/set speculate off, on or auto
/reset            forgets the conversation
/save FILE        writes the conversation: as JSON messages, or as text where FILE ends in .md or .txt
/help             shows this
/exit             ends; so does Ctrl-D
"""text"""        is a message of several lines; so is a line that ends with \\, with the next one
//text            is a message that begins with a slash
Ctrl-C            cancels an answer; the arrow keys find earlier messages'''

_NAMES = ("/exit", "/quit", "/help", "/reset", "/save", "/set", "/unset")


def run_command(text: str, conversation: Conversation) -> str:
    """Do what a line such as ``/set seed 3`` asks for, and return what is to be said about it.

    Raises:
        InvalidRequestError: There is no such command or setting, or the file cannot be written.
    """
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "The conversation is forgotten."
    if name == "/save":
        return _save(rest, conversation)
    if name == "/set":
        return _set(rest, conversation.settings)
    if name == "/unset":
        argument = _argument(rest)
        if conversation.settings.pop(argument, None) is None:
            raise InvalidRequestError(f"{argument or 'Nothing'} is set.", "/set shows what is.")
        return f"{argument} has its default."
    hint = f"{did_you_mean(name, _NAMES)} /help lists the commands; // begins a message with a slash.".strip()
    raise InvalidRequestError(f"There is no command {name}.", hint)


def _argument(name: str) -> str:
    """A setting's name, given as in Python or as the command line's flag, with or without its hyphens."""
    short = next((argument for argument, flags in FLAGS.items() if name in flags), None)
    return short or name.lstrip("-").replace("-", "_")


def _set(text: str, settings: dict[str, Any]) -> str:
    from polydraft._session.settings import effective_settings
    from polydraft.contract.requests import DEFAULT_SETTINGS, Speculate

    if not text:
        shown = {name: value for name, value in DEFAULT_SETTINGS.model_dump().items() if value not in (None, (), {})}
        shown |= {name: value for name, value in settings.items() if name != "chat_template_kwargs"}
        return "\n".join(f"{name} = {json.dumps(value)}" for name, value in shown.items())
    name, _, written = text.replace("=", " ", 1).partition(" ")
    argument, written = _argument(name), given_text("The setting", written.strip())
    if not written:
        raise InvalidRequestError(f"/set {name} gives no value.", f"For example /set {name} 1.")
    if argument == "speculate":
        if written not in get_args(Speculate):
            raise InvalidRequestError(f"speculate cannot be {written}.", f"Give {', '.join(get_args(Speculate))}.")
        settings[argument] = written
        return f"speculate = {written}"
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        value = written
    if argument in {"logit_bias", "forced_token_ids"} and isinstance(value, dict):  # keys of JSON are texts
        value = {int(key) if key.lstrip("-").isdecimal() else key: one for key, one in value.items()}
    changed = {argument: str(value) if argument == "stop" and not isinstance(value, list) else value}
    known = {key: one for key, one in settings.items() if key not in {"speculate", "chat_template_kwargs"}}
    try:
        effective_settings({**known, **changed}, vocab_size=None)
    except InvalidRequestError as error:  # settings are named here as in Python, not by the command line's flags
        raise InvalidRequestError(error.message.replace("`", ""), error.hint.replace("`", "")) from error
    settings.update(changed)
    return f"{argument} = {json.dumps(changed[argument])}"


def _save(written: str, conversation: Conversation) -> str:
    if not written:
        raise InvalidRequestError("/save needs the name of a file.", "For example /save chat.json.")
    if not conversation.messages:
        raise InvalidRequestError("There is nothing to save yet.", "Send a message first.")
    path = Path(written).expanduser()
    if path.suffix.lower() in {".md", ".txt"}:
        text = "\n\n".join(f"**{one['role']}**\n\n{one['content']}" for one in conversation.messages)
    else:
        text = json.dumps(conversation.messages, ensure_ascii=False, indent=2)
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{text}\n")
    except FileExistsError as error:
        raise InvalidRequestError(f"{path} exists.", "Name another file; nothing is overwritten.") from error
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror or error}.", "Check the path.") from error
    return f"{len(conversation.messages)} messages are in {path}."
