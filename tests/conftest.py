"""What holds for all tests."""

from __future__ import annotations

import signal

from small_project import project

__all__ = ["project"]

# A shell starts what runs in its background with SIGINT ignored, and every child inherits that: the programs under test
# would not hear the Ctrl-C that tests send them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
