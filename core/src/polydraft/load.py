"""``polydraft.load``: the one way in. This module imports nothing that is slow until it is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polydraft.errors import EngineError, InvalidRequestError, OutOfMemoryError, PolydraftError

if TYPE_CHECKING:
    from polydraft.contract.backend import EngineOptions
    from polydraft.contract.records import Exactness
    from polydraft.plugins import PluginHost
    from polydraft.registry.opening import Prepared
    from polydraft.session.base import Session

__all__ = ["MAX_SPECULATIVE_TOKENS", "load", "load_prepared", "prepare"]

MAX_SPECULATIVE_TOKENS = 128
"""A larger k is an error before anything is looked for; each backend has a smaller limit of its own."""


def load(
    target: str | Path,
    *,
    drafter: str | Path | None = "auto",
    backend: str = "auto",
    num_speculative_tokens: int | None = None,
    exactness: Exactness = "standard",
    context_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    engine_options: Mapping[str, Any] | EngineOptions | None = None,
    verified: Literal["require", "warn", "off"] = "off",
    host: PluginHost | None = None,
) -> Session:
    """Load a target with its drafter, and return the session that generates.

    Everything is checked before weights are downloaded or loaded: the arguments, that the target exists, that the
    backend can run here, and that the drafter fits.

    Args:
        target: Hub id (``google/gemma-4-E4B-it``), a folder or weight file, or ``builtin:<name>``.
        drafter: ``auto``: the one that belongs to the target, else n-gram drafting (``session.running`` says which and
            why). ``ngram``: drafts looked up in the text so far. A Hub id, a folder or ``builtin:<name>``: that
            drafter. None: plain decoding.
        backend: Name of a backend, or ``auto``: of those that can do what is asked, the fittest for this machine.
        num_speculative_tokens: k, tokens drafted in one round, the bonus token excluded; None: the registry's
            recommendation for this pair and backend, else 4.
        exactness: ``standard``, or ``bitwise`` for steps of fixed shape, where the backend has them.
        context_length: Tokens of prompt and output together; None: the model's own, within memory.
        dtype: ``float32``, ``bfloat16``, ``float16``, or the engine's own names. ``auto``: as the weights are stored;
            on a processor that has no instructions for a checkpoint's 16-bit type, float32, where that fits into memory
            (``session.running.notes`` says so).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        revision: Branch, tag or commit of the target on the Hub. A drafter is taken from its default branch, or from
            the revision that its id names: ``org/name@revision``, as a target's id may.
        cache_dir: The Hub's cache folder; None: ``huggingface_hub``'s own.
        token: The Hub's token; None: the stored one, if any; False: none.
        local_files_only: Use the Hub's cache only, never the network.
        trust_remote_code: Allow engines to run code that a checkpoint brings.
        engine_options: The backend's own options, checked against its ``options`` model.
        verified: ``require``: refuse what ``polydraft verify`` has not found to be exact on this machine, with just
            these models, versions, dtype, device, k and exactness. ``warn``: warn instead. ``off``: do not ask. What is
            known is in ``session.running.verified``. Plain decoding needs no verification.
        host: The plugins; None: the installed ones.

    Raises:
        InvalidRequestError: An argument is of the wrong type or out of range, or an engine option is unknown.
        ModelNotFoundError: The target (or the given drafter) does not exist, may not be read, or cannot be reached.
        ModelFormatError: It exists, but is no model of a known layout, or a file of it is damaged.
        BackendNotFoundError: No backend of that name is installed.
        BackendUnavailableError: The backend cannot run here, or a known fault of its engine forbids what is asked.
        PluginError: The backend's plugin is broken.
        PairMismatchError: Target and drafter do not belong together.
        SpeculationUnavailableError: The backend cannot run the given drafter.
        UnsupportedError: The backend cannot load this target, or not with this exactness.
        DeviceError: The device is not there.
        OutOfMemoryError: Weights or context do not fit.
        NotVerifiedError: ``verified="require"``, and it has not been verified, or was found wrong.
        EngineError: The engine failed to load it for another reason, which is the error's cause.
    """
    arguments = dict(locals())
    if verified not in {"require", "warn", "off"}:
        raise InvalidRequestError(f"verified={verified!r} is unknown.", "Give 'require', 'warn' or 'off'.")
    del arguments["verified"]
    prepared = prepare(**arguments)
    if verified == "off":
        return load_prepared(prepared)

    from polydraft.plugins import default_host
    from polydraft.verification.gate import Gate

    gate = Gate(prepared, host or default_host(), verified, arguments)
    gate.before()
    session = load_prepared(prepared)
    try:
        session._running = gate.after(session.running)
    except BaseException:
        session.close()
        raise
    return session


def load_prepared(prepared: Prepared) -> Session:
    """Load what ``prepare`` gave; what an engine raises becomes a typed error. Errors are ``load``'s."""
    backend, target = prepared.state.record.name, prepared.request.target.id
    try:
        return prepared.backend.load(prepared.request)
    except PolydraftError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(
            f"Memory ran out while {backend} loaded {target}.", "Give a smaller context_length, or a smaller model."
        ) from error
    except Exception as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise EngineError(
            f"The backend {backend} could not load {target}: {type(error).__name__}{f': {said}' if said else ''}.",
            "`polydraft doctor` shows whether the engine is sound; if it is, report this with the error's cause.",
        ) from error


def prepare(
    target: str | Path,
    *,
    drafter: str | Path | None = "auto",
    backend: str = "auto",
    num_speculative_tokens: int | None = None,
    exactness: Exactness = "standard",
    context_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    engine_options: Mapping[str, Any] | EngineOptions | None = None,
    host: PluginHost | None = None,
) -> Prepared:
    """What ``load`` does before it loads: arguments checked, backend and drafter chosen. Errors are ``load``'s.

    Args are those of ``load``.
    """
    _check_names(target, drafter, backend)
    _check_k(num_speculative_tokens)
    if exactness not in {"standard", "bitwise"}:
        raise InvalidRequestError(f"exactness={exactness!r} is unknown.", "Give 'standard' or 'bitwise'.")
    if context_length is not None and (not _is_int(context_length) or context_length < 1):
        raise InvalidRequestError(
            f"context_length={context_length!r} is not a positive number of tokens.", "Give None for the model's own."
        )
    _check_text("dtype", dtype, "'auto', 'float32', 'bfloat16' or 'float16'")
    _check_text("device", device, "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    if revision is not None:
        _check_text("revision", revision, "a branch, tag or commit")
    if cache_dir is not None and not isinstance(cache_dir, str | Path):
        raise _wrong_type("cache_dir", cache_dir, "a folder")
    if token is not None and not isinstance(token, str | bool):
        raise InvalidRequestError("token is of the wrong type.", "Give a string, True for the stored one, or False.")
    for name, value in (("local_files_only", local_files_only), ("trust_remote_code", trust_remote_code)):
        if not isinstance(value, bool):
            raise _wrong_type(name, value, "True or False")

    from polydraft.contract.backend import EngineOptions
    from polydraft.contract.requests import HubOptions
    from polydraft.plugins import PluginHost, default_host
    from polydraft.registry.opening import Opening

    if engine_options is not None and not isinstance(engine_options, Mapping | EngineOptions):
        raise _wrong_type("engine_options", engine_options, "a dict")
    if host is not None and not isinstance(host, PluginHost):
        raise _wrong_type("host", host, "a PluginHost")
    hub = HubOptions(
        revision=revision,
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
        token=token,
        local_files_only=local_files_only,
    )
    return Opening(host or default_host(), hub).prepare(
        target,
        backend=backend,
        drafter=drafter,
        num_speculative_tokens=num_speculative_tokens,
        exactness=exactness,
        engine_options=engine_options,
        context_length=context_length,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def _check_names(target: object, drafter: object, backend: object) -> None:
    if not isinstance(target, str | Path):
        raise _wrong_type("target", target, "a Hub id, a folder or builtin:<name>")
    if drafter is not None and not isinstance(drafter, str | Path):
        raise _wrong_type("drafter", drafter, "'auto', 'ngram', None, a Hub id or a folder")
    if isinstance(drafter, str) and not drafter.strip():
        raise InvalidRequestError("drafter is empty.", "Give None for plain decoding, or 'auto'.")
    _check_text("backend", backend, "'auto' or the name of a backend (`polydraft backends` lists them)")


def _check_k(k: object) -> None:
    if k is None:
        return
    if not _is_int(k):
        raise _wrong_type("num_speculative_tokens", k, f"a whole number from 1 to {MAX_SPECULATIVE_TOKENS}, or None")
    if k == 0:
        raise InvalidRequestError("num_speculative_tokens=0 drafts nothing.", "Use drafter=None for plain decoding.")
    if not 1 <= k <= MAX_SPECULATIVE_TOKENS:  # type: ignore[operator]
        raise InvalidRequestError(
            f"num_speculative_tokens={k} is out of range.",
            f"Give 1 to {MAX_SPECULATIVE_TOKENS}, the bonus token excluded; 4 is a good start.",
        )


def _check_text(name: str, value: object, wanted: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise _wrong_type(name, value, wanted)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_type(name: str, value: object, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}={value!r} is not understood.", f"Give {wanted}.")
