"""From what pip, uv and a self-test printed before they failed to a sentence, and what mends it."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path

from polydraft._environments.runner import CommandFailedError
from polydraft._environments.sources import own_distributions
from polydraft.errors import EnvironmentSetupError

__all__ = ["explained", "no_space"]

_LONGEST = 300
_NO_NETWORK = (
    *("NewConnectionError", "Temporary failure in name resolution", "Name or service not known", "ConnectTimeoutError"),
    *("Network is unreachable", "No route to host", "Connection refused", "Connection reset", "ConnectionError"),
    *("Max retries exceeded", "ReadTimeoutError", "dns error", "error sending request", "Failed to resolve '"),
    *("client error (Connect)", "ProxyError", "nodename nor servname", "getaddrinfo failed", "timed out"),
    *("after connection broken by", "are you offline", "network was disabled"),
)
_REFUSED = re.compile(r"\b(401|403|407)\b.{0,40}(Error|Unauthorized|Forbidden|Proxy)", re.IGNORECASE)
_MISSING = (
    re.compile(r"No matching distribution found for ([^\s;]+)"),
    re.compile(r"Could not find a version that satisfies the requirement ([^\s;]+)"),
    re.compile(r"Because ([\w.\-\[\]]+) was not found in the package registry"),
    re.compile(r"there is no version of ([\w.\-]+(?:==[\w.+]+)?)"),
    re.compile(r"no version of ([\w.\-]+)\b"),
    re.compile(r"Because ([\w.\-]+) was not found in the provided package locations"),
)
_COMPILING = (
    re.compile(r"Failed building wheel for ([\w.\-]+)"),
    re.compile(r"Failed to build `?([\w.\-]+)"),
    re.compile(r"Could not build wheels for ([\w.\-]+)"),
    re.compile(r"ERROR: (?:Failed to build|Could not build)[^:]*?'([\w.\-]+)'"),
)
_CONFLICT = ("ResolutionImpossible", "conflicting dependencies", "No solution found when resolving", "are incompatible")
_WRONG_PYTHON = ("requires a different Python", "Requires-Python", "does not satisfy Python")
_DAMAGED = ("DO NOT MATCH THE HASHES", "IncompleteRead", "Hash mismatch", "BadZipFile", "ChunkedEncodingError")


def no_space(name: str, folder: Path, log: Path | None, missing: str = "") -> EnvironmentSetupError:
    """The error for a disk that is full, or too small."""
    why = missing or f"The disk of {folder} is full"
    return EnvironmentSetupError(
        f"{why}.",
        "Free some space, or set POLYDRAFT_DATA_DIR to a folder on another disk; then run "
        f"`polydraft engines install {name}` again: what has been downloaded is kept in the cache of pip or uv.",
        log=log,
    )


def explained(name: str, doing: str, failed: CommandFailedError, folder: Path, log: Path) -> EnvironmentSetupError:
    """The error for a command that failed.

    Args:
        name: The engine.
        doing: What the command did, a gerund: ``installing torch``.
        failed: The command and its output.
        folder: Where it wrote to.
        log: The installation's log.
    """
    text = "\n".join(failed.output)
    again = f"then run `polydraft engines install {name}` again"
    see = f"The log is {log}."

    def error(what: str, hint: str) -> EnvironmentSetupError:
        return EnvironmentSetupError(f"{name} could not be installed: {what}.", f"{hint} {see}", log=log)

    if _says(text, "No space left on device", f"[Errno {errno.ENOSPC}]", "os error 28", "Disk quota exceeded"):
        return no_space(name, folder, log)
    if failed.code < 0:
        number = -failed.code
        known = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        memory = " Memory may have run out: end some programs." if known == "SIGKILL" else ""
        return error(f"{doing} was ended by {known}", f"Run `polydraft engines install {name}` again.{memory}")
    missing = next((found[1] for pattern in _MISSING for found in pattern.finditer(text)), "")
    if _says(text, *_NO_NETWORK):
        return error(
            "the package index cannot be reached",
            f"Check the network (and HTTPS_PROXY, if you are behind a proxy), {again}; without a network, install from "
            "wheels: `--from DIR`.",
        )
    if _REFUSED.search(text):
        return error("the package index refuses access", f"Check its address and your credentials, {again}.")
    if _says(text, *_DAMAGED):
        return error("a download is damaged", f"Run `polydraft engines install {name}` again.")
    if "ensurepip" in text and "venv" in text:
        return error("this Python cannot make virtual environments", f"Install python3-venv, or uv, {again}.")
    if _says(text, *_WRONG_PYTHON) and not missing:
        return error(_last(failed), "Choose another Python with `--python 3.12`.")
    if missing and not _says(text, "ResolutionImpossible"):
        if re.split(r"[^\w.-]", missing)[0] in own_distributions():
            return error(
                f"the package index has no {missing}",
                "Install from a clone of polydraft or from a folder of its wheels: `--from DIR`.",
            )
        if "from versions: none" in text:  # pip does not always tell why it found nothing
            return error(
                f"the package index has no {missing}, or cannot be reached",
                f"Check the network, and which index pip uses (`pip config list`), {again}; without a network, install "
                "from wheels: `--from DIR`.",
            )
        return error(
            f"the package index has no {missing} for this Python and platform",
            f"Choose another Python with `--python 3.12`, or check which index pip uses (`pip config list`), {again}.",
        )
    if _says(text, *_CONFLICT):
        return error("the required versions exclude each other", "Report it with the log.")
    if built := next((found[1] for pattern in _COMPILING for found in pattern.finditer(text)), ""):
        return error(f"{built} could not be compiled", f"Look at the compiler's messages in the log, {again}.")
    if _says(text, "Permission denied", "Access is denied", f"[Errno {errno.EACCES}]"):
        return error(f"a file may not be written: {_last(failed)}", f"Check the permissions, {again}.")
    return error(f"{doing} failed: {_last(failed)}", f"Run `polydraft engines install {name}` again, or report it.")


def _says(text: str, *words: str) -> bool:
    return any(word in text for word in words)


def _last(failed: CommandFailedError) -> str:
    """The last line that says what is wrong."""
    lines = [line for line in failed.output if re.match(r"(ERROR|error|Error|\w*Error)\b", line.strip())]
    last = (lines or list(failed.output) or [f"it ended with code {failed.code}"])[-1]
    return re.sub(r"^(ERROR|error): *", "", last.strip())[:_LONGEST].rstrip(".")
