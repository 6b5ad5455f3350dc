"""A whole engine: it keeps its own loop and sampler; the plugin translates requests and reports rounds."""

from __future__ import annotations

from collections.abc import Iterator

from polydraft import contract
from polydraft.checkpoints.fetch import fetch
from polydraft.engine_parts import context_length
from polydraft.errors import ModelFormatError, UnsupportedError

from polydraft_markov.markov import VERSION, Markov, generate, sampler
from polydraft_markov.tokenizer import ByteTokenizer


class WholeMarkov(contract.Backend):
    """The backend ``markov-whole``."""

    def capabilities(self) -> contract.Capabilities:
        """What is not claimed here, polydraft refuses: ``top_p``, for example, and log-probabilities."""
        return contract.Capabilities(
            drafter_kinds=frozenset({"draft-model"}),
            sampling=frozenset({"temperature", "seed"}),
            seed_identical=True,
            concurrent_calls=True,
        )

    def diagnose(self) -> contract.Diagnosis:
        """Always usable."""
        return contract.Diagnosis(usable=True, engine_version=VERSION, devices=(contract.DeviceRecord(name="cpu"),))

    def load_engine(self, request: contract.LoadRequest) -> contract.WholeEngine:
        """Refuse what the engine cannot do, then read the models."""
        if request.dtype not in {"auto", "float32"} or request.device not in {"auto", "cpu"}:
            raise UnsupportedError("Markov models run in float32 on the CPU.", "Leave out dtype and device.")
        sources = filter(None, [request.target, request.plan.drafter])
        try:
            models = [Markov.read(fetch(source), source.config) for source in sources]
        except (OSError, KeyError, ValueError) as error:
            raise ModelFormatError(f"{request.target.id} cannot be read: {error!r}.", "Install it again.") from error
        return MarkovLoop(request, *models)


class MarkovLoop(contract.WholeEngine):
    """A loaded pair."""

    tokenizer = ByteTokenizer()

    def __init__(self, request: contract.LoadRequest, target: Markov, drafter: Markov | None = None) -> None:
        self.target, self.drafter = target, drafter
        self.running = contract.RunningInfo.of(
            request,
            engine="polydraft-markov",
            engine_version=VERSION,
            dtype="float32",
            device="cpu",
            context_length=context_length(request),
            concurrency="concurrent",
        )

    def rounds(self, generation: contract.Generation) -> Iterator[contract.Round]:
        """Report what the engine generates; ``emit`` cuts it at the token that ends the output."""
        request, settings = generation.request, generation.request.settings
        prompt, k = request.prompt_token_ids, request.num_speculative_tokens
        drafter = self.drafter if request.speculate else None
        limit = min(settings.max_new_tokens, request.max_total_tokens - len(prompt))
        choose = sampler(settings.temperature, [request.seed, request.stream])
        for output in generate(self.target, drafter, prompt, k, limit, choose):
            accepted = len(output.tokens) - 1  # the last one is the bonus token
            yield generation.emit(output.tokens, num_draft_tokens=output.drafted, num_accepted_tokens=accepted)
            if generation.finish_reason or generation.cancelled():
                return

    def close(self) -> None:
        """Nothing to free."""
