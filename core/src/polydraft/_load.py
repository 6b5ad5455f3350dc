"""``polydraft.load``. This module imports nothing that is slow until it is called."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from polydraft._environments.asking import installing
from polydraft._load_arguments import LoadArguments, checked_arguments, load_arguments
from polydraft.errors import ModelFormatError
from polydraft.files import system_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polydraft._registry.resolver import Prepared
    from polydraft._session.session import Session
    from polydraft.contract.backend import Backend
    from polydraft.contract.requests import HubOptions, LoadRequest, ModelSource
    from polydraft.verification._gate import Gate

__all__ = ["load", "open_session", "prepare"]


@load_arguments
def load(target: str | Path, **arguments: Unpack[LoadArguments]) -> Session:
    """Load a target with its drafter, and return the session that generates.

    Everything is checked before weights are downloaded or loaded: the arguments, that the target exists, that the
    backend can run here, and that the drafter fits.

    Args:
        target: Hub id (``google/gemma-4-E4B-it``), a folder or weight file, ``builtin:<name>``, or a name that the
            server of ``backend`` gave it (``gemma4:e4b``).
        drafter: ``auto``: the one that belongs to the target, else n-gram drafting (``session.running`` says which and
            why). ``ngram``: drafts looked up in the text so far. A Hub id, a folder or ``builtin:<name>``: that
            drafter. None: plain decoding.
        backend: Name of a backend, or ``auto``: the one that ``polydraft tune`` measured to be fastest for these
            weights on this machine; without a measurement, of those that can do what is asked, the fittest.
        num_speculative_tokens: k, tokens drafted in one round, the bonus token excluded. ``auto``: picked for each
            round, 0 included, from measured times and acceptance (``session.running.max_speculative_tokens`` is the
            largest); an engine that runs its own loop keeps to the recommendation, and ``session.running.notes`` says
            so. None: the k that was measured to be fastest, else the registry's recommendation for this pair and
            backend, else 4. Speculation that was measured to be slower than plain decoding is then off, unless
            ``drafter`` names one. ``session.running.chosen_by`` says who chose.
        quantization: Which of the target's packings to load, of those that the registry, its repository or its folder
            has in the backend's format. ``auto``: the least quantized that fits into the free memory with its context
            (``session.running.packing`` says which, and why not the ones before it); a file, or a repository of such
            files, is taken as it is. ``none``: only weights that are not quantized. Or a name as engines write it:
            ``q4_0``, ``8bit``, ...
        exactness: ``standard``, or ``bitwise`` for steps of fixed shape, where the backend has them.
        context_length: Tokens of prompt and output together; None: the model's own, within memory.
        prefix_cache_bytes: Memory for the KV that calls leave behind: a prompt that begins like an earlier prompt and
            its output, as the next turn of a conversation does, runs only what is new
            (``result.stats.num_reused_tokens``). What was used longest ago goes first. ``0``: each prompt is run from
            its start. None: 1 GiB, or less where memory is short. An engine with a prefix cache of its own (vLLM,
            llama.cpp's server) sizes it itself, and ``0`` turns it off. Reused KV may differ in the last bits from
            that of a fresh prefill, as that of two steps may; with ``exactness="bitwise"`` only what has equal bits is
            reused.
        dtype: ``float32``, ``bfloat16``, ``float16``, or the engine's own names. ``auto``: as the weights are stored;
            on a processor that has no instructions for a checkpoint's 16-bit type, float32, where that fits into memory
            (``session.running.notes`` says so).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        revision: Branch, tag or commit of the target on the Hub. A drafter is taken from its default branch, or from
            the revision that its id names: ``org/name@revision``, as a target's id may.
        cache_dir: The Hub's cache folder; None: ``huggingface_hub``'s own.
        token: The Hub's token; None: the stored one, if any; False: none.
        local_files_only: Use the Hub's cache only, never the network.
        trust_remote_code: Allow engines to run code from a checkpoint.
        engine_options: The backend's own options, checked against its ``options`` model.
        isolation: ``process``: the engine runs in a process of its own, whose crash ends no other session. ``none``:
            in this process. ``auto``: in this process, unless the engine is installed in another environment, or
            something that is loaded here clashes with it. ``session.running`` says which, and why.
        verified: ``require``: refuse what ``polydraft verify`` has not found to be exact on this machine, with exactly
            these bytes of weights, builds, dtype, device, k and exactness. ``warn``: warn instead. ``off``: do not
            look. What is known is in ``session.running.verified``. Plain decoding needs no verification. The first look
            at weights reads all of them, at about a second per gigabyte.
        install: What to do if the engine is not installed. ``ask``: ask, if there is a terminal to ask at, else raise
            the error that names the command. ``yes``: install it into an environment of its own, as
            ``polydraft engines install`` does. ``no``: raise the error.
        host: The plugins; None: the installed ones.

    Raises:
        InvalidRequestError: An argument is of the wrong type or out of range, or an engine option is unknown.
        ModelNotFoundError: The target (or the given drafter) does not exist, may not be read, or cannot be reached.
        ModelFormatError: It exists, but is not a model of a known layout, or one of its files is damaged.
        BackendNotFoundError: No backend of that name is installed.
        EnvironmentSetupError: The engine was to be installed, and could not be.
        BackendUnavailableError: The backend cannot run here, or a known fault of its engine forbids what is asked.
        PluginError: The backend's plugin is broken.
        PairMismatchError: Target and drafter do not belong together.
        SpeculationUnavailableError: The backend cannot run the given drafter.
        UnsupportedError: The backend cannot load this target, or not with this exactness.
        ContextLengthError: The context is longer than the target's own.
        DeviceError: The device does not exist.
        OutOfMemoryError: Weights or context do not fit; for the Hub's models, before they are downloaded.
        SystemResourceError: The machine is short of something: disk space, file handles, ...
        NotVerifiedError: ``verified="require"``, and it has not been verified, was found wrong, or is not known.
        NonFiniteLogitsError: A check at load computed NaN or infinite logits.
        EngineCrashedError: The engine ended its worker process.
        EngineError: The engine failed to load it for another reason, which is the error's cause.
    """
    given = checked_arguments(target, arguments)
    with _typed(target):
        return installing(_install(given), partial(_load, target, given))


def _load(target: str | Path, given: LoadArguments) -> Session:
    prepared = _prepare(target, given)
    gate = None
    if given["verified"] != "off":
        from polydraft._plugins import default_host
        from polydraft.verification._gate import Gate  # upwards: stored results decide whether to proceed

        gate = Gate(prepared, given["host"] or default_host(), given["verified"], {**given, "target": target})
        gate.before()
    return open_session(prepared.backend, prepared.request, gate, process_reason=prepared.process_reason)


@load_arguments
def prepare(target: str | Path, **arguments: Unpack[LoadArguments]) -> Prepared:
    """Check the arguments of ``load``, and choose backend and drafter; errors are those of ``load``."""
    given = checked_arguments(target, arguments)
    with _typed(target):
        return installing(_install(given), partial(_prepare, target, given))


def _install(given: LoadArguments) -> str:
    """Plugins that an app gives cannot be joined by what is installed."""
    host = given["host"]
    return given["install"] if host is None or host.uses_environments else "no"


def _prepare(target: str | Path, given: LoadArguments) -> Prepared:
    from polydraft._isolation import start_worker
    from polydraft._plugins import default_host

    if given["backend"] != "auto":
        start_worker(given["host"] or default_host(), given["backend"], given["isolation"])

    from polydraft._registry.resolver import Resolver  # after the worker has been started: this takes a while, too
    from polydraft._tune._store import folder  # upwards: what was measured decides what the caller leaves open

    resolver = Resolver(given)
    if not folder().is_dir():
        return _with_options_checked(resolver.prepare(target))
    from polydraft._tune._choice import prepared_as_measured

    return _with_options_checked(prepared_as_measured(resolver, target, given))


def _with_options_checked(prepared: Prepared) -> Prepared:
    """Refuse options that the drafter does not use; where a measurement chose it, a note tells them.

    Not in the resolver: measurements load other drafters, and none, with the same options.
    """
    from dataclasses import replace

    from polydraft._registry.options import without_effect

    request = prepared.request
    plan = request.plan
    error = without_effect(request.engine_options, plan.kind)
    if error is None:
        return prepared
    if request.chosen_by.drafter != "measured":
        raise error
    plan = plan.model_copy(update={"note": f"{plan.note} {error.message}".strip()})
    return replace(prepared, request=request.model_copy(update={"plan": plan}))


@contextmanager
def _typed(target: str | Path) -> Iterator[None]:
    """What the system refuses as one of polydraft's errors."""
    try:
        with system_errors(f"{target} cannot be loaded"):
            yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename is not None else ""
        raise ModelFormatError(
            f"{target} cannot be loaded: {error.strerror or error}{at}.", "Check the file and its permissions."
        ) from error


def open_session(
    backend: Backend, request: LoadRequest, gate: Gate | None = None, *, process_reason: str = ""
) -> Session:
    """Load the engine and put it into a session, with notes and the verification of what really runs."""
    from polydraft._session.engine_check import check_engine
    from polydraft._session.loading import load_engine
    from polydraft._session.session import Session
    from polydraft.checkpoints.config import has_experts
    from polydraft.contract.whole import WholeEngine
    from polydraft.engine_parts.server_options import THE_SERVERS
    from polydraft.text.ids_only import IdsOnlyTokenizer
    from polydraft.text.text_only import TextOnlyTokenizer

    engine, notes = load_engine(backend, request)
    try:
        check_engine(engine, getattr(engine, "running", None), backend.capabilities())
        for source in filter(None, (request.target, request.plan.drafter)):
            notes += _notes_on_weights(source, request.hub)
        if isinstance(engine.tokenizer, IdsOnlyTokenizer):
            notes.append(engine.tokenizer.note)
        if getattr(engine.tokenizer, "text_only", False):
            notes.append(TextOnlyTokenizer.note)
        running = engine.running
        if running.max_speculative_tokens is not None and isinstance(engine, WholeEngine) and not engine.picks_k:
            running = running.model_copy(update={"max_speculative_tokens": None})
            notes.append(
                f"`num_speculative_tokens='auto'`: {request.backend} runs a loop of its own, so k is "
                f"{running.num_speculative_tokens} in all rounds."
            )
        notes += [
            f"`{name}={getattr(request, name)!r}` has no effect: the server runs already, and does not tell its own."
            for name in ("device", "dtype")
            if getattr(request, name) != "auto" and getattr(running, name) == THE_SERVERS
        ]
        if request.prefix_cache_bytes and isinstance(engine, WholeEngine) and not engine.picks_k:
            notes.append(
                f"`prefix_cache_bytes={request.prefix_cache_bytes}` has no effect: {request.backend} sizes what it "
                "keeps of earlier calls by itself, if it keeps any."
            )
        told = {
            "notes": (*running.notes, *notes),
            "has_experts": has_experts(request.target.config),
            "process_reason": running.process_reason or process_reason,
        }
        running = running.model_copy(update=told)
        # The gate asks again, now that dtype and device are known, and may refuse.
        if gate is not None:
            running = gate.after(running)
        capabilities = backend.capabilities()
        return Session(engine, running, capabilities, prefix_cache_bytes=request.prefix_cache_bytes)
    except BaseException:
        with suppress(Exception):  # the first error says more
            engine.close()
        raise


def _notes_on_weights(source: ModelSource, hub: HubOptions) -> list[str]:
    """Notes on files of a checkpoint's folder that a user may think are loaded, and on a head that its config hides."""
    from polydraft.checkpoints._output_head import head_note
    from polydraft.checkpoints._weight_files import ignored_files
    from polydraft.verification._fingerprint import snapshot_of

    if source.format not in {"safetensors", "mlx"}:
        return []
    folder = source.path or snapshot_of(source, hub)
    if folder is None:
        return []
    try:
        names, note = ignored_files(folder), head_note(folder, source.id)
    except ModelFormatError:  # not complete here: a server that was started elsewhere has its own copy
        return []
    ignored = [f"Ignored, as not part of {source.id}: {', '.join(names)}."] if names else []
    return [*ignored, *([note] if note else [])]
