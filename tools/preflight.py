#!/usr/bin/env python3
"""Say before a run what it will need, and show its views: `preflight.py --help`."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` hears Ctrl-C: no traceback of an import
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed
    from paco_ds.planning.preflight import main

    sys.exit(main())
