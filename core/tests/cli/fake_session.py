"""A session that gives scripted chunks. No test is in here."""

from __future__ import annotations

from polydraft.contract import (
    Chunk,
    GenerationResult,
    GenerationSettings,
    GenerationStats,
    OffReason,
    RunningInfo,
    Segment,
)

__all__ = ["CHUNKS", "FakeSession", "make_running"]

CHUNKS = (
    Chunk(
        token_ids=(5,),
        text="Once",
        num_accepted_tokens=0,
        num_draft_tokens=0,
        segments=(Segment(text="Once", is_draft=False),),
    ),
    Chunk(
        token_ids=(6, 7, 8),
        text=" upon a time",
        num_accepted_tokens=2,
        num_draft_tokens=4,
        segments=(Segment(text=" upon a", is_draft=True), Segment(text=" time", is_draft=False)),
        finish_reason="length",
    ),
)


def make_running(**changes):
    fields = {
        "backend": "fake",
        "engine": "fake-engine",
        "engine_version": "1.2",
        "target": "org/target",
        "drafter": "org/drafter",
        "method": "mtp",
        "num_speculative_tokens": 4,
        "dtype": "float32",
        "device": "cpu",
        "context_length": 100,
        "concurrency": "serial",
        **changes,
    }
    return RunningInfo(**fields)


class FakeStream:
    def __init__(self, session, prompt, settings):
        self.session, self.prompt, self.settings = session, prompt, settings
        self.chunks = iter(session.chunks)
        self.given = []
        self.closed = False
        self.result = None

    def __iter__(self):
        return self

    def __next__(self):
        self.session.before_chunk(len(self.given))
        if self.closed:
            raise StopIteration
        try:
            chunk = next(self.chunks)
        except StopIteration:
            self._finish()
            raise
        self.given.append(chunk)
        return chunk

    def close(self):
        if self.result is None and self.given:
            self._finish("cancelled")
        self.closed = True

    def _finish(self, reason=None):
        self.result = self.session.make_result(self.given, self.prompt, self.settings, reason)


class FakeSession:
    """``calls`` holds (prompt, settings) of every generation; ``plain_token_ids`` makes plain decoding differ."""

    def __init__(self, chunks=CHUNKS):
        self.chunks = chunks
        self.engine = self.tokenizer = None
        self.running = make_running()
        self.calls = []
        self.streams = []
        self.closed = 0
        self.plain_token_ids = None
        self.stats = {}
        self.before_chunk = lambda index: None

    def stream(self, prompt, **settings):
        self.calls.append((prompt, settings))
        stream = FakeStream(self, prompt, settings)
        self.streams.append(stream)
        return stream

    def generate(self, prompt, **settings):
        stream = self.stream(prompt, **settings)
        for _ in stream:
            pass
        return stream.result

    def make_result(self, chunks, prompt, settings, reason):
        token_ids = tuple(token for chunk in chunks for token in chunk.token_ids)
        text = "".join(chunk.text for chunk in chunks)
        plain = settings.get("speculate") == "off"
        if plain and self.plain_token_ids is not None:
            token_ids = self.plain_token_ids
        known = {name: value for name, value in settings.items() if name in GenerationSettings.model_fields}
        counts = {
            "num_target_steps": 3 if plain else 1,
            "num_drafts": 0 if plain else 1,
            "num_draft_tokens": 0 if plain else 4,
            "num_accepted_tokens": 0 if plain else 2,
            "accepted_per_position": () if plain else (1, 1, 0, 0),
            "prefill_seconds": 0.5,
            "decode_seconds": 3.0 if plain else 1.0,
            **self.stats,
        }
        return GenerationResult(
            text=text,
            raw_text=text,
            token_ids=token_ids,
            prompt_token_ids=tuple(prompt) if isinstance(prompt, list) and isinstance(prompt[0], int) else (1, 2),
            finish_reason=reason or chunks[-1].finish_reason or "length",
            thinking="".join(chunk.thinking for chunk in chunks),
            tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
            settings=GenerationSettings(**{"seed": 77, **known}),
            stats=GenerationStats(num_tokens=len(token_ids), **counts),
            running=self.running,
            speculation_off=OffReason(code="caller", message="The caller asked.") if plain else None,
        )

    def close(self):
        self.closed += 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
