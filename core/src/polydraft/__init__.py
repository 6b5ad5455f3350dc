"""One API for speculative decoding, whatever engine runs it.

>>> import polydraft
>>> with polydraft.load("google/gemma-4-E4B-it") as session:  # doctest: +SKIP
...     result = session.generate("def fibonacci(n):", max_new_tokens=256)

Errors are in ``polydraft.errors``; plugins build on ``polydraft.contract``. Importing this package imports no engine
and nothing else that is slow: the names, listed in ``__init__.pyi``, are loaded on first use.
"""

from typing import Any

import lazy_loader

_load_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("polydraft")
    if name not in __all__:
        import sys

        # With what Python needs to say which name may have been meant.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return _load_name(name)
