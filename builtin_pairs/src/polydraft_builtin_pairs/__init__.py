"""Small trained targets with their drafters, as package data.

>>> import polydraft_builtin_pairs as builtin
>>> builtin.pairs()["tiny-e2b"]
'tiny-e2b-assistant'
>>> (builtin.path("tiny-e2b") / "config.json").is_file()
True
"""

from ._data import DataError, UnknownNameError, names, pairs, path, verify
from ._prompts import Message, Prompt, prompts

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "Message",
    "Prompt",
    "UnknownNameError",
    "__version__",
    "names",
    "pairs",
    "path",
    "prompts",
    "verify",
]
