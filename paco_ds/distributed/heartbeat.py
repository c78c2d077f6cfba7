"""Where this rank is in its run: marked by training, read by the watchdog's thread; nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass

SLOW = 4  # times engine.hang_seconds for a start, a first step, a save, a report
SLOW_SECONDS = 120.0  # at least: how long a start takes does not depend on the setting


@dataclass(frozen=True)
class Mark:
    """What a rank does. All ranks set the same marks in the same order, so that the lowest `count` is the last rank."""

    count: int
    phase: str
    step: int
    slow: bool


class Heartbeat:
    """The last mark of this rank.

    Attributes:
        hang_seconds: how long a mark may stand before the rank counts as hung; None: for ever.
    """

    def __init__(self) -> None:
        self.hang_seconds: float | None = None
        self.last = Mark(0, "start", 0, slow=True)

    def mark(self, phase: str, step: int, slow: bool = False) -> None:
        """Progress: from now on this rank does `phase` of `step`. All ranks mark alike.

        Args:
            slow: it may take `SLOW` times as long as a step, and `SLOW_SECONDS` at least.
        """
        self.last = Mark(self.last.count + 1, phase, step, slow)

    def allowed(self, mark: Mark) -> float | None:
        """Seconds that a mark may stand; None: for ever, as before the first mark."""
        if self.hang_seconds is None or mark.count == 0:
            return None
        return max(SLOW * self.hang_seconds, SLOW_SECONDS) if mark.slow else self.hang_seconds
