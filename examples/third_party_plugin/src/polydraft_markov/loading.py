"""From polydraft's load request to the engine's models, with errors raised before any work."""

from __future__ import annotations

from dataclasses import dataclass

from polydraft.contract import DeviceRecord, Diagnosis, LoadRequest, ModelSource, RunningInfo
from polydraft.errors import ContextLengthError, ModelFormatError, UnsupportedError

from polydraft_markov.markov import Markov

VERSION = "0.1.0"


@dataclass(frozen=True)
class Loaded:
    """A pair, ready to run."""

    target: Markov
    drafter: Markov | None
    running: RunningInfo


def diagnose() -> Diagnosis:
    """Numpy is all it needs; an engine that may be missing says so here, with the command that installs it."""
    return Diagnosis(usable=True, engine_version=VERSION, devices=(DeviceRecord(name="cpu"),))


def load(request: LoadRequest, backend: str) -> Loaded:
    """Read the models.

    Raises:
        UnsupportedError: Another dtype than float32.
        ContextLengthError: The context is longer than the target's.
        ModelFormatError: A config or text is wrong.
    """
    if request.dtype not in {"auto", "float32"}:
        raise UnsupportedError(f"{backend} has no dtype {request.dtype!r}.", "Use float32.")
    longest = int(request.target.config["max_position_embeddings"])
    if (request.context_length or 0) > longest:
        raise ContextLengthError(f"{request.target.id} has a context of {longest} tokens.", "Ask for fewer.")
    plan = request.plan
    running = RunningInfo(
        backend=backend,
        engine="polydraft-markov",
        engine_version=VERSION,
        target=request.target.id,
        drafter=plan.drafter.id if plan.drafter else None,
        method=plan.kind,
        num_speculative_tokens=plan.num_speculative_tokens,
        dtype="float32",
        device="cpu",
        context_length=request.context_length or longest,
        exactness=request.exactness,
        concurrency="concurrent",
        speculation_off=plan.off,
    )
    return Loaded(_model(request.target), _model(plan.drafter) if plan.drafter else None, running)


def _model(source: ModelSource) -> Markov:
    assert source.path is not None, "Models of this format are local folders."
    try:
        text = (source.path / str(source.config["text"])).read_text(encoding="utf-8")
        return Markov(text, int(source.config["order"]))
    except (OSError, KeyError, ValueError) as error:
        raise ModelFormatError(f"{source.id} cannot be read: {error!r}.", "Install it again.") from error
