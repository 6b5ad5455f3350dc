"""``Bench``: what a check works with. A case's session, and what this run has measured on it."""

from __future__ import annotations

from contextlib import closing, contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

from polydraft.contract import GenerationResult, GenerationSettings, WholeEngine
from polydraft.contract.results import compared
from polydraft.errors import UnsupportedError
from polydraft.verification import Noise, epsilon_of, first_difference, judge_outputs, measure_noise

from polydraft_conformance.catalog import not_claimed
from polydraft_conformance.claims import MODEL_KINDS, expect
from polydraft_conformance.comparison import describe
from polydraft_conformance.counting import logged, stepping_engine
from polydraft_conformance.evidence import Evidence, GreedyRun, LongRun, greedy_settings
from polydraft_conformance.prompts import PromptText, WindowPrompt, prompts_that_fit, window_prompts
from polydraft_conformance.streams import streamed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from polydraft import Session
    from polydraft.contract import Capabilities, Prompt, SteppingEngine

    from polydraft_conformance.pairs import Case
    from polydraft_conformance.suite import Suite

__all__ = ["EOS_LIMIT", "Bench"]

EOS_LIMIT = 96
"""Tokens of outputs that EOS should end."""
_LONG_PROMPT, _LONG_CONTEXT = 60, 420
"""Tokens of the long run's prompt, and of prompt and output together."""
_WATCHED = (64, 90, 124, 160, 200, 252, 300, 350, 394)
"""Contexts, in tokens, at which the logits of a long run's rounds are kept; up to ten are added at random."""
_FINE = 1e-5
"""A precision with a smaller epsilon has near ties so rarely that outputs of several sessions can be compared."""
_NOISE_TEXTS = 4
"""Contexts on which the noise is measured."""
_NOISE_PROMPT, _NOISE_OUTPUT, _BEST = 20, 14, 5
"""Tokens of the prompts and outputs on which that of log-probabilities is, and how many of the best tokens."""
_TOLERANCE = 16
"""A difference of this many times the measured noise is a defect. Noise grows with the context, from the short one that
it is measured on to the longest one checked; a stale row of the KV cache is thousands of times larger."""


class Bench:
    """One session under test.

    Args:
        suite: The run.
        case: What the session was loaded with.
        session: The session.
        numbers: What a check puts here is in its row of the report.
    """

    def __init__(self, suite: Suite, case: Case, session: Session, numbers: dict[str, Any]) -> None:
        self.suite = suite
        self.case = case
        self.session = session
        self.numbers = numbers
        if session.running.matmul_precision is not None:  # what an engine says of itself, and is judged by
            numbers["matmul_precision"] = session.running.matmul_precision

    def on(self, session: Session) -> Bench:
        """The same bench with another session of the case."""
        return Bench(self.suite, self.case, session, self.numbers)

    @contextmanager
    def opened(self, **changes: Any) -> Iterator[Bench]:
        """A bench with a new session, closed at the end; ``changes`` are arguments of ``polydraft.load``."""
        with closing(self.suite.load(self.case, **changes)) as session:
            yield self.on(session)

    # What is under test ---------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """The backend's claims."""
        assert self.suite.capabilities is not None, "Only usable backends have sessions."
        return self.suite.capabilities

    @property
    def quick(self) -> bool:
        """Whether this is a quick run: with fewer prompts."""
        return self.suite.options.quick

    @property
    def engine(self) -> SteppingEngine:
        """The stepping engine; of a whole engine it ends the check, which needs primitives to call."""
        engine = stepping_engine(self.session)
        if engine is None:
            not_claimed("A whole engine keeps its own loop: it has no primitives to call.")
        return engine

    @property
    def k(self) -> int:
        """Draft tokens of the stepping engine's largest step in this case."""
        return min(self.case.k, self.engine.max_draft_tokens)

    @property
    def window(self) -> int:
        """The target's sliding window in tokens, or what stands for it."""
        return self.case.pair.window

    def need_model_drafter(self) -> None:
        """End the check where the core drafts n-grams: then the engine has no drafter to look at."""
        if self.case.kind not in MODEL_KINDS:
            not_claimed("n-gram drafts are the core's own.")

    def seed(self, number: int) -> dict[str, Any]:
        """``seed=`` where the backend claims it: the run's own seed of this number."""
        return {"seed": self.seed_of(number)} if "seed" in self.capabilities.sampling else {}

    def seed_of(self, number: int) -> int:
        """The sampling seed of a number: other numbers and other runs have others."""
        return self.suite.options.seed * 100_003 + number

    def takes(self, settings: Mapping[str, Any]) -> bool:
        """Whether a whole engine takes these values: it may refuse some of a claimed setting, and the row says so."""
        engine = self.session.engine
        if not isinstance(engine, WholeEngine):
            return True
        known = {name: value for name, value in settings.items() if name in GenerationSettings.model_fields}
        try:
            engine.check_settings(GenerationSettings(**known))
        except UnsupportedError as error:
            self.numbers.setdefault("refused", []).append(str(error))
            return False
        return True

    def random(self, name: str) -> Random:
        """Random choices of a check that vary with the run's seed and repeat with it.

        Args:
            name: Tells the uses apart: the check's name, say.
        """
        return Random(f"polydraft {self.suite.options.seed} {self.case.id} {name}")

    # Prompts --------------------------------------------------------------------------------------------------------

    def prompt(self, length: int, variant: int = 0) -> list[int]:
        """The first ``length`` tokens of the run's text in the target's tokens; each variant begins elsewhere."""
        text = self.suite.cache.once(
            ("text", self.case.pair), lambda: PromptText.of(self.session, self.suite.options.seed)
        )
        return text.tokens(length, variant)

    @property
    def window_prompts(self) -> tuple[WindowPrompt, ...]:
        """Prompts shorter than, across and past the sliding window, and one of a single token."""
        return window_prompts(self.prompt, self.window, quick=self.quick)

    @property
    def context(self) -> list[int]:
        """Prompt and greedy output, longer than twice the window: text that the model would write."""

        def make() -> list[int]:
            prompt = self.prompt(max(2, self.window // 2))
            # Past two windows, so that a ring has been overwritten as a whole.
            plain = self.plain(prompt, **greedy_settings(2 * self.window + 24 - len(prompt)))
            return [*plain.prompt_token_ids, *plain.token_ids]

        return self.suite.cache.once(("context", self.case.pair), make)

    # Outputs --------------------------------------------------------------------------------------------------------

    def plain(self, token_ids: Sequence[int], **settings: Any) -> GenerationResult:
        """Plain decoding of a prompt, made once per target: it depends on neither drafter nor k.

        In low precision it is made once per k: the sessions' buffers have other sizes, and with them near ties may
        flip.
        """
        k = None if self.is_fine else self.case.k
        key = ("plain", self.case.pair.target, k, tuple(token_ids), tuple(sorted(settings.items())))
        return self.suite.cache.once(key, lambda: self.session.generate(list(token_ids), speculate="off", **settings))

    @property
    def evidence(self) -> Evidence:
        """The greedy outputs of the case, plain and speculative."""

        def make() -> Evidence:
            runs = []
            for prompt in self.window_prompts:
                settings = greedy_settings(prompt.max_new_tokens)
                plain = self.plain(prompt.token_ids, **settings)
                with logged(self.session) as logs:
                    speculative = streamed(self.session, list(prompt.token_ids), **settings)
                runs.append(GreedyRun(prompt, plain, speculative, logs[-1] if logs else None))
            second = runs[1].prompt
            settings = greedy_settings(second.max_new_tokens)
            return Evidence(tuple(runs), self.session.generate(list(second.token_ids), speculate="off", **settings))

        return self.suite.cache.once(("evidence", self.case), make)

    @property
    def long_run(self) -> LongRun:
        """One long greedy output of the case, plain and speculative. It takes seconds: for scopes of few cases."""

        def make() -> LongRun:
            # The bonus token and a full draft must fit behind the last token.
            total = min(_LONG_CONTEXT, self.session.running.context_length - self.case.k - 2)
            prompt = self.prompt(min(_LONG_PROMPT, total // 2), variant=3)
            settings = greedy_settings(total - len(prompt))
            plain = self.plain(prompt, **settings)
            random = self.random("watched rounds")
            watch = [length + random.randrange(10) for length in _WATCHED] if self.case.kind in MODEL_KINDS else []
            with logged(self.session, watch) as logs:
                found = streamed(self.session, prompt, **settings)
            return LongRun(plain, found, logs[-1] if logs else None)

        return self.suite.cache.once(("long run", self.case), make)

    @property
    def ended_by_eos(self) -> list[tuple[Prompt, GenerationResult]]:
        """A few prompts whose plain greedy outputs EOS ends, with these outputs.

        Raises:
            AssertionError: There is none: a check of them would prove nothing.
        """

        def make() -> list[tuple[Prompt, GenerationResult]]:
            found: list[tuple[Prompt, GenerationResult]] = []
            for prompt in prompts_that_fit(self.session, self.suite.options.seed, EOS_LIMIT):
                result = self.session.generate(prompt, max_new_tokens=EOS_LIMIT, speculate="off")
                if result.finish_reason == "eos":
                    found.append((prompt, result))
                if len(found) == (2 if self.quick else 3):
                    break
            return found

        ended = self.suite.cache.once(("ended by EOS", self.case.pair), make)
        expect(bool(ended), "The check proves nothing: EOS ends none of the plain outputs.")
        return ended

    # Comparisons ----------------------------------------------------------------------------------------------------

    @property
    def noise(self) -> Noise:
        """The engine's numeric noise on the target, measured once for each k on short contexts inside the window.

        On several: noise of tables and of quantized steps is irregular, and one text may show hardly any.
        """
        # Rows of the largest step: noise is measured against single-token steps.
        rows = self.k + 1

        def make() -> Noise:
            length = max(4, min(6 * rows, self.window - rows))
            texts = [self.context[:length], *(self.prompt(length, 100 + number) for number in range(_NOISE_TEXTS - 1))]
            found = [measure_noise(self.engine, text, rows) for text in texts]
            return Noise(
                rows=max(one.rows for one in found),
                prefill=max(one.prefill for one in found),
                largest_logit=max(one.largest_logit for one in found),
            )

        return self.suite.cache.once(("noise", self.case.pair, rows), make)

    @property
    def is_fine(self) -> bool:
        """Whether the session computes so precisely that near ties are very rare: not in 16 bits, nor in TF32."""
        return epsilon_of(self.session.running.precision) < _FINE

    @property
    def tolerance(self) -> float:
        """How far logits may lie apart that should be equal. An engine may have noise only on longer contexts."""
        precision = self.session.running.precision
        if not self.is_fine and self.case.pair.has_experts:
            # Not a multiple of the noise, in which there may be such a token.
            return self.noise.explains(precision, experts=True)
        return _TOLERANCE * max(self.noise.most, epsilon_of(precision) * self.noise.largest_logit)

    @property
    def logprob_noise(self) -> float:
        """How far log-probabilities of plain decoding are from those of prefills of the same text: no drafter's part.

        Measured once for each target of an engine whose logits cannot be read.
        """

        def make() -> float:
            settings: dict[str, Any] = {"speculate": "off", "logprobs": _BEST}
            gaps = [0.0]
            for variant in range(_NOISE_TEXTS):
                prompt = self.prompt(_NOISE_PROMPT, 110 + variant)
                plain = self.session.generate(prompt, **settings, **greedy_settings(_NOISE_OUTPUT))
                for index in range(1, _NOISE_OUTPUT, 3):
                    text = [*prompt, *plain.token_ids[:index]]
                    again = self.session.generate(text, **settings, **greedy_settings(1))
                    one, other = dict((plain.logprobs or ())[index].top), dict((again.logprobs or ())[0].top)
                    gaps += [abs(one[token] - other[token]) for token in one.keys() & other.keys()]
            return max(gaps)

        return self.suite.cache.once(("noise of log-probabilities", self.case.pair), make)

    def same(
        self,
        plain: GenerationResult,
        found: GenerationResult | Sequence[int],
        *,
        wrong: str,
        length: int | None = None,
        names: tuple[str, str] = ("plain", "speculative"),
        near_ties: bool = True,
        earlier: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    ) -> bool:
        """Fail the check unless two outputs are the same tokens, or nearly tied. The verdict goes into its row.

        Where the tokens of one are not certain, as the engine gives text, the same characters are the same output.

        Args:
            plain: The reference output; its prompt and settings are those of both.
            found: The output that must equal it.
            wrong: What is wrong if it does not, one sentence.
            length: Compare with this many leading tokens of ``plain`` only; None: with all.
            names: What the two are called in messages.
            near_ties: Whether a near tie passes.
            earlier: Prompts and outputs of the session's earlier calls, whose KV one of the two may have taken over.

        Returns:
            True if the outputs are equal; False after a near tie: then what follows it cannot be compared.

        Raises:
            AssertionError: They diverge.
        """
        expected = plain.token_ids[:length]
        other = found.token_ids if isinstance(found, GenerationResult) else tuple(found)
        prompt, session = plain.prompt_token_ids, self.session
        results = (plain, found) if isinstance(found, GenerationResult) else (plain,)
        reused = max(result.stats.num_reused_tokens or 0 for result in results)
        judgement = judge_outputs(
            session,
            self.capabilities,
            prompt,
            plain.settings,
            expected,
            other,
            reused=reused,
            stepped=_stepped(prompt, earlier),
        )
        if judgement.verdict == "EXACT" or _same_text(plain, found):
            self.suite.verdicts.append(("EXACT", {}))
            return True
        message, evidence = describe(
            judgement, (expected, other), names, prompt=prompt, of=self._subject(), tokenizer=session.tokenizer
        )
        self.suite.verdicts.append((judgement.verdict, evidence))
        if judgement.passes and near_ties:
            return False
        raise AssertionError(f"{wrong} {message}")

    def _subject(self) -> str:
        """The configuration that a verdict holds for."""
        running, called = self.session.running, self.case.pair.called
        drafter = f" + {called(running.drafter)}" if running.drafter else ""
        return (
            f"{called(running.target)}{drafter} ({self.case.kind}, k={running.num_speculative_tokens}) on "
            f"{running.backend}, {running.engine} {running.engine_version}, {running.computes}, {running.device}, "
            f"{self.suite.hardware}"
        )


def _stepped(prompt: Sequence[int], earlier: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[int, int]]:
    """The spans of a prompt that decoding steps of earlier calls have run: an output's last token was not."""
    found = set()
    for asked, output in earlier:
        text = [*asked, *output[:-1]]
        common = first_difference(text, prompt)
        common = len(text) if common is None else common
        if common > len(asked):
            found.add((len(asked), common))
    return sorted(found)


def _same_text(plain: GenerationResult, found: GenerationResult | Sequence[int]) -> bool:
    """Whether two outputs, of which the tokens of one are not certain, are the same as far as that can be known."""
    if not isinstance(found, GenerationResult) or (plain.certain_ids and found.certain_ids):
        return False
    expected, other = compared(plain, found)
    return expected == other
