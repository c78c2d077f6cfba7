#!/usr/bin/env python3
"""Start a training again until it is finished: `keep_running.py --help`."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` hears Ctrl-C: no traceback of an import
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed
    from paco_ds.training.keep_running import main

    sys.exit(main())
