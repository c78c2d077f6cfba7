#!/usr/bin/env python3
"""Make, check and extend shards, suggest settings: `build_shards.py build`, `check`, `add`, `suggest`."""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` hears Ctrl-C: no traceback of an import
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed
    from paco_ds.data.pack.entry import main

    sys.exit(main())
