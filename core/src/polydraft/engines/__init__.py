"""What several engines need and no engine owns: the context's length, and servers as child processes."""

from polydraft.engines.context import context_length

__all__ = ["context_length"]
