"""Checkpoints that say unusual things about BOS, ends and chat templates, and what they mean in every engine.

An engine's own tests make each one from the built-in ``tiny-llama``, load it, and call ``check_meaning``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft.contract import Tokenizer

__all__ = ["ODD_CHECKPOINTS", "OddCheckpoint", "check_meaning", "make_checkpoint"]

_USUAL = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
_TOOL = {"type": "function", "function": {"name": "é<"}}
_HI = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True, slots=True)
class OddCheckpoint:
    """A change to a checkpoint's folder, and the meaning of the result."""

    name: str
    change: Callable[[Path], None]
    bos: bool = True
    """Whether texts begin with BOS."""
    ends: tuple[str, ...] = ("<eos>", "<turn|>", "<|tool_response>")
    chat: str = _USUAL
    """One message of the user, "Hi"."""
    tools: str | None = None
    """The same with a tool; None: not compared."""


def _edit(folder: Path, file: str, **values: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    path = folder / file
    data = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}), encoding="utf-8")


def _ends_in_generation_config(folder: Path) -> None:
    _edit(folder, "config.json", eos_token_id=None)
    _edit(folder, "tokenizer_config.json", eos_token=None)
    _edit(folder, "generation_config.json", eos_token_id=[1, 5, 13, 40])


def _template_in_tokenizer_config(folder: Path) -> None:
    source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    _edit(folder, "tokenizer_config.json", chat_template=source)


def _named_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = {
        "default": "{{ bos_token }}Q: {{ messages[0].content }}{{ eos_token }}",
        "tool_use": "{{ bos_token }}T: {{ tools | tojson }}",
    }
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    _edit(folder, "tokenizer_config.json", chat_template=listed)


def _templates_in_files(folder: Path) -> None:
    _edit(folder, "tokenizer_config.json", chat_template="not this one")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | tojson(indent=1) }}", encoding="utf-8")


def _bos_by_the_tokenizer(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    first, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}
    pair = [first, text, {"Sequence": {"id": "B", "type_id": 1}}]
    processor = {"type": "TemplateProcessing", "single": [first, text], "pair": pair, "special_tokens": tokens}
    _edit(folder, "tokenizer.json", post_processor=processor)


def _bos_that_nothing_uses(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")


ODD_CHECKPOINTS = (
    OddCheckpoint(
        "ends-only-in-generation-config",
        _ends_in_generation_config,
        ends=("<eos>", "<turn|>", "<|tool_response>", "2"),  # the token of id 40
    ),
    OddCheckpoint(
        "no-bos-token",
        lambda folder: _edit(folder, "tokenizer_config.json", bos_token=None),
        bos=False,
        chat=_USUAL.removeprefix("<bos>"),
    ),
    OddCheckpoint("template-only-in-tokenizer-config", _template_in_tokenizer_config),
    OddCheckpoint("missing-turn-end", lambda folder: _edit(folder, "generation_config.json", eos_token_id=1)),
    OddCheckpoint(
        "named-templates",
        _named_templates,
        chat="<bos>Q: Hi<eos>",
        tools='<bos>T: [{"type": "function", "function": {"name": "é<"}}]',
    ),
    OddCheckpoint(
        "templates-in-files",
        _templates_in_files,
        tools='[\n {\n  "type": "function",\n  "function": {\n   "name": "é<"\n  }\n }\n]',
    ),
    OddCheckpoint("bos-by-the-tokenizer", _bos_by_the_tokenizer, chat="<bos>Hi"),
    OddCheckpoint("bos-that-nothing-uses", _bos_that_nothing_uses, bos=False, chat="Hi"),
)
"""All of them; a test is parametrized over it."""


def make_checkpoint(case: OddCheckpoint, base: Path, folder: Path) -> Path:
    """Copy ``tiny-llama`` from ``base`` to ``folder``, and change it."""
    shutil.copytree(base, folder)
    case.change(folder)
    return folder


def check_meaning(case: OddCheckpoint, tokenizer: Tokenizer) -> None:
    """Assert that a loaded checkpoint means what it should.

    Raises:
        AssertionError: BOS, an end, or a prompt differs.
    """
    assert tokenizer.bos_token_id == (tokenizer.token_id("<bos>") if case.bos else None)
    assert tokenizer.eos_token_ids == {tokenizer.token_id(name) for name in case.ends}
    assert tokenizer.chat(_HI) == tokenizer.encode(case.chat)
    if case.tools is not None:
        assert tokenizer.chat(_HI, tools=[_TOOL]) == tokenizer.encode(case.tools)
    opened = tokenizer.chat(_HI, continue_final_message=True)
    assert opened == tokenizer.encode(case.chat[: case.chat.index("Hi") + 2])
