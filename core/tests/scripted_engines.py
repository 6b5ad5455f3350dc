"""Engines that do what a test says: a whole one and a stepping one, over a tokenizer of 16 letters."""

from polydraft.contract import (
    Capabilities,
    EngineSequence,
    Proposal,
    RunningInfo,
    Step,
    SteppingEngine,
    WholeEngine,
)

VOCABULARY = 16


class Letters:
    """Token i is the letter number i."""

    vocab_size = VOCABULARY
    bos_token_id = None
    eos_token_ids = frozenset()
    special_token_ids = frozenset()

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def token_bytes(self, token_id):
        return bytes([97 + token_id])

    def token_id(self, token):
        return None

    def chat(self, messages, *, tools=None, template_kwargs=None, continue_final_message=False):
        return self.encode(messages[0]["content"])


def running(**changes):
    values = {
        "backend": "scripted",
        "engine": "script",
        "engine_version": "1",
        "target": "letters",
        "drafter": None,
        "method": "draft-model",
        "num_speculative_tokens": 2,
        "dtype": "float32",
        "device": "cpu",
        "context_length": 64,
        "concurrency": "serial",
    }
    return RunningInfo(**{**values, **changes})


class Scripted:
    """Both engines: ``fault`` says what goes wrong; None: nothing does."""

    def __init__(self, fault=None, **changes):
        self.tokenizer = Letters()
        self.running = running(**changes)
        self.fault = fault
        self.closes = 0

    def close(self):
        self.closes += 1


class Whole(Scripted, WholeEngine):
    """``fault`` is called with the generation in place of what makes rounds."""

    def __init__(self, fault=None, **changes):
        super().__init__(fault, method="ngram", **changes)

    def rounds(self, generation):
        return self.fault(generation) if self.fault else good_rounds(generation)


def good_rounds(generation):
    while generation.finish_reason is None and not generation.cancelled():
        yield emit(generation)


def emit(generation, token_ids=(1,), drafted=0, accepted=0, **fields):
    return generation.emit(token_ids, num_draft_tokens=drafted, num_accepted_tokens=accepted, **fields)


class Stepping(Scripted, SteppingEngine):
    """``fault`` maps the name of a method of its sequences to what is called in its place."""

    max_draft_tokens = 2

    def open_sequence(self):
        return Sequence(self.fault or {})


class Sequence(EngineSequence):
    """Every choice is token 1, and every draft, too."""

    length = 0

    def __init__(self, fault):
        for name, method in fault.items():
            setattr(self, name, method)

    def prefill(self, token_ids, sampler, *, keep_logits=False):
        self.length = len(token_ids)
        return Step([1])

    def verify(self, token_ids, sampler, *, keep_logits=False):
        self.length += len(token_ids)
        return Step([1] * len(token_ids))

    def rollback(self, length):
        self.length = length

    def propose(self, newest, k, sampler, *, keep_logits=False):
        return Proposal([1] * k)

    def close(self):
        pass


CAPABILITIES = Capabilities(drafter_kinds={"draft-model"})
