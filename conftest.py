"""For all tests of the repository."""

import signal

# A shell starts what it runs in the background with Ctrl+C ignored, and so are its children: tests that interrupt
# would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
