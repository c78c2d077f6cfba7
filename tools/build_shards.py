#!/usr/bin/env python3
"""Make and check shards: ``build_shards.py build CARD --output DIR``, ``build_shards.py check DIR``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The checkout need not be installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from paco_ds.data.command import main

    sys.exit(main())
