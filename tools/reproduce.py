#!/usr/bin/env python3
"""Train the rows of a table over several seeds and draw them: `reproduce.py --table T --output DIR`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed
    from paco_ds.paper.reproduce import main

    sys.exit(main())
