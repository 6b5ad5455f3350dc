"""The settings of one server: as xllamacpp's ``CommonParams``, and as a command line of this plugin's program."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polydraft.engine_parts.serving import LOOPBACK
from polydraft.errors import DeviceError
from polydraft_gguf.environment import set_needed_environment
from polydraft_gguf.resources import device_name

if TYPE_CHECKING:
    from polydraft.secrets import Secret

__all__ = ["SPEC_TYPES", "ServerSettings", "gpus"]

SPEC_TYPES = {
    "none": "NONE",
    "draft-simple": "DRAFT_SIMPLE",
    "draft-mtp": "DRAFT_MTP",
    "ngram-simple": "NGRAM_SIMPLE",
    "ngram-map-k": "NGRAM_MAP_K",
    "ngram-map-k4v": "NGRAM_MAP_K4V",
    "ngram-mod": "NGRAM_MOD",
}
"""llama-server's names of the kinds of drafts -> ends of the names in xllamacpp's ``common_speculative_type``."""
_ALL_LAYERS = 999
_SILENT, _ERRORS = 0, 1
"""Levels of llama.cpp's log, which it writes to this process's standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server runs. The flag of a field has its name, and mostly llama-server's: ``--spec-type``."""

    model: Path
    ctx_size: int
    """Tokens of all slots together."""
    parallel: int = 1
    """Slots: requests that run at a time."""
    batch_size: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: bool = False
    threads: int = 1
    device: str = "auto"
    """polydraft's name: ``cpu``, ``cuda:0``; ``auto``: all GPUs, else the CPU."""
    n_gpu_layers: int | None = None
    """None: all on a GPU."""
    swa_full: bool = False
    mmap: bool = True
    spec_type: str = "none"
    spec_draft_model: Path | None = None
    spec_draft_n_max: int = 0
    spec_ngram_size: int = 2
    host: str = LOOPBACK
    port: int = 0
    """0: a free one."""

    def plain(self) -> ServerSettings:
        """The same without drafts."""
        return replace(self, spec_type="none", spec_draft_model=None, spec_draft_n_max=0)

    def params(self, key: Secret | None, *, verbose: bool = False) -> Any:
        """The ``CommonParams``. The server asks for ``key``, and writes errors to standard error if ``verbose``.

        Raises:
            DeviceError: xllamacpp does not see the device.
        """
        import xllamacpp as engine

        set_needed_environment()
        params = engine.CommonParams()
        params.model.path, params.verbosity, params.warmup = str(self.model), _ERRORS if verbose else _SILENT, False
        params.n_ctx, params.n_parallel = self.ctx_size, self.parallel
        # n_ubatch = n_batch: a forward is never split.
        params.n_batch = params.n_ubatch = self.batch_size
        types = (engine.ggml_type[f"GGML_TYPE_{name.upper()}"] for name in (self.cache_type_k, self.cache_type_v))
        params.cache_type_k, params.cache_type_v = types
        params.flash_attn_type = engine.llama_flash_attn_type[
            f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if self.flash_attn else 'DISABLED'}"
        ]
        params.swa_full = self.swa_full
        if not self.mmap:
            params.load_mode = engine.llama_load_mode.LLAMA_LOAD_MODE_NONE
        # By default llama.cpp changes what was asked for until it fits.
        params.fit_params = False
        # No prompts of earlier requests are kept.
        params.cache_ram_mib = 0
        params.hostnames, params.port = [self.host], self.port
        params.api_keys = [key.reveal()] if key else []
        params.ui = params.endpoint_slots = False
        # Seconds: so long a server that is freed waits for a client that has not hung up.
        params.sse_ping_interval = 1
        draft = params.speculative.draft
        for threads in (params.cpuparams, params.cpuparams_batch, draft.cpuparams, draft.cpuparams_batch):
            threads.n_threads = self.threads
        self._place(params, engine)
        self._speculate(params, engine)
        return params

    def _place(self, params: Any, engine: Any) -> None:
        found = gpus(engine)
        on_gpu = self.device != "cpu" and (self.device != "auto" or bool(found))
        if on_gpu and self.device != "auto":
            names = {name: index for index, name in enumerate(found)}
            names |= {name.removesuffix(":0"): index for name, index in names.items()}
            if self.device not in names:
                raise DeviceError(
                    f"The device {self.device} was asked for, and xllamacpp sees: {', '.join(['cpu', *found])}.",
                    "Install the wheel for it, from xllamacpp's own package index.",
                )
            params.split_mode = engine.llama_split_mode.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = names[self.device]
        layers = _ALL_LAYERS if self.n_gpu_layers in {None, -1} else self.n_gpu_layers
        params.n_gpu_layers = params.speculative.draft.n_gpu_layers = layers if on_gpu else 0
        # Both would use a GPU for a model whose layers are all on the CPU.
        params.no_kv_offload = params.no_op_offload = not on_gpu

    def _speculate(self, params: Any, engine: Any) -> None:
        speculative, count = params.speculative, self.spec_draft_n_max
        kind = engine.common_speculative_type[f"COMMON_SPECULATIVE_TYPE_{SPEC_TYPES[self.spec_type]}"]
        speculative.types, speculative.draft.n_max = [kind], count
        if self.spec_draft_model is not None:
            speculative.draft.mparams.path = str(self.spec_draft_model)
        speculative.draft.cache_type_k, speculative.draft.cache_type_v = params.cache_type_k, params.cache_type_v
        if self.spec_type == "ngram-mod":
            speculative.ngram_mod.n_max, speculative.ngram_mod.n_min = count, 1
            speculative.ngram_mod.n_match = self.spec_ngram_size
        elif self.spec_type.startswith("ngram-"):
            lookup = getattr(speculative, self.spec_type.replace("-", "_"))
            lookup.size_m, lookup.size_n = count, self.spec_ngram_size

    def arguments(self) -> list[str]:
        """The flags that ``polydraft-xllamacpp`` makes these settings of; those with their defaults are left out."""
        changed = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name not in _REQUIRED)
        flags = ["--model", str(self.model), "--ctx-size", str(self.ctx_size)]
        for name, value in changed:
            if value != _DEFAULTS[name]:
                text = ("on" if value else "off") if isinstance(value, bool) else str(value)
                flags += [f"--{name.replace('_', '-')}", text]
        return flags


_REQUIRED = {field.name for field in fields(ServerSettings) if field.default is MISSING}
_DEFAULTS = {field.name: field.default for field in fields(ServerSettings)}


def gpus(engine: Any) -> dict[str, dict[str, Any]]:
    """The GPUs that the wheel was built for and sees: polydraft's name -> xllamacpp's record, in its order."""
    kinds = {"GGML_BACKEND_DEVICE_TYPE_GPU", "GGML_BACKEND_DEVICE_TYPE_IGPU"}
    return {device_name(found["name"]): found for found in engine.get_device_info() if found["type"].name in kinds}
