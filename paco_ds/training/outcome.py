"""RUN/outcome.json: how the last start of a run ended, for whoever starts it again.

Launchers do not tell: `deepspeed` ends with 0, 1, 247 or -15 after the same events, whichever process it noticed first.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from paco_ds.command import exit_status
from paco_ds.errors import StorageError
from paco_ds.files import replace_text

OUTCOME_FILE = "outcome.json"


def run_directory(output: Path | None, config: str | None) -> Path:
    """RUN of a training: --output, or runs/NAME OF THE RECIPE."""
    return output or Path("runs", Path(config or "demo").stem)


@dataclass(frozen=True)
class Outcome:
    """An end of a run.

    Attributes:
        status: exit status; 0 is a run that did all it was asked to.
        reason: in words.
        step: optimizer steps done, or None if it did not come so far.
        host: where it was written.
        time: when, ISO 8601, UTC.
    """

    status: int
    reason: str
    step: int | None = None
    host: str = field(default_factory=socket.gethostname)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    def write(self, run: Path) -> None:
        """Write it into the run directory, atomically."""
        replace_text(run / OUTCOME_FILE, json.dumps(asdict(self)) + "\n")


def read_outcome(run: Path) -> Outcome | None:
    """How the last start ended; None if it did not say, as when it was killed."""
    try:
        return Outcome(**json.loads((run / OUTCOME_FILE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


class Ending:
    """Writes how this start of a run ends, on the rank that wrote the run directory; a context manager around all.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._begun = run, False
        self.step: Callable[[], int | None] = lambda: None
        self.message: Callable[[], str] = lambda: ""  # of the watchdog that ends the process

    def begin(self) -> str:
        """Remove what the last start wrote, so that a start that is killed leaves nothing; returns how it ended.

        Called once this process is the only one that writes the run directory.
        """
        before = read_outcome(self._run)
        (self._run / OUTCOME_FILE).unlink(missing_ok=True)
        self._begun = True
        return "ended without a word: killed" if before is None else before.reason

    def write(self, status: int, reason: str) -> None:
        """Write it, if this process began; a disk that is full is not reported a second time."""
        if self._begun:
            with suppress(OSError, StorageError):
                Outcome(status, reason, self.step()).write(self._run)

    def end_process(self, status: int) -> None:
        """For the watchdog: end at once. The disk of the run may be what hangs."""
        writing = threading.Thread(target=self.write, args=(status, self.message()), daemon=True)
        writing.start()
        writing.join(2.0)
        os._exit(status)

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        if isinstance(error, Exception):
            self.write(exit_status(error) or 1, str(error) or type(error).__name__)
