"""An engine that writes what it is told to, at a pace, and counts who is at work."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from polydraft import RunningInfo, Session
from polydraft.contract import Capabilities, GenerationStats, WholeEngine
from polydraft.text.text_only import TextOnlyTokenizer
from polydraft_reference.tokenizer import ByteTokenizer

__all__ = ["Script", "scripted_session"]


@dataclass
class Script:
    """What the engine does, and what it has seen."""

    text: str = "abcdefghij" * 1000
    pace: float = 0.0
    """Seconds for a token."""
    error: Exception | None = None
    """Raised after three tokens."""
    working: int = 0
    most: int = 0
    prompts: list[str] = field(default_factory=list)
    """In the order in which they had their turn."""
    cancelled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class TextOnly(WholeEngine):
    """Gives text without tokens, as Ollama does; ``counts`` are what it tells of the prompt."""

    def __init__(self, running, counts):
        self.tokenizer = TextOnlyTokenizer()
        self.running = running
        self.counts = counts

    def rounds(self, generation):
        generation.report(GenerationStats(num_tokens=2, **self.counts))
        yield generation.emit([*map(ord, "Hello!")], num_draft_tokens=None, num_accepted_tokens=None)
        generation.finish("eos")

    def close(self):
        pass


class CountsAtTheEnd(WholeEngine):
    """Counts the drafts of a generation, and not those of its rounds, as LiteRT-LM and vLLM's server do."""

    def __init__(self, script, running):
        self.tokenizer = ByteTokenizer()
        self.running = running

    def rounds(self, generation):
        generation.report_reused(2)
        yield generation.emit([65], num_draft_tokens=0, num_accepted_tokens=0)
        yield generation.emit([66, 67, 68], num_draft_tokens=None, num_accepted_tokens=None)
        counts = {"num_drafts": 3, "num_draft_tokens": 6, "num_accepted_tokens": 3, "accepted_per_position": (2, 1)}
        generation.report(GenerationStats(num_tokens=5, **counts))
        yield generation.emit([257], num_draft_tokens=None, num_accepted_tokens=None)  # <eos>

    def close(self):
        pass


class CertainAtTheEnd(WholeEngine):
    """Is certain of the ids after its first round only at the end, or never, as LiteRT-LM with speculation is."""

    def __init__(self, script, running):
        self.certain = script
        self.tokenizer = ByteTokenizer()
        self.running = running

    def rounds(self, generation):
        counts = {"num_draft_tokens": None, "num_accepted_tokens": None}
        yield generation.emit([65], **counts)
        yield generation.emit([66, 67], certain_ids=False, **counts)
        last = generation.emit([68, 257], **counts)  # <eos>
        if self.certain:
            generation.confirm_ids()
        yield last

    def close(self):
        pass


class Scripted(WholeEngine):
    """Every token is a round of its own, without drafts."""

    def __init__(self, script, running):
        self.script = script
        self.tokenizer = ByteTokenizer()
        self.running = running

    def rounds(self, generation):
        script = self.script
        with script.lock:
            script.working += 1
            script.most = max(script.most, script.working)
            script.prompts.append(bytes(i for i in generation.request.prompt_token_ids if i < 256).decode())
        try:
            for count, token_id in enumerate(self.tokenizer.encode(script.text)):
                if generation.finish_reason is not None or generation.cancelled():
                    break
                if script.pace:
                    time.sleep(script.pace)
                if script.error is not None and count == 3:
                    raise script.error
                yield generation.emit([token_id], num_draft_tokens=0, num_accepted_tokens=0)
            else:
                while generation.finish_reason is None:
                    yield generation.emit([257], num_draft_tokens=0, num_accepted_tokens=0)  # <eos>
        finally:
            with script.lock:
                script.working -= 1
                script.cancelled += generation.cancelled()

    def close(self):
        pass


def scripted_session(script, concurrency="serial", target="scripted", *, engine=Scripted, **changes):
    """A session over the engine."""
    values = {
        "backend": "scripted",
        "engine": "script",
        "engine_version": "1",
        "target": target,
        "drafter": None,
        "method": None,
        "num_speculative_tokens": 0,
        "dtype": "float32",
        "device": "cpu",
        "context_length": 20_000,
        "concurrency": concurrency,
        **changes,
    }
    capabilities = Capabilities(
        drafter_kinds=frozenset({"ngram"}),
        sampling=frozenset({"temperature", "seed"}),
        concurrent_calls=concurrency == "concurrent",
    )
    running = RunningInfo(**values)
    counts = {"text only": {}, "counted text": {"num_prompt_tokens": 7, "num_reused_tokens": 4}}
    text_only = isinstance(script, str) and script in counts
    made = TextOnly(running, counts[script]) if text_only else engine(script, running)
    return Session(made, running, capabilities)
