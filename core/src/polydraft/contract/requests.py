"""Inputs: generation settings, prompts and requests. Data flows request -> session -> loop -> engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer

from polydraft.contract.packings import Packing
from polydraft.contract.records import DrafterKind, Exactness, Record
from polydraft.secrets import Secret

__all__ = [
    "DEFAULT_SETTINGS",
    "LONGEST_STOP",
    "PREFIX_CACHE_BYTES",
    "Acceptance",
    "ChosenBy",
    "GenerationSettings",
    "Guided",
    "HubOptions",
    "LoadRequest",
    "Message",
    "ModelSource",
    "OffReason",
    "Prompt",
    "Speculate",
    "SpeculationPlan",
    "Thought",
    "TokenRequest",
]

Speculate = Literal["auto", "on", "off"]
"""``auto``: speculate where possible, and report why where not. ``on``: raise an error where not. ``off``: plain
decoding."""

Message = Mapping[str, Any]
"""A chat message as OpenAI's API takes it: ``{"role": ..., "content": ...}``.

``content`` is text, or a list of parts ``{"type": "text", "text": ...}``, which are joined; images, audio and video are
not supported yet. ``content`` may be empty (``""`` or ``[]``; None next to ``tool_calls``): the template renders an
empty turn. A prompt of empty messages only is refused, like an empty text. An assistant's message may have
``tool_calls``, whose arguments are a dict or a JSON object as text. A message of the role ``tool`` answers one of them:
the one with the id ``tool_call_id``, else of the function ``name``, else the first one without an answer. The role
``developer`` means ``system``."""

Prompt = str | Sequence[Message] | Sequence[int]
"""Text (taken raw, with BOS once), chat messages (through the model's chat template), or token ids (as they are)."""


Acceptance = Literal["exact-match", "rejection"]
"""When a drafted token is accepted under sampling. ``exact-match``: it equals the target's own choice, made with the
noise of seed and position; a seed gives the same tokens with and without speculation. ``rejection``: with probability
min(1, p/q), else a token is drawn from the residual distribution (Leviathan et al. 2023, arXiv:2211.17192, Algorithm
1). The distribution is that of plain decoding, **the tokens of a seed are not**: they depend on k and the drafter."""


LONGEST_STOP = 1024
"""Maximum length of a stop string in characters. Matching costs time for each of them at every token."""


PREFIX_CACHE_BYTES = 2**30
"""Memory for the KV of earlier calls that later prompts reuse, if the caller does not say how much: 1 GiB."""


class Thought(Record):
    """A thought before an answer that must match: the tokens around it, and nothing else, end the freedom inside it."""

    open: int = Field(description="Token that begins it.")
    close: int = Field(description="Token that ends it.")
    begun: bool = Field(description="The prompt ends inside it.")


class Guided(Record):
    """What an output must match, from its first token to its end-of-sequence token. ``docs/structured-output.md``.

    The end-of-sequence ids are allowed where what came before matches, and nowhere else: so an output with the
    ``finish_reason`` ``eos`` matches, and one that anything else ended may be cut.
    """

    kind: Literal["json", "regex", "choice", "grammar"] = Field(
        description="``json``: a JSON value that a schema allows. ``regex``: what an expression matches as a whole. "
        "``choice``: one of several texts. ``grammar``: llguidance's dialect of Lark, or llama.cpp's GBNF."
    )
    text: str = Field(description="The schema as JSON, the expression, the texts as a JSON list, or the grammar.")
    thought: Thought | None = Field(default=None, description="What may come before; None: nothing.")

    @property
    def data(self) -> Any:
        """The JSON schema, or the list of choices, as data."""
        return json.loads(self.text)


class GenerationSettings(Record):
    """The effective settings of one generation. The defaults are polydraft's own, the same for every engine.

    A checkpoint's ``generation_config`` does not silently change sampling: only its end-of-sequence ids are used, all
    of them.

    Logits are changed in this order: ``guided`` (tokens that may not come get ``-inf``), ``logit_bias``,
    ``repetition_penalty``, ``frequency_penalty`` and ``presence_penalty``, ``logits_processor`` (and ``guided`` again),
    ``banned_token_ids`` (and the ids that ``min_new_tokens`` suppresses), temperature, ``top_k``, ``top_p``, ``min_p``,
    ``typical_p``. ``forced_token_ids`` overrides them all. Each position
    sees the tokens before it, drafts included, as in plain decoding.
    """

    max_new_tokens: int = Field(
        default=512, ge=1, lt=2**63, description="Maximum number of tokens to generate, EOS included."
    )
    min_new_tokens: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="EOS and stop ids are suppressed until this many tokens have been generated.",
    )
    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="0 is greedy: the largest logit, lowest id on a tie."
    )
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Keep the most likely tokens that hold this share of the probability (Holtzman et al. 2020).",
    )
    top_k: int = Field(default=0, ge=0, lt=2**31, description="Keep the k largest logits; 0 keeps all.")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Drop tokens below min_p times the largest probability."
    )
    typical_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Keep the tokens whose information is nearest to the entropy, up to this share of the probability "
        "(locally typical sampling; Meister et al. 2022, arXiv:2202.00666).",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.001,
        le=1000.0,
        allow_inf_nan=False,
        description="Divides positive and multiplies negative logits of tokens in the prompt or the output; above 1 "
        "discourages them (Keskar et al. 2019, arXiv:1909.05858; as in Transformers and vLLM).",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="Subtracted from the logits of tokens in the output (as in OpenAI's API and vLLM).",
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="Subtracted from a token's logit once per occurrence in the output (as in OpenAI's API and vLLM).",
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict,
        description="Token id -> number from -100 to 100, added to its logit (as in OpenAI's API).",
    )
    banned_token_ids: tuple[int, ...] = Field(
        default=(), description="Tokens that are never chosen (Transformers' suppress_tokens)."
    )
    forced_token_ids: dict[int, int] = Field(
        default_factory=dict,
        description="Index in the output, from 0 -> the token there, whatever the logits and other settings.",
    )
    logits_processor: Any = Field(
        default=None,
        description="A pure function ``(prefix_ids, logits) -> logits``, or an object with ``accept(token_id)`` and "
        "``rollback(num_tokens)`` as well, such as a grammar.",
    )
    guided: Guided | None = Field(
        default=None, description="What the output must match: a JSON schema, a regular expression, a grammar."
    )
    acceptance: Acceptance = Field(
        default="exact-match",
        description="When a draft is accepted under sampling: ``exact-match``, or ``rejection`` (rejection sampling), "
        "which is not seed-identical.",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="None: one is drawn; the result reports it.")
    stop: tuple[str, ...] = Field(
        default=(),
        description=f"Stop strings of at most {LONGEST_STOP} characters; ``text`` ends before the match, ``token_ids`` "
        "include it.",
    )
    stop_token_ids: tuple[int, ...] = Field(
        default=(),
        description="Tokens that end the output. The token itself is in ``token_ids`` and ``raw_text``, and in "
        "``text`` unless it is special (as in Transformers and vLLM).",
    )
    ignore_eos: bool = Field(default=False, description="Continue after end-of-sequence ids.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Report log-probabilities of the chosen token and of this many top candidates, from the target's "
        "raw logits.",
    )

    @field_serializer("logits_processor", when_used="json-unless-none")
    def _name_of_processor(self, processor: Any) -> str:
        """Serialised as its qualified name."""
        kind = processor if hasattr(processor, "__qualname__") else type(processor)
        return f"{kind.__module__}.{kind.__qualname__}"


DEFAULT_SETTINGS = GenerationSettings()
"""All settings at their defaults."""


class OffReason(Record):
    """Why speculation is off."""

    code: Literal[
        "caller",  # speculate="off" or drafter=None
        "no-drafter",  # none is known for the target, and the backend has no n-gram drafting
        "settings",  # these sampling settings cannot be combined with speculation on this engine
        "length",  # too few tokens left to draft any
        "fault",  # a known fault of the installed engine version
        "engine",  # the engine does not speculate, for an engine-specific reason
        "slower",  # `polydraft tune` measured that it is slower than plain decoding here
    ]
    message: str = Field(description="One sentence.")


class HubOptions(Record):
    """How models are fetched from the Hugging Face Hub; the names are those of ``huggingface_hub``."""

    revision: str | None = None
    cache_dir: Path | None = None
    token: Secret | bool | None = Field(default=None, union_mode="left_to_right")
    local_files_only: bool = False

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``hf_hub_download`` and ``snapshot_download``, with the token itself."""
        token = self.token.reveal() if isinstance(self.token, Secret) else self.token
        return {**self.model_dump(exclude={"token"}), "token": token}


class ModelSource(Record):
    """A resolved model: its config has been read, but not its weights."""

    id: str = Field(description="As the user wrote it: Hub id, folder, ``builtin:<name>``, or a server's own name.")
    kind: Literal["hub", "local", "builtin", "served"] = Field(
        description="``served``: a name of the backend's server (``BackendRecord.own_names``); nothing was looked up."
    )
    path: Path | None = Field(default=None, description="Local folder or file; None for the Hub's and served models.")
    format: str = Field(description="Weight format: safetensors, gguf, mlx, litertlm, reference, ...")
    config: dict[str, Any] = Field(default_factory=dict, description="Parsed config.json; empty without one.")
    revision: str | None = None
    file: str | None = Field(default=None, description="File or pattern inside the repo or folder, for single files.")

    @property
    def model_type(self) -> str:
        """``model_type`` of the config, or an empty string."""
        return str(self.config.get("model_type", ""))


Choice = Literal["caller", "measured", "recommended", "rule"]
"""Who made a choice. ``caller``: it was an argument. ``measured``: the fastest that ``polydraft tune`` found for these
weights on this machine. ``recommended``: the registry. ``rule``: a general rule, such as the backends' own ranks."""


class ChosenBy(Record):
    """Who chose the backend, the drafter and k of a session."""

    backend: Choice = "caller"
    drafter: Choice = "caller"
    num_speculative_tokens: Choice = "caller"


class SpeculationPlan(Record):
    """Which drafter a session uses, or why it uses none."""

    kind: DrafterKind | None = None
    drafter: ModelSource | None = Field(default=None, description="None for ``ngram`` and for plain decoding.")
    num_speculative_tokens: int = Field(default=0, ge=0, description="k, the bonus token excluded.")
    max_speculative_tokens: int | None = Field(
        default=None, ge=1, description="The largest k that the session may pick for a round; None: k is fixed."
    )
    chosen_by: Literal["caller", "registry", "sibling", "config", "fallback", "measured", "none"] = "none"
    k_chosen_by: Choice = Field(default="caller", description="Who chose k; meaningless for plain decoding.")
    note: str = Field(default="", description="What the user should know about the choice, one sentence.")
    off: OffReason | None = None

    @property
    def max_draft_tokens(self) -> int:
        """The most drafts of a round, which a stepping engine makes room for."""
        return self.max_speculative_tokens or self.num_speculative_tokens


class LoadRequest(Record):
    """Everything a backend needs to load a pair. The core has checked that the pair fits and the backend is usable."""

    backend: str = Field(description="Name of the backend that loads it.")
    target: ModelSource
    plan: SpeculationPlan
    exactness: Exactness = "standard"
    context_length: int | None = Field(default=None, ge=1, description="Tokens; None: the model's own, within memory.")
    prefix_cache_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Memory for the KV of earlier calls, which later prompts reuse; 0: nothing is reused. None: up to "
        "``PREFIX_CACHE_BYTES``, and less where memory is short. An engine with a prefix cache of its own takes it as "
        "on or off.",
    )
    dtype: str = Field(default="auto", description="auto, float32, bfloat16, float16, or the engine's own names.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps, ...")
    trust_remote_code: bool = False
    hub: HubOptions = HubOptions()
    engine_options: Any = Field(default=None, description="An instance of the backend's ``EngineOptions`` model.")
    packing: Packing | None = Field(default=None, description="Which of the target's packings ``target`` is.")
    chosen_by: ChosenBy = Field(default=ChosenBy(), description="Who chose backend, drafter and k.")


class TokenRequest(Record):
    """One generation, in tokens: a session's request to the loop or a whole engine."""

    prompt_token_ids: tuple[int, ...] = Field(min_length=1)
    settings: GenerationSettings
    seed: int = Field(ge=0, lt=2**63, description="The effective seed: that of the settings, or a drawn one.")
    stream: int = Field(
        default=0, ge=0, description="Number of the noise stream: prompts of one batch share a seed and differ in this."
    )
    speculate: bool
    num_speculative_tokens: int = Field(ge=0, description="k, the bonus token excluded; 0: plain decoding.")
    least_speculative_tokens: int | None = Field(
        default=None,
        ge=0,
        description="The smallest k, where the loop picks it for each round, up to ``num_speculative_tokens``; None: k "
        "is the same in all rounds.",
    )
    eos_token_ids: frozenset[int] = Field(description="Empty if ``ignore_eos`` is set.")
    max_total_tokens: int = Field(description="Context length: prompt and output together.")
