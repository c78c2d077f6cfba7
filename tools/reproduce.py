"""Train the rows of a table over several seeds and draw them: `tools/reproduce.py --table T.yaml --output DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paco_ds.paper.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
