"""The process that is asked: ``python -m polydraft._probes.child``, started by ``asking``.

One line of JSON on stdin is the request; stdin then stays open, and its end ends this process. The answer on stdout is
one line with the request's ``mark`` and the answer's size in bytes, then the answer, JSON. Nothing else that runs here
can write there: before any plugin is imported, the descriptors 0 and 1 become ``os.devnull``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polydraft._plugins import PluginHost
    from polydraft._probes.records import Answer, PluginCatalogue

__all__ = ["main"]


def main() -> None:
    """Answer one request, and end without the engine's own clean-up, which may crash or hang."""
    answers, request = _take_streams()
    try:
        answer = _answer(request).model_dump_json().encode()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode()
        answer = json.dumps({"problem": f"could not be made: {text}."}).encode()
    data = memoryview(f"{request['mark']} {len(answer)}\n".encode() + answer)
    while data:
        data = data[os.write(answers, data) :]
    os._exit(0)


def _take_streams() -> tuple[int, dict[str, Any]]:
    """The descriptor for the answer, and the request. From here on this process ends with the one that asks."""
    requests, answers = os.dup(0), os.dup(1)
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.dup2(devnull, 1)
    request: dict[str, Any] = json.loads(_line(requests))
    # In a thread of its own that needs no interpreter lock: engines may hold that while they hang.
    faulthandler.dump_traceback_later(request["seconds"], exit=True, file=devnull)
    threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is told, it need not fill the disk
    return answers, request


def _line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (part := os.read(descriptor, 65536)):
        line += part
    return line


def _end_with(requests: int) -> None:
    with suppress(OSError):
        while os.read(requests, 1):
            pass
    os._exit(1)


def _answer(request: dict[str, Any]) -> Answer:
    from polydraft._plugins import PluginHost
    from polydraft._probes.records import Answer

    if request["want"] == "catalogue":
        return Answer(catalogue=_catalogue(PluginHost(disabled=request.get("disabled", ()))))
    if "record" in request:
        return _backend(_host_of(request["record"]), request["backend"])
    return _backend(PluginHost(), request["backend"])


def _host_of(record: dict[str, Any]) -> PluginHost:
    """A host with one backend: no other plugin is imported."""
    from types import SimpleNamespace

    from polydraft._plugins import PluginHost
    from polydraft.contract.hookspecs import hookimpl
    from polydraft.contract.records import BackendRecord

    found = BackendRecord.model_validate_json(json.dumps(record))
    return PluginHost({"asked": SimpleNamespace(polydraft_backends=hookimpl(lambda: [found]))})


def _backend(host: PluginHost, name: str) -> Answer:
    from polydraft._containment import plugin_errors
    from polydraft._probes.records import Answer
    from polydraft._registry.diagnosing import backend_state, serves
    from polydraft._registry.faults import FaultRegistry
    from polydraft.contract.records import Capabilities

    record = host.backends().get(name)
    if record is None:
        return Answer(backend=name, problem=f"There is no backend {name!r} there.")
    state = backend_state(host, record, FaultRegistry.of(host))
    capabilities = schema = None
    # What fails here fails again where it is used, and is told there.
    with suppress(Exception), plugin_errors(name):
        backend = host.backend(name)
        schema = type(backend).options.model_json_schema()
        capabilities = Capabilities.model_validate(vars(backend.capabilities())) if state.diagnosis else None
    return Answer(
        backend=name, state=state, capabilities=capabilities, options_schema=schema, serves=serves(host, name)
    )


def _catalogue(host: PluginHost) -> PluginCatalogue:
    from importlib.metadata import version

    from polydraft._probes.records import CataloguedBackend, PluginCatalogue
    from polydraft._registry.faults import distributions
    from polydraft._registry.versions import installed_version
    from polydraft.contract.records import CONTRACT_VERSION

    statuses = host.statuses()
    homes = {name: status for status in statuses if status.state == "loaded" for name in status.backends}
    return PluginCatalogue(
        polydraft=version("polydraft"),
        contract_version=CONTRACT_VERSION,
        python=".".join(map(str, sys.version_info[:3])),
        backends=tuple(
            CataloguedBackend(
                record=record,
                plugin=homes[name].name,
                distribution=homes[name].distribution,
                version=homes[name].version,
                versions={each: found for each in distributions(record) if (found := installed_version(each))},
            )
            for name, record in host.backends().items()
        ),
        pairs=tuple(host.pairs()),
        faults=tuple(host.faults()),
        local_models=tuple(host.local_models().values()),
        caches=tuple(host.caches()),
        broken={status.name: status.reason for status in statuses if status.state == "broken"},
    )


if __name__ == "__main__":
    main()
