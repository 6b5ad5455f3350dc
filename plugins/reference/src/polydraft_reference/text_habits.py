"""A bigram table that makes the output of the toy look like text: which bytes may follow which, and how likely.

Random weights alone would emit random bytes. With the table, words alternate consonants and vowels, characters of
several UTF-8 bytes are complete, sentences end, and sometimes the text ends. Bigrams repeat, so n-gram drafting finds
something. The transformer decides which successor a byte gets, so a wrong KV row changes the text.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from polydraft_reference.tokenizer import VOCAB_SIZE, ByteTokenizer

__all__ = ["bigram_logits"]

FORBIDDEN = -40.0
"""Too low to be sampled at a temperature of up to 2: the sampling noise spans less than 20."""

LIKING = 1.2
"""Standard deviation of an allowed successor's logit."""

_END_LOGIT = 2.0
_VOWELS, _CONSONANTS, _DIGITS = "aeiouéö", "bdfklmnprst", "012345"
_SYMBOLS = "€→🎉🚀"
_FOLLOWERS = {
    _CONSONANTS: _VOWELS,
    _VOWELS: _CONSONANTS + " ,.",
    _DIGITS: " .",
    _SYMBOLS: " " + _DIGITS,
    " ": _CONSONANTS + _VOWELS + _SYMBOLS + _DIGITS,
    ",": " ",
    ".!?": " \n",
    "\n": _CONSONANTS + _VOWELS,
}


def bigram_logits(seed: int) -> npt.NDArray[np.float64]:
    """Logit added to each token, given the token before it.

    Args:
        seed: Which successors a token likes.

    Returns:
        Shape (VOCAB_SIZE, VOCAB_SIZE): row = token before, column = token.
    """
    # RandomState, not Generator: numpy promises its stream never changes, and the weights are the checkpoint.
    liking = np.random.RandomState(seed).standard_normal((VOCAB_SIZE, VOCAB_SIZE)) * LIKING
    allowed = np.zeros((VOCAB_SIZE, VOCAB_SIZE), dtype=bool)
    for characters, followers in _FOLLOWERS.items():
        for character in characters:
            encoded = character.encode()
            for here, after in pairwise(encoded):
                allowed[here, after] = True
            for follower in followers:
                allowed[encoded[-1], follower.encode()[0]] = True
    # Anything else, such as special tokens and other bytes of a prompt, is followed by the start of a line.
    unknown = ~allowed.any(axis=1)
    allowed[unknown] = allowed[ord("\n")]
    logits = np.where(allowed, liking, FORBIDDEN)
    ends = sorted(ByteTokenizer.eos_token_ids)
    for end in ".!?":
        logits[ord(end), ends[:2]] = _END_LOGIT
    return logits
