"""A command under a limit of the kernel on the size of a file, which stands in for a full disk."""

from __future__ import annotations

import importlib
import resource
import signal
from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    """LIMIT_BYTES MODULE ARGUMENT...; the exit status of the module's `main`."""
    limit, module, *arguments = words
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the process is killed instead of told
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    return int(importlib.import_module(module).main(arguments))
