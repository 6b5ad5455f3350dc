"""For all tests of the repository."""

import os
import signal
import sys

import pytest

# A shell starts what it runs in the background with Ctrl+C ignored, and so are its children: tests that interrupt
# would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _gives_standard_output_back():
    """A command line that a test runs in this process keeps standard output to its end: to the end of the test.

    Else the next one, in whatever test, would write to where this test's output went.
    """
    saved, stdout = os.dup(1), sys.stdout
    yield
    streams = sys.modules.get("polydraft._cli.streams")
    if streams is not None and streams.claim_output.cache_info().currsize:
        streams.claim_output().close()
        streams.claim_output.cache_clear()
        os.dup2(saved, 1)
        sys.stdout = stdout
    os.close(saved)
