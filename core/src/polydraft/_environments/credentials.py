"""Users and passwords of package indexes, away from command lines: other users of the machine can read those."""

from __future__ import annotations

import ast
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from polydraft._environments.runner import child_environ
from polydraft._presentable import holds_credentials

__all__ = ["in_a_file", "in_a_netrc", "settings_of_pip"]

_TAKE_URLS = {"--index-url", "--extra-index-url", "--find-links", "--constraint", "-c", "-e"}
_INDEXES = {
    "index-url": "PIP_INDEX_URL",
    "extra-index-url": "PIP_EXTRA_INDEX_URL",
    "find-links": "PIP_FIND_LINKS",
}
"""pip's settings that hold URLs, and the variables that override them."""
_SECTIONS = {"global", "install", ":env:"}
"""Of pip's settings, those that count for an installation."""


def settings_of_pip(python: str | Path) -> Iterator[tuple[str, list[str]]]:
    """What pip is set to, by files and variables: a setting (``index-url``) and its values; nothing without pip.

    Args:
        python: The interpreter that has pip.
    """
    try:
        command = [str(python), "-I", "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=child_environ())
    except (OSError, subprocess.SubprocessError):  # no pip here
        return
    for line in listed.stdout.splitlines():
        # global.index-url='https://...', install.find-links=..., :env:.cert=...
        name, _, value = line.partition("=")
        section, _, setting = name.rpartition(".")
        if section not in _SECTIONS:
            continue
        try:
            values = str(ast.literal_eval(value)).split()
        except (ValueError, SyntaxError):
            continue
        if values:
            yield setting.replace("_", "-"), values


def in_a_file(command: Sequence[str], folder: Path) -> list[str]:
    """A command of pip or uv that installs, its words with credentials moved to a file of requirements.

    Args:
        command: The command.
        folder: Where the file is made, which only this user may read.
    """
    kept, moved = list[str](), list[str]()
    for word in command:
        if not holds_credentials(word):
            kept.append(word)
        elif kept and kept[-1] in _TAKE_URLS:
            moved.append(f"{kept.pop()} {word}")
        else:
            moved.append(word)
    return [*kept, "-r", str(_private(folder, moved))] if moved else kept


def in_a_netrc(python: Path, folder: Path) -> dict[str, str]:
    """Variables for pip that move credentials of its settings to a netrc file; empty where there are none.

    For what it builds, pip starts another pip, with the URLs of all indexes as arguments. Where one host has several
    passwords, a netrc file cannot tell them: then nothing is moved.

    Args:
        python: The interpreter that has pip.
        folder: Where the file is made, which only this user may read.
    """
    # pip lists a section `install`, which counts, after `global`; variables count most.
    found = {name: values for name, values in settings_of_pip(python) if name in _INDEXES}
    found |= {name: os.environ[variable].split() for name, variable in _INDEXES.items() if os.environ.get(variable)}
    if not any(holds_credentials(url) for values in found.values() for url in values):
        return {}
    hosts: dict[str, set[tuple[str, str]]] = {}
    without: dict[str, str] = {}
    for name, values in found.items():
        urls = []
        for url in values:
            parts = urlsplit(url)
            if parts.username is not None and parts.hostname is not None:
                login = unquote(parts.username), unquote(parts.password or "")
                hosts.setdefault(parts.hostname, set()).add(login)
                parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
            urls.append(parts.geturl())
        without[_INDEXES[name]] = " ".join(urls)
    if any(len(logins) > 1 for logins in hosts.values()):
        return {}
    lines = [
        f"machine {host} login {_quoted(user)} password {_quoted(password)}"
        for host, logins in hosts.items()
        for user, password in logins
    ]
    return {**without, "NETRC": str(_private(folder, [*_own_netrc(), *lines]))}


def _own_netrc() -> list[str]:
    """The lines of the user's own netrc file: the last entry of a host counts."""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            return path.read_text("utf-8").splitlines()
        except (OSError, ValueError):
            continue
    return []


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _private(folder: Path, lines: Iterable[str]) -> Path:
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".txt")  # mode 600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return Path(name)
