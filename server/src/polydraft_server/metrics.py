"""``/metrics``: vLLM's names, so that its dashboards read them; what vLLM does not have begins with ``polydraft:``."""

from __future__ import annotations

from collections.abc import Callable

from polydraft import GenerationResult, GenerationStats
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_RATES = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 1000, 2000)
_LABELS = ("model_name", "engine")


class Metrics:
    """The counters of one server.

    Args:
        model: The label ``model_name``.
        running: Gives the number of generations that have their turn.
        waiting: Gives the number of those that wait.
        positions: The most drafts of a round.
    """

    def __init__(self, model: str, running: Callable[[], int], waiting: Callable[[], int], positions: int) -> None:
        self._registry = registry = CollectorRegistry()
        self._of_drafts = of_drafts = CollectorRegistry()
        self._reports_drafts: bool | None = None
        """Whether the engine reports what it drafts; None: nothing has been drafted yet."""
        self._labels = labels = (model, "0")

        def counter(name: str, text: str, registry: CollectorRegistry = registry) -> Counter:
            return Counter(name, text, _LABELS, registry=registry).labels(*labels)

        def times(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=registry).labels(*labels)

        for name, text, value in (
            ("vllm:num_requests_running", "Generations that the engine works on.", running),
            ("vllm:num_requests_waiting", "Generations that wait for their turn.", waiting),
        ):
            Gauge(name, text, _LABELS, registry=registry).labels(*labels).set_function(value)
        self._drafts = counter(
            "vllm:spec_decode_num_drafts", "Rounds: target forwards that verified a draft.", of_drafts
        )
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", of_drafts)
        self._accepted = counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", of_drafts
        )
        self._per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens per draft position.",
            (*_LABELS, "position"),
            registry=of_drafts,
        )
        for position in range(positions):  # from 0 on: of a series that begins later, its first counts are lost
            self._per_position.labels(*labels, str(position))
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._queried = counter("vllm:prefix_cache_queries", "Prompt tokens whose KV was looked for.")
        self._hit = counter(
            "vllm:prefix_cache_hits", "Prompt tokens that were not run: an earlier call had left their KV."
        )
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Generations that ended.", (*_LABELS, "finished_reason"), registry=registry
        )
        self._queue = times("vllm:request_queue_time_seconds", "Time that a generation waited for its turn.")
        self._first = times("vllm:time_to_first_token_seconds", "From the request to the first token.")
        self._whole = times("vllm:e2e_request_latency_seconds", "From the request to the last token.")
        self._prefill = times("vllm:request_prefill_time_seconds", "Prefill of a generation.")
        self._decode = times("vllm:request_decode_time_seconds", "From the first token to the last.")
        self._per_token = times(
            "vllm:request_time_per_output_token_seconds", "Decode seconds per token.", _TOKEN_SECONDS
        )
        self._rate = Histogram(
            "polydraft:tokens_per_second",
            "Decoded tokens per second of a generation, with and without speculation.",
            (*_LABELS, "speculation"),
            buckets=_RATES,
            registry=registry,
        )
        self._errors = Counter(
            "polydraft:request_errors",
            "Requests that were answered with an error, by its type and code.",
            (*_LABELS, "type", "code"),
            registry=registry,
        )
        self._cancelled = counter("polydraft:requests_cancelled", "Requests whose client left before their end.")

    def started(self, waited: float) -> None:
        """A generation has its turn, after so many seconds."""
        self._queue.observe(waited)

    def first_token(self, seconds: float) -> None:
        """The first token of a generation, seconds after the request."""
        self._first.observe(seconds)

    def ended(self, result: GenerationResult, seconds: float, reason: str) -> None:
        """A generation ended, seconds after the request; ``reason`` is the API's finish reason."""
        stats = result.stats
        prompt_tokens = stats.num_prompt_tokens or 0
        self._success.labels(*self._labels, reason).inc()
        self._prompt.inc(prompt_tokens)
        if stats.num_reused_tokens is not None:
            self._queried.inc(prompt_tokens)
            self._hit.inc(stats.num_reused_tokens)
        self._generated.inc(stats.num_tokens)
        self._whole.observe(seconds)
        if stats.prefill_seconds is not None:
            self._prefill.observe(stats.prefill_seconds)
        if stats.decode_seconds:
            self._decode.observe(stats.decode_seconds)
        if stats.tokens_per_second:
            self._per_token.observe(1 / stats.tokens_per_second)
            speculation = "off" if result.speculation_off is not None else "on"
            self._rate.labels(*self._labels, speculation).observe(stats.tokens_per_second)
        if result.speculation_off is None:
            self._reports_drafts = bool(self._reports_drafts) or stats.num_drafts is not None
        self._count_drafts(stats)

    def _count_drafts(self, stats: GenerationStats) -> None:
        self._drafts.inc(stats.num_drafts or 0)
        self._drafted.inc(stats.num_draft_tokens or 0)
        self._accepted.inc(stats.num_accepted_tokens or 0)
        for position, count in enumerate(stats.accepted_per_position or ()):
            self._per_position.labels(*self._labels, str(position)).inc(count)

    def failed(self, kind: str, code: str | None) -> None:
        """A request was answered with an error, in a stream or by its status."""
        self._errors.labels(*self._labels, kind, code or "").inc()

    def cancelled(self) -> None:
        """A client left before its request had ended."""
        self._cancelled.inc()

    def page(self) -> bytes:
        """The metrics as Prometheus reads them; without those of drafts where the engine does not report any."""
        drafts = b"" if self._reports_drafts is False else generate_latest(self._of_drafts)
        return generate_latest(self._registry) + drafts
