"""What the command line tools share: errors a user can mend are one message, not a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from paco_ds.errors import UserError


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a `UserError` and exit with status 2, upon which a launcher ends the job; others name their rank."""
    try:
        yield
    except UserError as error:
        _say(error)
        raise SystemExit(2) from None
    except Exception as error:
        if "RANK" in os.environ:
            error.add_note(f"on rank {os.environ['RANK']}")
        raise


def _say(error: UserError) -> None:
    rank = os.environ.get("RANK", "0")
    where = f" (rank {rank} of {os.environ['WORLD_SIZE']})" if "WORLD_SIZE" in os.environ else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
