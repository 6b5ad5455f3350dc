"""``load(verified=...)``: refuse what has not been verified, or warn."""

from __future__ import annotations

import shlex
import warnings
from typing import TYPE_CHECKING, Any, Literal

from polydraft._flags import FLAGS, words
from polydraft._load_arguments import DEFAULTS
from polydraft._presentable import presentable
from polydraft.contract.results import Verified
from polydraft.engines.server_options import ServerOptions
from polydraft.errors import NotVerifiedError
from polydraft.verification._store import Found, find
from polydraft.verification._subject import subject_of, with_running

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft._plugins import PluginHost
    from polydraft._registry.resolver import Prepared
    from polydraft.contract.results import RunningInfo
    from polydraft.verification._records import Subject

__all__ = ["Gate", "VerificationWarning", "command_of"]


class VerificationWarning(UserWarning):
    """The loaded pair has not been verified on this machine."""


class Gate:
    """Checks one load, before and after.

    Args:
        prepared: The load, resolved.
        host: The plugins.
        mode: ``require`` refuses what has not been verified, ``warn`` warns.
        arguments: Of ``load``, for the command that verifies.
    """

    def __init__(
        self, prepared: Prepared, host: PluginHost, mode: Literal["require", "warn"], arguments: Mapping[str, Any]
    ) -> None:
        self.plain = prepared.request.plan.kind is None
        self.subject: Subject | None = subject_of(prepared, host)
        self.mode = mode
        options = prepared.request.engine_options
        given = {} if options is None else options.model_dump(mode="json", exclude_unset=True)
        self.command = command_of({**arguments, "backend": prepared.state.record.name, "engine_options": given})
        if isinstance(options, ServerOptions) and options.api_key is not None and options.key_variables:
            # Not in the command: other users can read command lines.
            self.command += f" (with the API key in the environment variable {options.key_variables[0]})"

    def before(self) -> None:
        """Refuse what has not been verified in any dtype or on any device.

        Raises:
            NotVerifiedError: It has not been verified, or failed, and it is required.
        """
        if self.mode == "require" and not self.plain:
            self._check(self._find(self.subject))

    def after(self, running: RunningInfo) -> RunningInfo:
        """Add the stored verification to the running info.

        Raises:
            NotVerifiedError: It was verified with another dtype or on another device, and it is required.
        """
        if self.plain:
            return running
        found = self._find(self.subject and with_running(self.subject, running))
        problem = self._check(found)
        if problem:
            warnings.warn(
                presentable(f"{problem} Verify it: {self.command}"), VerificationWarning, stacklevel=4
            )  # of load, behind its decorator
        kept = found.verification
        if kept is None:
            return running.model_copy(update={"notes": (*running.notes, f"Not verified: {problem}")})
        verified = Verified(verdict=kept.verdict, created=kept.created, num_tokens=kept.num_tokens)
        return running.model_copy(update={"verified": verified})

    def _find(self, subject: Subject | None) -> Found:
        if subject is None:
            return Found(None, "These weights cannot be identified, so no stored verification applies.")
        return find(subject)

    def _check(self, found: Found) -> str:
        """Why it does not count as verified; empty if it does. Raised instead where it is required."""
        kept = found.verification
        problem = found.why_not
        if kept is not None and not kept.passes:
            problem = f"Its verification of {kept.created} found {kept.verdict}: speculation changed the output."
        if problem and self.mode == "require":
            raise NotVerifiedError(
                problem, f"Run: {self.command}" if kept is None else "Decode plainly (`drafter=None`), and report it."
            )
        return problem


def command_of(arguments: Mapping[str, Any]) -> str:
    """The ``polydraft verify`` command that verifies what these arguments of ``load`` load.

    Args:
        arguments: With the name of the backend, and engine options as a mapping of what can be JSON.
    """
    given = [name for name in FLAGS if arguments.get(name, DEFAULTS.get(name)) != DEFAULTS.get(name)]
    return shlex.join(["polydraft", "verify", *(word for name in given for word in words(name, arguments[name]))])
