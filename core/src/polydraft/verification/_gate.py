"""``load(verified=...)``: refuse what has not been verified, or warn."""

from __future__ import annotations

import shlex
import warnings
from typing import TYPE_CHECKING, Any, Literal

from polydraft._flags import FLAGS, words
from polydraft._load_arguments import DEFAULTS
from polydraft._presentable import presentable
from polydraft.contract.results import Verified
from polydraft.engine_parts.server_options import ServerOptions
from polydraft.errors import NotVerifiedError
from polydraft.verification._fingerprint import state_of
from polydraft.verification._store import Found, find
from polydraft.verification._subject import subject_of, with_running

if TYPE_CHECKING:
    from collections.abc import Mapping

    from polydraft._plugins import PluginHost
    from polydraft._registry.resolver import Prepared
    from polydraft.contract.results import RunningInfo
    from polydraft.verification._records import Subject, Verification

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
        self.request = prepared.request
        self.plain = self.request.plan.kind is None
        # Before the bytes are read: what changes from now on is noticed.
        self.states = self._states()
        self.subject: Subject | None = None if self.plain else subject_of(prepared, host)
        self.mode = mode
        options = prepared.request.engine_options
        given = {} if options is None else options.model_dump(mode="json", exclude_unset=True)
        packing = prepared.request.packing
        # The same weights, however much memory is free by then.
        named = {"quantization": packing.name} if packing is not None and packing.note else {}
        self.command = command_of(
            {**arguments, **named, "backend": prepared.state.record.name, "engine_options": given}
        )
        if isinstance(options, ServerOptions) and options.api_key is not None and options.key_variables:
            # Not in the command: other users can read command lines.
            self.command += f" (with the API key in the environment variable {options.key_variables[0]})"

    def before(self) -> None:
        """Refuse what has not been verified in any dtype or on any device.

        Raises:
            NotVerifiedError: It has not been verified, or failed, and it is required.
        """
        if self.mode == "require" and self.subject is not None:
            self._check(find(self.subject))

    def after(self, running: RunningInfo) -> RunningInfo:
        """Add the stored verification to the running info.

        Raises:
            NotVerifiedError: It was verified with another dtype, on another device, or with other files than those that
                are there now, and it is required.
        """
        if self.subject is None:
            return running
        changed = self._states() != self.states
        found = find(with_running(self.subject, running, self.request, changed=changed), loaded=True)
        problem = self._check(found)
        if problem:
            # The caller of load: behind ``open_session``, ``_load``, ``installing`` and ``load``.
            warnings.warn(presentable(f"{problem} {self._hint(found.verification)}"), VerificationWarning, stacklevel=6)
        kept = found.verification
        if kept is None:
            return running.model_copy(update={"notes": (*running.notes, f"Not verified: {problem}")})
        verified = Verified(verdict=kept.verdict, created=kept.created, num_tokens=kept.num_tokens)
        return running.model_copy(update={"verified": verified})

    def _states(self) -> list[tuple[tuple[str, int, int, int, int], ...]]:
        sources = (self.request.target, self.request.plan.drafter)
        return [state_of(source, self.request.hub) for source in sources if source is not None and not self.plain]

    def _check(self, found: Found) -> str:
        """Why it does not count as verified; empty if it does. Raised instead where it is required."""
        kept = found.verification
        problem = found.why_not
        if kept is not None and not kept.passes:
            problem = (
                f"Its verification of {kept.created} found {kept.verdict}: speculation changed the output."
                if kept.compares
                else f"Its verification of {kept.created} compared no token that speculation had to do with."
            )
        if problem and self.mode == "require":
            raise NotVerifiedError(problem, self._hint(kept))
        return problem

    def _hint(self, kept: Verification | None) -> str:
        if kept is not None and kept.compares:
            return "Decode plainly (`drafter=None`), and report it."
        if self.subject is not None and self.subject.builds is None:
            return "Let the session start the engine itself, or load without `verified`."
        return f"Run: {self.command}"


def command_of(arguments: Mapping[str, Any]) -> str:
    """The ``polydraft verify`` command that verifies what these arguments of ``load`` load.

    Args:
        arguments: With the name of the backend, and engine options as a mapping of what can be JSON.
    """
    given = [
        name
        for name in FLAGS
        if name != "prefix_cache_bytes" and arguments.get(name, DEFAULTS.get(name)) != DEFAULTS.get(name)
    ]
    return shlex.join(["polydraft", "verify", *(word for name in given for word in words(name, arguments[name]))])
