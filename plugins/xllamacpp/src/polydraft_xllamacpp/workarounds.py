"""Workarounds for what xllamacpp's library does to a forked process."""

from __future__ import annotations

import ctypes
import os
from functools import cache

__all__ = ["let_forked_processes_exit"]


@cache
def let_forked_processes_exit() -> None:
    """Have forked processes of this one exit without destroying the library's global objects.

    ``exit`` destroys them, and waits for threads of the server that a forked process does not have: it would never end.
    In a forked process the first function at exit, after Python's own end, is therefore ``_exit``.
    """
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc; it calls the function with the exit code
        os.register_at_fork(after_in_child=lambda: libc.on_exit(libc._exit, None))
