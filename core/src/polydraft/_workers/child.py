"""The worker: ``python -m polydraft._workers.child PID``. Its standard input and output are the pipe to process PID.

The main thread loads the engine and runs the calls of a serial engine; one thread reads from the pipe, and others
answer questions and run the calls of a concurrent engine. Whatever else is written to standard output goes to standard
error.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main() -> None:
    """Serve the app until it goes."""
    # First of all: nothing that is imported may read from the pipe or write to it.
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _end_with(int(sys.argv[1]))

    import faulthandler
    import signal

    # The process group is the worker's own, so no terminal sends it; the app ends its worker itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(all_threads=False)  # a crash in native code says where Python was

    from polydraft._workers.host import EngineHost

    EngineHost(reading, writing).serve()
    _leave()


def _leave() -> None:
    """End at once, after what engines registered for the end: their native threads may abort a process that unloads."""
    import atexit
    import logging

    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)


def _end_with(parent: int) -> None:
    """Have Linux kill this process when its parent goes; elsewhere the end of the pipe is the sign."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes
    import signal

    set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it went before
        os._exit(1)


if __name__ == "__main__":
    main()
