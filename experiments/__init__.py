"""The experiments: `python -m experiments.NAME`."""

import signal
import sys

# While JAX is imported Ctrl-C ends the process at once, without a traceback; see
# `cli.catch_interrupts`. sys.argv is that while Python looks for the module that -m names.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
