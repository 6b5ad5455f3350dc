"""The backend and its engine in the worker, and the answers to the app's questions about them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from polydraft._loop.kept import KeptSequences
from polydraft._loop.rounds import stepping_rounds
from polydraft._loop.schedule import SessionSchedule
from polydraft._session.engine_check import check_engine
from polydraft._session.failures import engine_failure
from polydraft._workers.messages import Loaded, TokenizerFacts, spelled
from polydraft.contract.requests import GenerationSettings, TokenRequest
from polydraft.contract.stepping import SteppingEngine
from polydraft.contract.whole import WholeEngine
from polydraft.errors import EngineError, PluginError, PolydraftError
from polydraft.sampling.structured import Grammars
from polydraft.text.ids_only import IdsOnlyTokenizer

if TYPE_CHECKING:
    from polydraft._session.call import Call
    from polydraft.contract.backend import Backend
    from polydraft.contract.results import Round, RunningInfo
    from polydraft.contract.tokenizer import Tokenizer

__all__ = ["ServedEngine"]


class ServedEngine:
    """One backend, and the engine that it has loaded.

    Args:
        name: The backend's name.
        factory: ``module:Class``.
    """

    tokenizer: Tokenizer
    running: RunningInfo
    _grammars: Grammars

    def __init__(self, name: str, factory: str) -> None:
        self._name = name
        self._factory = factory
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._engine: SteppingEngine | WholeEngine | None = None
        self._schedule: SessionSchedule | None = None
        self._kept: KeptSequences | None = None
        self._sent: set[int] = set()
        """Tokens whose bytes the app has."""

    @property
    def concurrent(self) -> bool:
        """Whether calls make progress together."""
        return self.running.concurrency == "concurrent"

    def typed(self, error: BaseException, doing: str = "") -> PolydraftError:
        """What the engine raised, as one of polydraft's errors."""
        running = getattr(self, "running", None)
        if isinstance(error, PolydraftError) and not running:
            return error
        if running is None:
            made: BaseException = EngineError(
                f"The backend {self._name} failed {doing}: {type(error).__name__}: {error}.",
                "Report it to the backend's authors.",
            )
        else:
            made = engine_failure(error, running, doing)
        if not isinstance(made, PolydraftError):  # the app's own in its process; nobody's in this one
            made = EngineError(f"The engine was interrupted: {type(error).__name__}.", "Generate again.")
        if made is not error:
            made.__cause__ = error
        return made

    def rounds(self, call: Call) -> Iterator[Round]:
        """Start a call."""
        engine = self._engine
        assert engine is not None
        if isinstance(engine, WholeEngine):
            return engine.rounds(call)
        assert self._kept is not None
        return stepping_rounds(engine, call, self._kept, self._schedule, self._grammars)

    def new_spellings(self, token_ids: Iterable[int]) -> dict[int, str]:
        """The bytes of those tokens that have not been sent before.

        A token that another thread's message, still on its way, holds is left out: the app then asks for it.
        """
        new = set(token_ids) - self._sent
        found = {}
        for token_id in new:
            with suppress(Exception):  # raised if the app asks for it
                found[token_id] = self.tokenizer.token_bytes(token_id)
        self._sent |= found.keys()
        return spelled(found)

    # Questions --------------------------------------------------------------------------------------------------------

    def answer(self, name: str, arguments: dict[str, Any]) -> tuple[Any, dict[int, str]]:
        """The value of an answer, and spellings that go with it."""
        value = getattr(self, f"_on_{name}")(**arguments)
        if name == "spell":
            return None, value
        if name in {"encode", "chat"}:
            value = list(value)
            return value, self.new_spellings(value)
        return value, {}

    @property
    def backend(self) -> Backend:
        """Made on first use; the engine is imported when it is asked."""
        with self._lock:
            if self._backend is None:
                self._backend = self._make()
            return self._backend

    def _make(self) -> Backend:
        module, _, attribute = self._factory.partition(":")
        try:
            made: Backend = getattr(import_module(module), attribute)()
        except BaseException as error:
            raise PluginError(
                f"The backend {self._name!r} cannot be made from {self._factory} in its worker: "
                f"{type(error).__name__}: {error}.",
                "Install it again.",
            ) from error
        return made

    def _on_capabilities(self) -> Any:
        return self.backend.capabilities().model_dump(mode="json")

    def _on_diagnose(self) -> Any:
        return self.backend.diagnose().model_dump(mode="json")

    def _on_refuse(self, target: Any, plan: Any) -> str | None:
        from polydraft.contract.requests import ModelSource, SpeculationPlan

        return self.backend.refuse(ModelSource.model_validate(target), SpeculationPlan.model_validate(plan))

    def _on_options_schema(self) -> Any:
        return self.backend.options.model_json_schema()

    def _options(self, options: Mapping[str, Any]) -> Any:
        from polydraft._registry.options import check_options

        return check_options(self.backend.options, self._name, options)

    def _request(self, request: Mapping[str, Any], options: Mapping[str, Any] | None) -> Any:
        from polydraft.contract.requests import LoadRequest

        made = LoadRequest.model_validate(request)
        return made if options is None else made.model_copy(update={"engine_options": self._options(options)})

    def _on_build(self, request: Any, options: Any) -> Any:
        found = self.backend.build(self._request(request, options))
        return None if found is None else dict(found)

    def _on_server_command(self, request: Any, options: Any, host: str, port: int) -> Any:
        from polydraft.secrets import Secret

        command = self.backend.server_command(self._request(request, options), host=host, port=port)
        given = command.environment.items()
        secret = {name: (value.reveal(), value.shell) for name, value in given if isinstance(value, Secret)}
        usual = {name: value for name, value in given if not isinstance(value, Secret)}
        return {"arguments": list(command.arguments), "environment": usual, "secrets": secret}

    def _on_load(self, request: Any, options: Any) -> Any:
        from polydraft._session.loading import load_engine

        backend, capabilities = self.backend, self.backend.capabilities()
        made = self._request(request, options)
        engine, notes = load_engine(backend, made)
        try:
            check_engine(engine, getattr(engine, "running", None), capabilities)
            self._engine, self.tokenizer, self.running = engine, engine.tokenizer, engine.running
            self._grammars = Grammars(engine.tokenizer)
            asks = isinstance(engine, WholeEngine) and (
                type(engine).check_settings is not WholeEngine.check_settings
                or type(engine).speculation_conflict is not WholeEngine.speculation_conflict
            )
            loaded = Loaded(
                running=engine.running,
                tokenizer=_facts(engine.tokenizer),
                notes=tuple(notes),
                checks_settings=asks,
                picks_k=isinstance(engine, SteppingEngine) or engine.picks_k,
                shared_sequences=engine.shared_sequences,
                shows_logits=isinstance(engine, SteppingEngine) and capabilities.exposes_logits,
            )
            if isinstance(engine, SteppingEngine):
                self._kept = KeptSequences(engine, capabilities, made.prefix_cache_bytes)
            largest = engine.running.max_speculative_tokens
            if isinstance(engine, SteppingEngine) and largest is not None:
                self._schedule = SessionSchedule(min(largest, engine.max_draft_tokens))
            return loaded.model_dump(mode="json")
        except BaseException:
            with suppress(Exception):
                engine.close()
            raise

    def _on_close(self) -> None:
        if self._engine is not None:
            if self._kept is not None:
                self._kept.close()
            self._engine.close()
            self._engine = None

    def _on_check_settings(self, settings: Any) -> None:
        checked = GenerationSettings.model_validate(settings)
        if isinstance(self._engine, WholeEngine):
            self._engine.check_settings(checked)
        elif checked.guided is not None:
            self._grammars.check(checked.guided)

    def _on_speculation_conflict(self, settings: Any) -> Any:
        assert isinstance(self._engine, WholeEngine)
        found = self._engine.speculation_conflict(GenerationSettings.model_validate(settings))
        return None if found is None else found.model_dump(mode="json")

    def _on_measure_tie(self, request: Any, **rest: Any) -> Any:
        from polydraft.verification._steps import measure_tie

        assert isinstance(self._engine, SteppingEngine)
        assert self._kept is not None
        self._kept.clear()  # some engines hold one sequence at a time
        return measure_tie(self._engine, TokenRequest.model_validate(request), **rest).model_dump(mode="json")

    def _on_encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _on_chat(self, messages: Any, **rest: Any) -> list[int]:
        return self.tokenizer.chat(messages, **rest)

    def _on_token_id(self, token: str) -> int | None:
        return self.tokenizer.token_id(token)

    def _on_spell(self, token_ids: list[int], asked: int) -> dict[int, str]:
        found = {asked: self.tokenizer.token_bytes(asked)}
        for token_id in token_ids:
            with suppress(Exception):  # raised if it is asked for itself
                found[token_id] = self.tokenizer.token_bytes(token_id)
        return spelled(found)

    def _on_memory(self) -> dict[str, int]:
        return _memory()


def _facts(tokenizer: Tokenizer) -> TokenizerFacts:
    return TokenizerFacts(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tokenizer.eos_token_ids,
        special_token_ids=tokenizer.special_token_ids,
        response_template=getattr(tokenizer, "response_template", None),
        ids_only=isinstance(tokenizer, IdsOnlyTokenizer),
        text_only=bool(getattr(tokenizer, "text_only", False)),
    )


def _memory() -> dict[str, int]:
    found = {}
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["peak"] = peak if sys.platform == "darwin" else peak * 1024
    with suppress(OSError):
        import os

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - one line
            found["resident"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found
