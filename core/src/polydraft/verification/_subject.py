"""The subject of a verification: models, versions and hardware, as far as they are known before loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract.backend import EngineOptions
from polydraft.hardware import cpu_model
from polydraft.verification._builds import builds_here, builds_in
from polydraft.verification._fingerprint import commit_of, fingerprint
from polydraft.verification._records import Subject

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost
    from polydraft._registry.resolver import Prepared
    from polydraft.contract.requests import LoadRequest, ModelSource
    from polydraft.contract.results import RunningInfo

__all__ = ["subject_of", "with_running"]


def subject_of(prepared: Prepared, host: PluginHost) -> Subject:
    """The subject of a prepared load that speculates; dtype and device are known only after loading.

    Raises:
        ModelFormatError: A file of a model is missing or cannot be read.
    """
    request, record = prepared.request, prepared.state.record
    plan = request.plan
    assert plan.kind is not None
    plugins = [status.distribution for status in host.statuses() if record.name in status.backends]
    names = {"polydraft", record.engine, *(name.strip() for key in record.requires for name in key.split("|"))}
    names |= {name for name in plugins if name}
    options = request.engine_options
    packages = {"polydraft", record.factory.partition(".")[0].partition(":")[0]}
    home = host.home(record.name)
    versions, builds = builds_here(names, packages) if home is None else builds_in(home.python, names, packages)
    engine = prepared.backend.build(request)
    return Subject(
        target=_name(request.target),
        target_fingerprint=fingerprint(request.target, request.hub),
        target_commit=commit_of(request.target, request.hub),
        drafter=None if plan.drafter is None else _name(plan.drafter),
        # The revision in ``hub`` is the target's; a drafter has its own.
        drafter_fingerprint=None if plan.drafter is None else fingerprint(plan.drafter, request.hub),
        drafter_commit="" if plan.drafter is None else commit_of(plan.drafter, request.hub),
        method=plan.kind,
        num_speculative_tokens=plan.num_speculative_tokens,
        max_speculative_tokens=plan.max_speculative_tokens,
        exactness=request.exactness,
        backend=record.name,
        versions=versions,
        builds=None if engine is None else {**builds, **engine},
        trust_remote_code=request.trust_remote_code,
        engine_options=options.model_dump(mode="json") if isinstance(options, EngineOptions) else {},
        hardware=_hardware(prepared),
    )


def with_running(subject: Subject, running: RunningInfo, request: LoadRequest, *, changed: bool = False) -> Subject:
    """The subject of a loaded session: with its dtype and device, and with models that loading has downloaded.

    Args:
        subject: As it was before loading.
        running: What runs.
        request: What was loaded.
        changed: Whether local files, too, may have changed since.
    """
    update = {"dtype": running.dtype, "device": running.device}
    for role, source in (("target", request.target), ("drafter", request.plan.drafter)):
        if source is not None and (changed or source.kind == "hub"):
            update[f"{role}_fingerprint"] = fingerprint(source, request.hub)
            update[f"{role}_commit"] = commit_of(source, request.hub)
    return subject.model_copy(update=update)


def _name(source: ModelSource) -> str:
    """A model's name that does not depend on how it was written, nor on the current folder."""
    return str(source.path.resolve()) if source.kind == "local" and source.path else source.id


def _hardware(prepared: Prepared) -> str:
    """The processor and the devices that the backend sees: rounding depends on them."""
    devices = prepared.state.diagnosis.devices if prepared.state.diagnosis else ()
    seen = [f"{device.name} {device.description}".strip() for device in devices if device.name != "cpu"]
    return "; ".join([cpu_model(), *seen])
