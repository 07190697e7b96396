"""What holds for all tests."""

import signal

# A shell starts what runs in the background with Ctrl-C ignored, which all processes inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
