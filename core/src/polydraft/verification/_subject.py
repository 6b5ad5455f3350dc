"""The subject of a verification: models, versions and hardware, as far as they are known before loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft._registry.versions import installed_version
from polydraft.contract.backend import EngineOptions
from polydraft.hardware import cpu_model
from polydraft.verification._fingerprint import fingerprint
from polydraft.verification._records import Subject

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost
    from polydraft._registry.resolver import Prepared
    from polydraft.contract.results import RunningInfo

__all__ = ["subject_of", "with_running"]


def subject_of(prepared: Prepared, host: PluginHost) -> Subject | None:
    """The subject of a prepared load; dtype and device are known only after loading.

    Returns:
        None where speculation is off, or a model cannot be identified.
    """
    request, record = prepared.request, prepared.state.record
    plan = request.plan
    if plan.kind is None:
        return None
    target = fingerprint(request.target, request.hub)
    # The revision in ``hub`` is the target's; a drafter has its own.
    drafter = None if plan.drafter is None else fingerprint(plan.drafter, request.hub)
    if target is None or (plan.drafter is not None and drafter is None):
        return None
    plugins = [status.distribution for status in host.statuses() if record.name in status.backends]
    names = {"polydraft", record.engine, *(name.strip() for key in record.requires for name in key.split("|"))}
    names |= {name for name in plugins if name}
    options = request.engine_options
    return Subject(
        target=request.target.id,
        target_fingerprint=target,
        drafter=None if plan.drafter is None else plan.drafter.id,
        drafter_fingerprint=drafter,
        method=plan.kind,
        num_speculative_tokens=plan.num_speculative_tokens,
        exactness=request.exactness,
        backend=record.name,
        versions={name: version for name in sorted(names) if (version := installed_version(name))},
        engine_options=options.model_dump(mode="json") if isinstance(options, EngineOptions) else {},
        hardware=_hardware(prepared),
    )


def with_running(subject: Subject, running: RunningInfo) -> Subject:
    """The subject with the dtype and device of a loaded session."""
    return subject.model_copy(update={"dtype": running.dtype, "device": running.device})


def _hardware(prepared: Prepared) -> str:
    """The processor and the devices that the backend sees: rounding depends on them."""
    devices = prepared.state.diagnosis.devices if prepared.state.diagnosis else ()
    seen = [f"{device.name} {device.description}".strip() for device in devices if device.name != "cpu"]
    return "; ".join([cpu_model(), *seen])
