"""What holds for all tests."""

import os
import signal

# A shell starts what runs in the background with Ctrl-C ignored, which all processes inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What compiles a model leaves threads behind, and beside those no process can be forked.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
