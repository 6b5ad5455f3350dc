"""Commands of pip in sentences, in the words that work where they are shown.

Code writes them as for the package index and an activated environment: ``pip install 'polydraft[charts]'``. What is
shown installs the same into this process's environment, from where polydraft came from.
"""

from __future__ import annotations

import re

__all__ = ["pasteable"]

_WORD = r"""(?:'[^'`\n]*'|"[^"`\n]*"|[^\s`'",;()&|]+)"""
_COMMAND = re.compile(rf"(?<!-m )(?<!uv )(?<![\w./-])pip (install|uninstall)((?: {_WORD})+)")
"""A command of pip in a sentence; one that names its environment is another process's own, and is left alone."""


def pasteable(text: str) -> str:
    """The text, with what pip is told to install in the words that work here."""
    return _COMMAND.sub(_here, text) if "pip " in text else text


def _here(found: re.Match[str]) -> str:
    # Every command imports this module, and few show such a hint: what it takes to read metadata is imported for those.
    from polydraft._pip_command import command_here

    return command_here(found[1], re.findall(_WORD, found[2]))
